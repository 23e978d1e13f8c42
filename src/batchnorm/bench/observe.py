"""What observing costs: one pass over data, in turns with a plain evaluation of it; and a training with a monitor."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from batchnorm.bench.machine import describe, keep
from batchnorm.observe import observe
from batchnorm.tables import table
from batchnorm.torch import Monitor

__all__ = ["ObserveBench", "run"]

ROUNDS, IMAGES, STEPS = 9, (2, 32, 224), (20, 16, 96)
QUICK = (1, 2, 64)
PLAIN = ("plain evaluation", "plain training")


@dataclass(frozen=True)
class ObserveBench:
    """Raw values of the measurement; prints as a table."""

    facts: dict[str, Any]
    file: Path

    def __str__(self) -> str:
        rows, plain = [], list[float]()
        for name, times in self.facts["seconds"].items():
            plain = times if name in PLAIN else plain
            ratios = [own / other for own, other in zip(times, plain, strict=True)]
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append((name, f"{median(times):.2f} s", spread))
        return f"{table((self.facts['model'], 'Median', 'Ratio to the plain way'), rows)}\n\nraw values: {self.file}"


def run(out: Path, *, quick: bool = False) -> ObserveBench:
    """Measure, and keep every raw value as JSON in ``out``."""
    from batchnorm.bench.zoo import open_torchvision

    open_torchvision()
    import torchvision

    torch.manual_seed(0)
    model = (torchvision.models.resnet18 if quick else torchvision.models.resnet50)(weights=None)
    data, steps = _images(QUICK if quick else IMAGES), _images(QUICK if quick else STEPS)
    every = max(2, len(steps) // 2)
    ways: dict[str, Callable[[], None]] = {
        "plain evaluation": lambda: _evaluate(model, data),
        "observe": lambda: _observe(model, data, "batch"),
        "observe, use='running'": lambda: _observe(model, data, "running"),
        "plain training": lambda: _train(model, steps),
        f"with a monitor, every={every}": lambda: _watched(model, steps, every),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(2 if quick else ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - start)
    facts = {
        "machine": describe(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(),
        "model": type(model).__name__,
        "batches": [list(x.shape) for x in (data[0], steps[0])],
        "seconds": seconds,
    }
    return ObserveBench(facts, keep(facts, out, "observe.json"))


def _images(sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    count, batch, side = sizes
    return [torch.randn(batch, 3, side, side) for _ in range(count)]


def _evaluate(model: nn.Module, data: list[torch.Tensor]) -> None:
    model.eval()
    with torch.no_grad():
        for x in data:
            model(x)


def _observe(model: nn.Module, data: list[torch.Tensor], use: str) -> None:
    observe(model, data, use=use, progress=False)


def _train(model: nn.Module, data: list[torch.Tensor]) -> None:
    model.train()
    for x in data:
        model(x).square().mean().backward()
        model.zero_grad()


def _watched(model: nn.Module, data: list[torch.Tensor], every: int) -> None:
    with Monitor(model, every=every):
        _train(model, data)
