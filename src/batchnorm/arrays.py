"""The few things the definition asks of an array library that the array API standard leaves open."""

import sys
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from batchnorm.errors import OptionError, ShapeError

__all__ = ["Array", "constant", "expand", "namespace", "reduced_axes", "to_numpy", "where", "widen"]

Array = Any
"""An array of any library that `array_api_compat` knows: NumPy, torch, JAX, ..."""


# compilers that follow Python can read a dict, but warn of the cache that the other library keeps
_namespaces: dict[type, Any] = {}


def namespace(x: Array) -> Any:
    """Return the array API namespace of ``x`` (``array_api_compat.torch`` for a torch tensor, and so on)."""
    found = _namespaces.get(type(x))
    if found is None:
        found = _namespaces[type(x)] = array_api_compat.array_namespace(x)
    return found


def to_numpy(x: Array) -> np.ndarray:
    """Return ``x`` as a NumPy array in float64, from any device."""
    x = widen(constant(x))
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def widen(x: Array) -> Array:
    """Return ``x`` in float64, or in the widest floating dtype that its library has switched on."""
    xp = namespace(x)
    if not xp.isdtype(x.dtype, "real floating"):
        raise ShapeError(f"batch normalization needs floating point values, got dtype {x.dtype}: convert first")
    # JAX has float64 only where jax_enable_x64 is set
    dtypes = xp.__array_namespace_info__().dtypes(kind="real floating")
    return xp.astype(x, dtypes.get("float64", xp.float32))


def constant(x: Array) -> Array:
    """Return ``x`` as a constant: no gradient passes through it."""
    if hasattr(x, "detach"):
        return x.detach()
    if array_api_compat.is_jax_array(x):
        return sys.modules["jax"].lax.stop_gradient(x)
    return x


def where(condition: Any, then: Array, otherwise: Array) -> Array:
    """Choose by a Python bool or, elementwise, by an array of bools."""
    if isinstance(condition, bool):
        return then if condition else otherwise
    return namespace(condition).where(condition, then, otherwise)


def reduced_axes(axes: str | int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Resolve ``'spatial'``, ``'per-activation'`` or integers to the sorted axes that statistics are taken over.

    ``'spatial'`` is every axis but 1, the channels; ``'per-activation'`` is axis 0 alone.

    Raises:
        OptionError: an unknown word, no axis at all, or an axis out of range.
    """
    if isinstance(axes, str):
        named = {"spatial": (0, *range(2, ndim)), "per-activation": (0,)}
        if axes not in named:
            raise OptionError(f"axes must be 'spatial', 'per-activation' or integers, got {axes!r}")
        return named[axes]
    given = (axes,) if isinstance(axes, int) else tuple(int(a) for a in axes)
    if not given or any(not -ndim <= a < ndim for a in given):
        raise OptionError(f"axes must name at least one axis of an array of {ndim} dimensions, got {given}")
    return tuple(sorted({a % ndim for a in given}))


def expand(v: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """Reshape ``v``, which has the axes of ``x`` that are not in ``axes``, so that it broadcasts against ``x``.

    Raises:
        ShapeError: ``v`` has another shape.
    """
    kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    if tuple(v.shape) != kept:
        raise ShapeError(
            f"a per-channel array must have the shape {kept} of the axes that are kept "
            f"(input {tuple(x.shape)}, statistics over axes {axes}), got {tuple(v.shape)}"
        )
    return namespace(x).reshape(v, tuple(1 if i in axes else n for i, n in enumerate(x.shape)))
