"""What a run is: its task, its recipe, the order of its rows, and the row of numbers that it leaves."""

import math
import os
from collections.abc import Iterator
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
