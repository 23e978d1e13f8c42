"""What a run is: its task, its recipe, the order of its rows, and the row of numbers that it leaves."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from batchnorm.lab.arms import Arm

__all__ = [
    "CURVE_POINTS",
    "CURVE_ROWS",
    "PERCENTILES",
    "PERCENTILE_POINTS",
    "PROBE_ROWS",
    "PROBE_UNITS",
    "Recipe",
    "Row",
    "Scores",
    "Task",
    "batches",
    "row_of",
    "units_of",
]

Row = dict[str, Any]
Scores = tuple[float, float]
"""Mean log-loss in nats, and accuracy."""

CURVE_POINTS = 50
PERCENTILE_POINTS = 20
PERCENTILES = (0.15, 0.50, 0.85)
PROBE_ROWS = 256
PROBE_UNITS = 32
CURVE_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs of a comparison share.

    Args:
        model: name of a network, or ``package.module:factory``; those of Keras begin with ``keras:``.
        steps: of stochastic gradient descent, at a constant learning rate, without momentum.
        batch_size: rows a step, where the arm names none; the last odd batch of an epoch is left out.
    """

    model: str
    steps: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a comparison."""

    arm: Arm
    learning_rate: float
    seed: int


def batches(rows: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of row numbers for ever, each epoch in an order of its own.

    Example:
        >>> stream = batches(5, 2, seed=0)
        >>> [next(stream).tolist() for _ in range(3)]
        [[2, 4], [3, 0], [4, 1]]
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows)
        yield from (order[i : i + size] for i in range(0, rows - size + 1, size))


def row_of(
    task: Task,
    *,
    diverged: bool,
    steps: int,
    val: Scores,
    test: Scores,
    curve: list[list[float | None]],
    units: list[dict[str, Any]],
    seconds: float,
    threads: int,
) -> Row:
    """Return what is kept of a run; its scores are ``None`` where it diverged, or where they are not finite."""
    diverged = diverged or not math.isfinite(val[0] + test[0])
    return {
        "arm": task.arm.name,
        "learning_rate": task.learning_rate,
        "seed": task.seed,
        "status": "diverged" if diverged else "trained",
        "steps": steps,
        "val_log_loss": None if diverged else val[0],
        "val_accuracy": None if diverged else val[1],
        "test_log_loss": None if diverged else test[0],
        "test_accuracy": None if diverged else test[1],
        "curve": curve,
        "units": units,
        "seconds": seconds,
        "memory_mb": _peak_memory_mb(),
        "threads": threads,
        "worker": os.getpid(),
    }


def _peak_memory_mb() -> float:
    """Return the most memory that this process ever held; ``ru_maxrss`` would count that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    info = psutil.Process().memory_info()
    return float(getattr(info, "peak_wset", info.rss)) / 2**20


def units_of(probed: Sequence[tuple[int, list[np.ndarray]]]) -> list[dict[str, Any]]:
    """Return for each activation layer the path of its first unit's percentiles, and the drift of its first units.

    Drift is the way that the median of a unit goes during training, in units of its mean 15–85 % spread; the layer's is the
    median over its first 32 units.

    Args:
        probed: steps, and for each layer the percentiles ``(3, units)`` of what it receives.
    """
    layers = []
    for layer in zip(*(found for _, found in probed), strict=True):
        path = np.stack(layer)
        spread = (path[:, 2] - path[:, 0]).mean(0)
        way = np.abs(np.diff(path[:, 1], axis=0)).sum(0)
        drifts = np.sort(way / np.maximum(spread, np.finfo(np.float64).tiny))
        drift = float(drifts[(len(drifts) - 1) // 2])
        layers.append(
            {
                "steps": [step for step, _ in probed],
                "percentiles": np.nan_to_num(path[:, :, 0], nan=0.0, posinf=0.0, neginf=0.0).tolist(),
                "drift": drift if math.isfinite(drift) else None,
            }
        )
    return layers
