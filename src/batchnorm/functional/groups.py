"""Normalization groups: a batch or its ghost batches, with what counts among their values."""

from collections.abc import Sequence
from typing import NamedTuple

from batchnorm.arrays import Array, expand, namespace, reduced_axes, widen
from batchnorm.errors import OptionError, ShapeError

__all__ = ["Axes", "Batch", "ghost_batches", "groups", "only_valid", "over_axes", "valid_weights"]

Axes = str | int | Sequence[int]


class Batch(NamedTuple):
    """One normalization group: values in float64, what counts among them, and how per-channel arrays meet them."""

    x: Array
    weight: Array | None
    axes: tuple[int, ...]

    def per_channel(self, v: Array | None, otherwise: float) -> Array | float:
        """Return a per-channel array in float64, shaped to meet the values."""
        return otherwise if v is None else expand(widen(v), self.x, self.axes)

    def total(self, v: Array) -> Array:
        """Sum over the group, for each channel."""
        return namespace(v).sum(v, axis=self.axes, keepdims=True)


def groups(
    x: Array, axes: Axes, mask: Array | None, sample_weight: Array | None, virtual_batch_size: int | None
) -> list[Batch]:
    """Return the normalization groups of ``x``: one, or its ghost batches."""
    reduced = reduced_axes(axes, x.ndim)
    if virtual_batch_size is not None and 0 not in reduced:
        raise OptionError(f"virtual_batch_size cuts axis 0, so axis 0 must be in axes, got axes {reduced}")
    # also out of the graph of derivatives: a NaN in the padding must not come back as 0 · NaN
    wide, weight = only_valid(widen(x), mask, reduced), valid_weights(x, reduced, mask, sample_weight)
    if virtual_batch_size is None:
        return [Batch(wide, weight, reduced)]
    return [
        Batch(wide[part], None if weight is None else weight[part], reduced)
        for part in ghost_batches(x.shape[0], virtual_batch_size)
    ]


def ghost_batches(samples: int, size: int | None) -> list[slice]:
    """Cut a batch into ghost batches of ``size``; the last may be smaller, but a single sample joins its neighbour.

    Raises:
        OptionError: ``size`` is below two.

    Example:
        >>> [(s.start, s.stop) for s in ghost_batches(9, 4)]
        [(0, 4), (4, 9)]
    """
    if size is None or samples <= (size if size >= 2 else 0):
        return [slice(0, samples)]
    if size < 2:
        raise OptionError(f"virtual_batch_size must be at least 2 samples, got {size}")
    starts = list(range(0, samples, size))
    if samples - starts[-1] == 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], samples], strict=True)]


def valid_weights(x: Array, axes: tuple[int, ...], mask: Array | None, sample_weight: Array | None) -> Array | None:
    """Return mask times weights, of full size along the reduced axes and of size 1 along the others."""
    wide = widen(x[:0]).dtype
    weight = None if mask is None else namespace(x).astype(over_axes(mask, x, axes, "mask"), wide)
    if sample_weight is not None:
        if sample_weight.ndim == 1:
            first = [1] * len(axes)
            first[0] = sample_weight.shape[0]
            sample_weight = namespace(x).reshape(sample_weight, tuple(first))
        frequency = namespace(x).astype(over_axes(sample_weight, x, axes, "sample_weight"), wide)
        weight = frequency if weight is None else weight * frequency
    return weight


def only_valid(values: Array, mask: Array | None, axes: tuple[int, ...]) -> Array:
    """Put 0 where the mask is false."""
    if mask is None:
        return values
    xp = namespace(values)
    return xp.where(over_axes(mask, values, axes, "mask"), values, xp.zeros_like(values))


def over_axes(v: Array, x: Array, axes: tuple[int, ...], name: str) -> Array:
    """Broadcast ``v`` to the reduced axes of ``x`` and give it size 1 along the others."""
    xp, sizes = namespace(x), tuple(x.shape[i] for i in axes)
    if name == "mask" and not xp.isdtype(v.dtype, "bool"):
        raise ShapeError(f"mask must be bool, true where a value is valid, got dtype {v.dtype}")
    shape = (1,) * (len(sizes) - v.ndim) + tuple(v.shape)
    if len(shape) > len(sizes) or any(a not in (1, b) for a, b in zip(shape, sizes, strict=True)):
        raise ShapeError(
            f"{name} must broadcast to {sizes}, the reduced axes {axes} of an input of shape {tuple(x.shape)}, "
            f"got {tuple(v.shape)}"
        )
    full = xp.broadcast_to(xp.reshape(v, shape), sizes)
    return xp.reshape(full, tuple(n if i in axes else 1 for i, n in enumerate(x.shape)))
