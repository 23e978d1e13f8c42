"""A linear layer takes Affines into its weights: the arithmetic, in float64, for every layout of weights."""

from typing import Any

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import Array, namespace, widen
from batchnorm.graph import Layout

__all__ = ["absorbed", "loss"]


def absorbed(
    weight: Array, bias: Array | None, layout: Layout, before: Affine | None, after: Affine | None
) -> tuple[Array, Array]:
    """Return weight and bias, in float64, of the linear layer ``x -> after(W · before(x) + b)``.

    ::

        W'[o, i] = after.scale[o] · W[o, i] · before.scale[i]
        b'[o]    = after.scale[o] · (b[o] + Σ_i W[o, i] · before.shift[i]) + after.shift[o]

    Args:
        weight: of any library, with the axes that ``layout`` tells; sums over i run over the places of a kernel too.
        bias: ``(O,)``, ``None`` for 0.
        layout: where the channels are in ``weight``.
        before: on the input channels ``(I,)``; its shift counts where every output sees every weight.
        after: on the output channels ``(O,)``.

    Reference:
        Jacob et al., 2018 (arXiv:1712.05877), section 3.2, for ``after``.
    """
    # a NaN stays one, and is noticed by its channel; the copy is our own, and large: it is multiplied where it lies
    with np.errstate(invalid="ignore"):
        w = widen(weight)
    xp = namespace(w)
    shape = w.shape
    if layout.shape is not None:
        w = xp.reshape(w, layout.shape)
    outputs = w.shape[layout.out_axis] * (layout.groups if layout.grouped == "in" else 1)
    b = xp.zeros((outputs,), dtype=w.dtype, device=w.device) if bias is None else widen(bias)
    if before is not None:
        if before.shift.any():
            b = b + _sum_to_outputs(w, layout, _on_inputs(before.shift, w, layout))
        w *= _on_inputs(before.scale, w, layout)
    if after is not None:
        w *= _on_outputs(after.scale, w, layout)
        b = b * _like(after.scale, w) + _like(after.shift, w)
    return xp.reshape(w, shape), b


def loss(wide: Array, dtype: Any, layout: Layout) -> float:
    """Return how much of a channel's largest weight is lost in ``dtype``: infinity beyond its range, much near its end.

    A weight is rounded to a relative eps / 2, or to half of the smallest number that the dtype has.
    """
    xp = namespace(wide)
    w = wide if layout.shape is None else xp.reshape(wide, layout.shape)
    out = layout.out_axis % w.ndim
    if layout.grouped == "in":
        into = layout.in_axis % w.ndim
        w = xp.reshape(xp.moveaxis(w, into, 0), (layout.groups, -1, *(n for i, n in enumerate(w.shape) if i != into)))
        out = out + 1 if out > into else out + 2
    kept = (0, out) if layout.grouped == "in" else (out,)
    axes = tuple(i for i in range(w.ndim) if i not in kept)
    # no array of magnitudes: weights may be large
    largest = xp.maximum(xp.max(w, axis=axes), -xp.min(w, axis=axes)) if axes else xp.abs(w)
    tiny, eps, end = (float(v) for v in (xp.finfo(dtype).smallest_normal, xp.finfo(dtype).eps, xp.finfo(dtype).max))
    if not bool(xp.all(largest <= end)):
        return float("inf")
    return tiny * eps / 2 / float(xp.min(xp.where(largest > 0, largest, end)))


def _like(v: np.ndarray, w: Array) -> Any:
    xp = namespace(w)
    return xp.asarray(np.array(v), dtype=w.dtype, device=w.device)


def _on_inputs(v: np.ndarray, w: Array, layout: Layout) -> Any:
    """Lay a vector over the input channels so that it broadcasts against the weight."""
    if layout.grouped == "in":
        return _laid(v, w, layout.in_axis)
    return _laid_by_group(v, w, layout, layout.out_axis, layout.in_axis)


def _on_outputs(v: np.ndarray, w: Array, layout: Layout) -> Any:
    """Lay a vector over the output channels so that it broadcasts against the weight."""
    if layout.grouped == "out":
        return _laid(v, w, layout.out_axis)
    return _laid_by_group(v, w, layout, layout.in_axis, layout.out_axis)


def _laid(v: np.ndarray, w: Array, axis: int) -> Any:
    shape = [1] * w.ndim
    shape[axis] = -1
    return _like(v.reshape(shape), w)


def _laid_by_group(v: np.ndarray, w: Array, layout: Layout, whole: int, single: int) -> Any:
    """Lay a vector over the axis that holds one group's channels; the other axis tells the group."""
    if layout.groups == 1:
        return _laid(v, w, single)
    members = w.shape[whole] // layout.groups
    table = np.repeat(v.reshape(layout.groups, -1), members, axis=0)
    shape = [1] * w.ndim
    shape[whole], shape[single] = table.shape
    # rows are the whole axis: swapped where it comes second
    swapped = whole % w.ndim > single % w.ndim
    return _like((table.T if swapped else table).reshape(shape), w)


def _sum_to_outputs(w: Array, layout: Layout, factor: Any) -> Any:
    """Sum a weight over all axes but the output channels: ``(O,)``."""
    xp = namespace(w)
    product = w * factor
    out, into = layout.out_axis % w.ndim, layout.in_axis % w.ndim
    if layout.grouped == "out":
        return xp.sum(product, axis=tuple(i for i in range(w.ndim) if i != out))
    kernel = tuple(i for i in range(w.ndim) if i not in (out, into))
    table = xp.sum(product, axis=kernel) if kernel else product
    table = table if into < out else table.T
    groups = xp.reshape(table, (layout.groups, -1, table.shape[1]))
    return xp.reshape(xp.sum(groups, axis=1), (-1,))
