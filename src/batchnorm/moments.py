"""Moments: count, mean and sum of squared deviations of a channel, and the one operation that combines them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from batchnorm.arrays import Array, namespace, reduced_axes, widen

__all__ = ["Moments"]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations, per channel.

    Parts of a data set (ghost batches, micro-batches, processes) are combined by `merge`. With ``d = mean_b - mean_a`` and
    ``n = n_a + n_b``::

        mean = mean_a + d · n_b / n            m2 = m2_a + m2_b + d² · n_a · n_b / n

    Only arithmetic is used: Python floats, NumPy, torch and JAX arrays all work, and gradients pass through.

    Args:
        count: number of values, or the sum of their weights; a number or an array that broadcasts against ``mean``.
        mean: ``(C,)``, in the unit of the values.
        m2: ``(C,)``, sum of ``(x - mean)²``, in the squared unit of the values.

    Example:
        >>> a, b = Moments(2, 1.5, 0.5), Moments(1, 6.0, 0.0)       # of 1, 2 and of 6
        >>> a.merge(b)
        Moments(count=3, mean=3.0, m2=14.0)
        >>> a.merge(b).variance == ((1 - 3)**2 + (2 - 3)**2 + (6 - 3)**2) / 3
        True

    Reference:
        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    count: Array
    mean: Array
    m2: Array

    @classmethod
    def empty(cls) -> Self:
        """Return the Moments of no values: the neutral element of `merge`."""
        return cls(0, 0.0, 0.0)

    @classmethod
    def of(cls, x: Array, axes: str | int | Sequence[int] = "spatial", weight: Array | None = None) -> Self:
        """Measure ``x`` in float64, centred, in two passes.

        ``mean = Σ w·x / Σ w`` and ``m2 = Σ w·(x - mean)² - (Σ w·(x - mean))² / Σ w``; the last term is zero in exact
        arithmetic and takes the rounding of the mean out. Values of weight zero are not looked at: they may be NaN.

        Args:
            x: ``(N, C, *spatial)`` or any array that ``axes`` makes sense for.
            axes: ``'spatial'``, ``'per-activation'`` or the axes to reduce.
            weight: frequencies of the values, broadcastable to ``x``.

        Raises:
            OptionError: ``axes`` does not fit ``x``.
            ShapeError: ``x`` does not hold floating point values.

        Example:
            >>> import numpy as np
            >>> Moments.of(np.array([[1., 10.], [2., 20.], [6., 60.]]))
            Moments(count=3, mean=array([ 3., 30.]), m2=array([  14., 1400.]))
        """
        axes, x = reduced_axes(axes, x.ndim), widen(x)
        xp = namespace(x)
        if weight is None:
            count = 1
            for axis in axes:
                count *= x.shape[axis]
            weighted = x
        else:
            sizes = tuple(n if i in axes else weight.shape[i] for i, n in enumerate(x.shape))
            weight = xp.broadcast_to(xp.astype(weight, x.dtype), sizes)
            count = xp.sum(weight, axis=axes)
            x = xp.where(weight == 0, xp.zeros_like(x), x)
            weighted = weight * x
        filled = count + (count == 0)
        mean = xp.sum(weighted, axis=axes) / filled
        d = x - xp.reshape(mean, tuple(1 if i in axes else n for i, n in enumerate(x.shape)))
        wd = d if weight is None else weight * d
        m2 = xp.sum(wd * d, axis=axes) - xp.sum(wd, axis=axes) ** 2 / filled
        return cls(count, mean, m2)

    def merge(self, *others: "Moments") -> "Moments":
        """Return the Moments of all the values together; an empty part changes nothing, to the last bit."""
        total = self
        for other in others:
            count = total.count + other.count
            d = other.mean - total.mean
            share = other.count / (count + (count == 0))
            total = Moments(count, total.mean + d * share, total.m2 + other.m2 + d * d * (total.count * share))
        return total

    @property
    def variance(self) -> Array:
        """The biased variance ``m2 / count`` that normalization uses; 0 where there is no value."""
        return self.m2 / (self.count + (self.count == 0))

    @property
    def unbiased_variance(self) -> Array:
        """The unbiased variance ``m2 / (count - 1)``, weights counted as frequencies; ``m2`` up to one value."""
        degrees = self.count - 1
        return self.m2 / (degrees + (degrees <= 0) * (1 - degrees))
