"""What a training step keeps for its backward, with and without recomputing outputs, and what that costs in time."""

import copy
import gc
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchnorm.bench.contest import Absent, Contestant, Errors, begin, hold
from batchnorm.bench.contestants import OURS, TORCH
from batchnorm.bench.machine import keep
from batchnorm.bench.networks import Batch, answers, batch_of, built, fused, trainer
from batchnorm.bench.plots import dots
from batchnorm.bench.ratios import AGAIN
from batchnorm.bench.saved import asked_bytes, peak_bytes, saved_bytes
from batchnorm.bench.scores import NOTES, busy, left_out, scores
from batchnorm.progress import Progress
from batchnorm.tables import table

__all__ = ["MemoryBench", "run"]

NETWORKS = ("vgg16_bn", "mobilenet_v2", "resnet18", "resnet50")
QUICK = ("resnet18",)
SAMPLES, SIDE, SECONDS = 16, 128, 40.0
QUICK_SAMPLES, QUICK_SIDE = 4, 32
LESS = "ours, recompute"


@dataclass(frozen=True)
class MemoryBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        rows = self.facts["rows"]
        size = "×".join(map(str, rows[0]["shape"]))
        lines = [
            f"kept for the backward, batch {size}; most alive at once in a step, beyond parameters",
            _bytes(rows),
            "",
            "the time of a step",
            scores(rows, "Network"),
            *left_out(rows),
            *NOTES,
            *busy(self.facts["machine"]),
        ]
        return "\n".join([*lines, f"raw values and picture: {', '.join(map(str, self.files))}"])


def run(out: Path, *, quick: bool = False) -> MemoryBench:
    """Measure, keep every raw value as JSON in ``out``, and draw the picture beside it.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    facts = begin()
    batch = batch_of(QUICK_SAMPLES, QUICK_SIDE) if quick else batch_of(SAMPLES, SIDE)
    names = QUICK if quick else NETWORKS
    facts["rows"] = []
    with Progress("training", "networks", len(names), shown=not quick) as progress:
        for name in names:
            facts["rows"].append(_row(name, batch, 0.0 if quick else SECONDS))
            # of hundreds of MB
            gc.collect()
            progress.advance(name)
    label = "time as a multiple of that without recomputing (log)"
    picture = dots(facts["rows"], (OURS + AGAIN, LESS), OURS, label, out / "memory.svg")
    return MemoryBench(facts, (keep(facts, out, "memory.json"), picture))


def recompute() -> AbstractContextManager[Any]:
    """Return the context in which outputs are computed again in the backward.

    Raises:
        Absent: this version has none.
    """
    found: Any = getattr(import_module("batchnorm.torch"), "recompute", None)
    if found is None:
        raise Absent("batchnorm.torch has no recompute")
    context: AbstractContextManager[Any] = found()
    return context


def _row(name: str, batch: Batch, seconds: float) -> dict[str, Any]:
    plain = built(name)
    model = fused(plain, batch[0])
    facts: dict[str, Any] = {"group": "memory", "name": name, "shape": list(batch[0].shape), "saved": {}, "peak": {}}
    facts |= {"asked": {who: asked_bytes(copy.deepcopy(one), batch) for who, one in ((TORCH, plain), (OURS, model))}}

    def weigh(who: str, one: nn.Module, *context: Any) -> None:
        one = copy.deepcopy(one)
        facts["saved"][who] = saved_bytes(one, batch, *context)
        facts["peak"][who] = peak_bytes(one, batch, *context)

    def without() -> Contestant:
        return Contestant(trainer(copy.deepcopy(model), batch), dict)

    def less() -> Contestant:
        with recompute():
            pass
        weigh(LESS, model, recompute)
        return Contestant(trainer(copy.deepcopy(model), batch, recompute), lambda: _errors(model, batch))

    weigh(TORCH, plain)
    weigh(OURS, model)
    return hold(facts, {OURS: without, LESS: less}, seconds=seconds, warm=1)


def _errors(model: nn.Module, batch: Batch) -> Errors:
    """Ask for the same bits with and without: the share of numbers that differ may be 0."""
    right, found = answers(model, batch), answers(model, batch, recompute)
    return {what: (_share(found[what], v), 0.0) for what, v in right.items()}


def _share(found: torch.Tensor, right: torch.Tensor) -> float:
    same = found.shape == right.shape
    return float((found != right).double().mean()) if same else float("inf")


def _bytes(rows: list[dict[str, Any]]) -> str:
    """Return the bytes of each network as a table."""
    lines = []
    for row in rows:
        for who, kept in row["saved"].items():
            peak = row["peak"][who]
            changes = (_change(kept, row["saved"][of]) for of in (TORCH, OURS))
            lines.append(
                (
                    row["name"],
                    who,
                    f"{kept / 2**20:.1f}",
                    *changes,
                    f"{peak / 2**20:.1f}",
                    _change(peak, row["peak"][TORCH]),
                )
            )
    head = ("Network", "Layers", "Kept, MiB", f"To {TORCH}", f"To {OURS}", "Peak, MiB", f"To {TORCH}")
    return table(head, lines, numbers=5)


def _change(value: int, of: int) -> str:
    return f"{100 * (value / of - 1):+.1f} %".replace("-", "−")
