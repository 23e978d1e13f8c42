"""What `recalibrate` returns."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.protocol import Pair, Statistics
from batchnorm.tables import table

__all__ = ["Left", "Moved", "Recalibration", "compared"]


@dataclass(frozen=True, slots=True)
class Moved:
    """A layer with new statistics.

    Args:
        layer: its dotted name.
        values: how many values of a channel were measured (the sum of their weights).
        shift: how far the mean has moved at most, in deviations: ``max |new - old| / √(new variance + ε)``.
        ratio: the smallest and the largest ``(new variance + ε) / (old variance + ε)``.
    """

    layer: str
    values: float
    shift: float
    ratio: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Left:
    """A layer whose statistics are as they were.

    Args:
        layer: its dotted name.
        reason: why.
    """

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recalibration:
    """What has moved and what was never reached; prints as a table.

    Args:
        model: the model, with its new statistics.
        moved: layers with new statistics.
        left: layers that are as they were, each with its reason.
        batches: batches of one pass, over all processes.
        samples: samples of one pass, over all processes.
        passes: how often the data was read.
        settled: whether nothing moved any more in the last pass (``"sequential"``), or the data was left early because the
            statistics had settled (``tolerance``).
    """

    model: Any
    moved: tuple[Moved, ...]
    left: tuple[Left, ...]
    batches: int
    samples: int
    passes: int
    settled: bool

    def __str__(self) -> str:
        rows = [
            (m.layer, f"{m.values:,.6g}", f"{m.shift:.3g} σ", f"× {m.ratio[0]:.3g} to {m.ratio[1]:.3g}")
            for m in self.moved
        ]
        rows += [(one.layer, "", "", f"left: {one.reason}") for one in self.left]
        passes = f"{self.passes} passes over " if self.passes > 1 else ""
        total = (
            f"{len(self.moved)} of {len(rows)} layers have new statistics, of {passes}{self.samples:,} samples in "
            f"{self.batches:,} batches"
        )
        return "\n".join([table(("Layer", "Values", "Mean moved by", "Variance"), rows), total])


def compared(one: Statistics, values: float, new: Pair) -> Moved:
    """Return how far the statistics of a layer have moved."""
    mean, variance = one.pair
    tiny = np.finfo(np.float64).tiny
    after = new[1] + one.eps + tiny
    shift = np.abs(new[0] - mean) / np.sqrt(after)
    ratio = after / np.maximum(variance + one.eps, tiny)
    return Moved(one.name, values, float(shift.max(initial=0.0)), (float(ratio.min()), float(ratio.max())))
