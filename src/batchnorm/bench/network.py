"""Whole training steps of networks of torchvision: torch's layers, ours with their activations fused, torch's again."""

import copy
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchnorm.bench.contest import Contestant, Errors, begin, hold
from batchnorm.bench.contestants import OURS, TORCH
from batchnorm.bench.machine import keep
from batchnorm.bench.networks import Batch, allowed_errors, answers, batch_of, built, errors_of, fused, trainer
from batchnorm.bench.plots import dots
from batchnorm.bench.scores import NOTES, busy, left_out, means, scores
from batchnorm.progress import Progress

__all__ = ["NETWORKS", "NetworkBench", "run"]

NETWORKS = (
    "mobilenet_v2", "densenet121", "resnet50", "resnet18", "vgg16_bn", "mobilenet_v3_large", "efficientnet_b0",
    "shufflenet_v2_x1_0", "regnet_y_400mf", "googlenet",
)  # fmt: skip
QUICK = ("resnet18",)
SAMPLES, SIDE, SECONDS = 16, 128, 60.0
QUICK_SAMPLES, QUICK_SIDE = 4, 32
# in float64 convolutions take long
SMALL = (4, 32)


@dataclass(frozen=True)
class NetworkBench:
    """Raw values of the measurement; prints as a table."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        rows = self.facts["rows"]
        size = "×".join(map(str, rows[0]["shape"]))
        lines = [
            f"a training step, batch {size}",
            scores(rows, "Network"),
            means(rows, OURS),
            "",
            *left_out(rows),
            *NOTES,
            *busy(self.facts["machine"]),
        ]
        return "\n".join([*lines, f"raw values and picture: {', '.join(map(str, self.files))}"])


def run(out: Path, *, quick: bool = False) -> NetworkBench:
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
    picture = dots(
        facts["rows"], (OURS,), TORCH, "time as a multiple of that with torch's layers (log)", out / "network.svg"
    )
    return NetworkBench(facts, (keep(facts, out, "network.json"), picture))


def _row(name: str, batch: Batch, seconds: float) -> dict[str, Any]:
    model = built(name)
    makers = {
        TORCH: lambda: Contestant(trainer(copy.deepcopy(model), batch), dict),
        OURS: lambda: Contestant(trainer(fused(model, batch[0]), batch), lambda: _errors(model, batch)),
    }
    facts = {"group": "training step", "name": name, "shape": list(batch[0].shape)}
    return hold(facts, makers, seconds=seconds, warm=1)


def _errors(model: nn.Module, batch: Batch) -> Errors:
    """Hold ours to torch's layers: on the batch that is timed, and on a small one in float64, where little is hidden."""
    return _held(model, batch, "") | _held(copy.deepcopy(model).double(), batch_of(*SMALL, torch.float64), ", float64")


def _held(model: nn.Module, batch: Batch, of: str) -> Errors:
    right = answers(model, batch)
    found = answers(fused(model, batch[0]), batch)
    return errors_of(found, right, allowed_errors(model, batch, right), of)
