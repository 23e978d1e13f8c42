"""Which values of a batch count, and how much: masks and sample weights of any rank, checked."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from batchnorm.errors import OptionError, ShapeError
from batchnorm.keras.backends import at_hand

__all__ = ["weights_of"]

Sizes = Sequence[int | None]


def weights_of(x: Any, axis: int, mask: Any, sample_weight: Any) -> Any | None:
    """Return mask times weights as an array that meets ``x``: its size but for the channels; ``None`` where all count alike.

    A mask of floating numbers is a weight for each place; one of integers is true where it is not zero.

    Raises:
        ShapeError: what does not fit the places of ``x``.
        OptionError: weights that are negative or not finite, where their values are at hand.
    """
    if mask is None and sample_weight is None:
        return None
    given = {"sample_weight": sample_weight, "mask": mask}
    weight: Any = ops.ones((), dtype=x.dtype)
    for name, v in given.items():
        if v is None:
            continue
        number = name == "sample_weight" or keras.backend.is_float_dtype(keras.backend.standardize_dtype(v.dtype))
        if number:
            _check_values(v, name)
        factor = _over_places(ops.cast(v, x.dtype if number else "bool"), x.shape, axis, name)
        # a weight of a place that does not count may be NaN
        counted, factor = (factor != 0, factor * weight) if number else (factor, weight)
        weight = ops.where(counted, factor, ops.zeros_like(factor))
    channels = weight.shape[axis]
    return ops.broadcast_to(weight, [channels if i == axis else n for i, n in enumerate(ops.shape(x))])


def _over_places(v: Any, shape: Sizes, axis: int, name: str) -> Any:
    """Align ``v`` with the first axes of the places, the axes of the inputs without that of the channels."""
    places = [n for i, n in enumerate(shape) if i != axis]
    if 0 < len(v.shape) <= len(places) and _fits(v.shape, places):
        for _ in range(len(places) - len(v.shape)):
            v = ops.expand_dims(v, -1)
        return ops.expand_dims(v, axis)
    if name == "mask" and len(v.shape) == len(places) and _fits(v.shape, shape[:-1]):
        # as layers of Keras make them, which take the last axis for the features
        return ops.expand_dims(v, -1)
    raise ShapeError(
        f"{name} must have the shape of the inputs without the axis of the channels, {_shown(places)}, or the first axes of "
        f"it, for inputs of shape {_shown(shape)} with channels on axis {axis}, got {_shown(v.shape)}"
    )


def _fits(sizes: Sizes, wanted: Sizes) -> bool:
    return all(n in (1, None, m) or m is None for n, m in zip(sizes, wanted, strict=False))


def _shown(sizes: Sizes) -> str:
    return str(tuple(sizes))


def _check_values(v: Any, name: str) -> None:
    if not at_hand(v):
        return
    if not bool(ops.all(ops.logical_and(ops.isfinite(v), v >= 0))):
        least, most = float(ops.min(v)), float(ops.max(v))
        raise OptionError(f"{name} must be finite and not negative, got values from {least} to {most}")
