"""One pass over the data: the Moments of every layer's inputs, over all batches and all processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.errors import BatchNormError
from batchnorm.moments import Moments
from batchnorm.protocol import Measure, Pair, Statistics
from batchnorm.reading import gathered, through
from batchnorm.source import Source

__all__ = ["Totals", "largest_move", "one_pass", "over_processes"]


@dataclass
class Totals:
    """What a pass has measured.

    Args:
        moments: of the inputs of each layer.
        batches: how many.
        samples: how many.
        settled: whether the pass ended early because nothing moved any more.
    """

    moments: dict[Statistics, Moments] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    settled: bool = False


def one_pass(
    measure: Measure,
    source: Source,
    use: Mapping[Statistics, Pair] | None,
    *,
    samples: int | None,
    tolerance: float | None,
    shown: bool,
) -> Totals:
    """Measure all batches of this process.

    Raises:
        DataError: a batch that fails.
    """
    totals, last = Totals(), dict[Statistics, Pair]()
    for measured in through(measure, source, use, doing="recalibrating", samples=samples, shown=shown):
        for one, moments in measured.moments.items():
            totals.moments[one] = totals.moments.get(one, Moments.empty()).merge(moments)
        totals.batches += 1
        totals.samples += measured.samples
        # compared when the data has doubled: smaller steps would look settled too soon
        if tolerance is not None and totals.batches & (totals.batches - 1) == 0:
            now = {one: (m.mean, m.variance) for one, m in totals.moments.items()}
            totals.settled = bool(now) and now.keys() == last.keys() and largest_move(last, now) <= tolerance
            if totals.settled:
                break
            last = now
    return totals


def largest_move(old: Mapping[Statistics, Pair], new: Mapping[Statistics, Pair]) -> float:
    """Return the largest change of a mean, in deviations, and of a variance, relative; with ε added to the variance."""
    largest = 0.0
    for one, (mean, variance) in new.items():
        wide = variance + one.eps + np.finfo(np.float64).tiny
        moves = np.maximum(np.abs(mean - old[one][0]) / np.sqrt(wide), np.abs(variance - old[one][1]) / wide)
        largest = max(largest, float(moves.max(initial=0.0)))
    return largest


def over_processes(statistics: list[Statistics], found: Totals | BatchNormError) -> Totals:
    """Merge what all processes of a distributed job have measured, in the order of their ranks; alone, return ``found``.

    Raises:
        BatchNormError: this process has failed, or another one.
        DataError: no process had a batch.
        OptionError: the models of two processes differ.
    """
    parts = gathered("recalibration", statistics, found if isinstance(found, BatchNormError) else _named(found))
    assert isinstance(found, Totals)  # noqa: S101
    return found if len(parts) == 1 else _merged(statistics, found, parts)


def _named(found: Totals) -> dict[str, Any]:
    moments = {one.name: (m.count, m.mean, m.m2) for one, m in found.moments.items()}
    return {"moments": moments, "batches": found.batches, "samples": found.samples, "settled": found.settled}


def _merged(statistics: list[Statistics], own: Totals, parts: list[dict[str, Any]]) -> Totals:
    total = Totals(
        batches=sum(part["batches"] for part in parts),
        samples=sum(part["samples"] for part in parts),
        settled=all(part["settled"] for part in parts),
    )
    for one in dict.fromkeys([*statistics, *own.moments]):
        seen = [Moments(*part["moments"][one.name]) for part in parts if one.name in part["moments"]]
        if seen:
            total.moments[one] = Moments.empty().merge(*seen)
    return total
