"""The statistics of one batch, on any backend: centred, in two passes, for all samples together or in ghost batches."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from batchnorm.functional import ghost_batches
from batchnorm.keras.backends import Total

__all__ = ["Batch", "Ghosts", "ghosts_of", "measure"]


class Ghosts(NamedTuple):
    """Ghost batches: the number of the one that each sample belongs to, and how many there are."""

    numbers: Any
    count: Any


class Batch(NamedTuple):
    """A batch, centred, with its statistics, which keep their axes: ``(1, …, C, …)``, ``(G, …, C, …)`` of ghost batches.

    Args:
        centred: ``x - mean``.
        centre: close to the mean, a constant.
        off: what the mean has more; the two together say where it is better than one number can.
        variance: biased.
        count: number of values, or the sum of their weights.
        places: how many values a channel has that count, over all samples and replicas; a number where it is known.
        ghosts: ``None`` for all samples together.
    """

    centred: Any
    centre: Any
    off: Any
    variance: Any
    count: Any
    places: Any
    ghosts: Ghosts | None

    @property
    def mean(self) -> Any:
        """The mean of the values that count."""
        return self.centre + self.off

    def spread(self, v: Any) -> Any:
        """Give each sample what belongs to its ghost batch."""
        return v if self.ghosts is None else ops.take(v, self.ghosts.numbers, axis=0)

    def whole(self) -> tuple[Any, Any, Any]:
        """Return count, mean and biased variance of all ghost batches together, merged by count; constants."""
        count, off, variance = self.count, ops.stop_gradient(self.off), ops.stop_gradient(self.variance)
        if self.ghosts is None:
            return count, self.centre + off, variance
        total = ops.sum(count, axis=0, keepdims=True)
        filled = _filled(total)
        middle = ops.sum(count * self.centre, axis=0, keepdims=True) / filled
        d = (self.centre - middle) + off
        m2 = ops.sum(count * (variance + d * d), axis=0, keepdims=True)
        s = ops.sum(count * d, axis=0, keepdims=True)
        return total, middle + s / filled, (m2 - s * s / filled) / filled


def ghosts_of(samples: Any, size: int | None) -> Ghosts | None:
    """Cut a batch into ghost batches of ``size``; a last one of a single sample joins its neighbour.

    Args:
        samples: how many; a tensor where that is not known while the graph is made.
        size: ``None`` for no ghost batches.
    """
    if size is None:
        return None
    if isinstance(samples, int):
        count = len(ghost_batches(samples, size))
        return None if count == 1 else Ghosts(np.minimum(np.arange(samples) // size, count - 1), count)
    whole, rest = samples // size, samples % size
    count = ops.maximum(whole + ops.cast(rest > 1, whole.dtype), 1)
    return Ghosts(ops.minimum(ops.arange(samples) // size, count - 1), count)


def measure(
    x: Any, axes: tuple[int, ...], weight: Any | None = None, ghosts: Ghosts | None = None, total: Total | None = None
) -> Batch:
    """Measure a batch over ``axes``.

    ::

        c = Σ w·x / Σ w         d = x - c         mean = c + Σ w·d / Σ w         variance = (Σ w·d² - (Σ w·d)² / Σ w) / Σ w

    The result does not depend on ``c``, so it is a constant for the gradients, and only the second pair of sums has any. What
    rounding has done to ``c`` is taken out of mean, variance and centred values by the sum of ``d``.

    Args:
        x: in float32 or wider.
        axes: all but that of the channels.
        weight: as `weighing.weights_of` gives it.
        ghosts: statistics of their own for parts of the batch.
        total: sums over replicas.
    """

    def summed(*values: Any) -> list[Any]:
        sums = [_sum(v, axes, ghosts) for v in values]
        return sums if total is None else total(sums)

    known = total is None and None not in x.shape
    if weight is None and known and ghosts is None:
        (first,) = summed(ops.stop_gradient(x))
        count = places = _size(x, axes)
    elif weight is None:
        ones = ops.ones([n if i in axes else 1 for i, n in enumerate(ops.shape(x))], dtype=x.dtype)
        first, count = summed(ops.stop_gradient(x), ones)
        places = _size(x, axes) if known else ops.sum(count)
    else:
        counted, weight = weight != 0, ops.stop_gradient(weight)
        values = ops.where(counted, ops.stop_gradient(x), ops.zeros_like(x))
        first, count, places = summed(weight * values, weight, ops.cast(counted, x.dtype))
        places = ops.max(ops.sum(places, axis=0)) if ghosts is not None else ops.max(places)
    filled = _filled(count)
    centre = ops.stop_gradient(first / filled)
    batch = Batch(x, centre, centre, centre, count, places, ghosts)
    d = x - batch.spread(centre)
    wd, counting = d, d
    if weight is not None:
        # values that do not count may be NaN
        counting = ops.where(counted, d, ops.zeros_like(d))
        wd = weight * counting
    s, m2 = summed(wd, wd * counting)
    off = s / filled
    variance = (m2 - s * off) / filled
    # rounding may leave less than nothing
    variance = ops.where(variance < 0, ops.zeros_like(variance), variance)
    return batch._replace(centred=d - batch.spread(off), off=off, variance=variance)


def _sum(v: Any, axes: tuple[int, ...], ghosts: Ghosts | None) -> Any:
    if ghosts is None:
        return ops.sum(v, axis=axes, keepdims=True)
    within = tuple(i for i in axes if i != 0)
    each = ops.sum(v, axis=within, keepdims=True) if within else v
    return ops.segment_sum(each, ghosts.numbers, num_segments=ghosts.count)


def _size(x: Any, axes: tuple[int, ...]) -> int:
    return int(np.prod([x.shape[i] for i in axes]))


def _filled(count: Any) -> Any:
    """Return a count that can be divided by."""
    return max(count, 1) if isinstance(count, int) else ops.where(count == 0, ops.ones_like(count), count)
