"""What a comparison leaves in its folder, each file whole or not at all."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from batchnorm.lab.plan import Plan
from batchnorm.lab.results import Comparison

__all__ = ["facts_of", "rows_as_csv", "write"]

_COLUMNS = (
    "arm", "learning_rate", "seed", "status", "steps",
    "val_log_loss", "val_accuracy", "test_log_loss", "test_accuracy",
)  # fmt: skip


def rows_as_csv(rows: list[dict[str, Any]]) -> str:
    """Return the numbers that depend on nothing but the seeds: the same comparison gives the same file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def facts_of(plan: Plan, found: Comparison) -> dict[str, Any]:
    """Return what was found, for programs to read."""
    best = found.best
    return {
        "data": plan.data.source,
        "identity": plan.identity(),
        "threshold": found.evidence.threshold,
        "worker_memory_mb": max(row["memory_mb"] for row in found.rows),
        "worker_threads": max(row["threads"] for row in found.rows),
        "arms": [
            {
                "name": r.arm.name,
                "learning_rate": r.learning_rate,
                "test_log_loss": [r.log_loss.mean, r.log_loss.low, r.log_loss.high],
                "test_accuracy": [r.accuracy.mean, r.accuracy.low, r.accuracy.high],
                "median_steps": r.steps if math.isfinite(r.steps) else None,
                "usable_learning_rates": r.usable,
            }
            for r in found.table
        ],
        "headline": found.evidence.headline,
        "verdicts": [
            {
                "question": v.question,
                "arms": [v.first, v.second],
                "outcome": v.outcome,
                "difference": v.difference if math.isfinite(v.difference) else None,
                "interval": [b if math.isfinite(b) else None for b in (v.low, v.high)],
                "p": v.p,
                "p_holm": v.p_holm,
                "text": v.text,
            }
            for v in found.verdicts
        ],
        "notes": found.evidence.notes,
        "ran": found.ran,
        "seconds": found.seconds,
        "best": {
            "arm": best.task.arm.to_dict(),
            "learning_rate": best.task.learning_rate,
            "seed": best.task.seed,
            "test_running_statistics": best.before,
            "test_recalibrated_folded": best.recalibrated,
            "folded": best.deployed.folded,
            "kept": best.deployed.kept,
            "error": best.deployed.error,
            "bound": best.deployed.bound,
            "onnx": best.onnx,
            "left_out": best.left_out,
        },
    }


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
