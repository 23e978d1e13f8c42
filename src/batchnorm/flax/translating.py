"""A layer of Flax, in both of its styles, as one without a framework, and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from batchnorm.errors import OptionError
from batchnorm.graph import Norm
from batchnorm.portable import Portable

__all__ = ["FlaxLayer", "layer", "nnx_layer", "portable"]

_LEFT_OUT = ("axis_name", "axis_index_groups")


class FlaxLayer(NamedTuple):
    """A layer of ``flax.linen``: ``layer.module.apply(layer.variables, x, use_running_average=True)``.

    Args:
        module: a ``flax.linen.BatchNorm``.
        variables: ``{"params": {"scale": ..., "bias": ...}, "batch_stats": {"mean": ..., "var": ...}}``.
    """

    module: Any
    variables: dict[str, dict[str, Any]]


def portable(given: Any) -> Portable:
    """Return what a layer stores and does.

    Args:
        given: ``(module, variables)`` of linen, where arguments of its constructor may stand for the module; or a
            ``flax.nnx.BatchNorm``.

    Raises:
        OptionError: no batch normalization, or variables that it can't have.
    """
    if isinstance(given, tuple):
        return _of_linen(*given)
    if isinstance(given, linen.Module):
        raise OptionError("a layer of linen must be given with its variables, (module, variables)")
    if not isinstance(given, nnx.BatchNorm) or type(given).__call__ is not nnx.BatchNorm.__call__:
        raise OptionError(f"a layer of Flax must be BatchNorm, got a {type(given).__name__}")
    held = {"scale": given.scale, "bias": given.bias, "mean": given.mean, "var": given.var}
    arrays = {name: v[...] for name, v in held.items() if v is not None}
    return _portable("Flax nnx BatchNorm", given, arrays)


def _of_linen(module: Any, variables: Any) -> Portable:
    if isinstance(module, Mapping):
        try:
            module = linen.BatchNorm(**module)
        except TypeError as error:
            raise OptionError(f"the arguments must be those of flax.linen.BatchNorm: {error}") from error
    if not isinstance(module, linen.BatchNorm) or type(module).__call__ is not linen.BatchNorm.__call__:
        raise OptionError(f"a layer of Flax must be BatchNorm, got a {type(module).__name__}")
    wanted = {"params": [*["scale"] * module.use_scale, *["bias"] * module.use_bias], "batch_stats": ["mean", "var"]}
    arrays: dict[str, Any] = {}
    for collection, names in wanted.items():
        found = variables.get(collection, {}) if isinstance(variables, Mapping) else {}
        if not isinstance(found, Mapping) or set(found) != set(names):
            raise OptionError(
                f"the variables must hold {collection} with {', '.join(names) or 'nothing'}, for a layer with use_scale="
                f"{module.use_scale} and use_bias={module.use_bias}, got {', '.join(map(str, found)) or 'nothing'}"
            )
        arrays |= {name: found[name] for name in names}
    return _portable("Flax BatchNorm", module, arrays)


def _portable(kind: str, module: Any, arrays: dict[str, Any]) -> Portable:
    if not isinstance(module.axis, int):
        raise OptionError(f"a layer of Flax must have one axis of channels, got axis={module.axis}")
    numbers = {name: np.array(v, np.float64) for name, v in arrays.items()}
    shapes = {name: v.shape for name, v in numbers.items()}
    if numbers["mean"].ndim != 1 or len(set(shapes.values())) != 1:
        raise OptionError(f"a layer of Flax must hold one number for each channel, got arrays of shapes {shapes}")
    norm = Norm(
        str(getattr(module, "name", None) or ""), numbers["mean"], numbers["var"], numbers.get("scale"), numbers.get("bias"),
        float(module.epsilon), decay=float(module.momentum), unbiased=False,
    )  # fmt: skip
    statistics = str(arrays["mean"].dtype)
    own = next((arrays[name] for name in ("scale", "bias") if name in arrays), None)
    return Portable(
        kind,
        norm,
        statistics if own is None else str(own.dtype),
        statistics,
        computes="" if module.dtype is None else str(jnp.dtype(module.dtype)),
        axis=module.axis,
        options={name: getattr(module, name) for name in _LEFT_OUT if getattr(module, name) is not None},
    )


def layer(given: Portable, *, axis: int | None) -> FlaxLayer:
    """Return a new layer of ``flax.linen`` with its variables.

    Raises:
        OptionError: Flax has no such layer.
    """
    options, arrays = _prepared(given, axis)
    module = linen.BatchNorm(
        use_running_average=True if given.frozen else None, force_float32_reductions=given.dtype != "float64", **options
    )
    variables = {"batch_stats": {name: arrays.pop(name) for name in ("mean", "var")}}
    # a layer without γ and β has no such collection
    return FlaxLayer(module, {"params": arrays, **variables} if arrays else variables)


def nnx_layer(given: Portable, *, axis: int | None) -> Any:
    """Return a new ``flax.nnx.BatchNorm``.

    Raises:
        OptionError: Flax has no such layer.
    """
    options, arrays = _prepared(given, axis)
    made = nnx.BatchNorm(given.channels, use_running_average=given.frozen, rngs=nnx.Rngs(0), **options)
    made.mean, made.var = nnx.BatchStat(arrays["mean"]), nnx.BatchStat(arrays["var"])
    for name in ("scale", "bias"):
        if name in arrays:
            setattr(made, name, nnx.Param(arrays[name]))
    return made


def _prepared(given: Portable, axis: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a constructor, and the arrays; say what goes on in another way."""
    target = "BatchNorm of Flax"
    given.taken(set(_LEFT_OUT) | {"on_single"}, target)
    (mean, variance), norm = given.statistics(target), given.norm
    options = {
        "axis": given.place() if axis is None else axis,
        "momentum": given.decay(target),
        "epsilon": norm.eps,
        "dtype": given.computes or None,
        "param_dtype": jnp.dtype(given.dtype),
        "use_scale": norm.gamma is not None,
        "use_bias": norm.beta is not None,
        # E[x²] - E[x]² cancels
        "use_fast_variance": False,
        **{name: given.options[name] for name in _LEFT_OUT if name in given.options},
    }
    wide = "float64" if given.statistics_dtype == "float64" else "float32"
    named = (
        ("mean", mean, wide),
        ("var", variance, wide),
        ("scale", norm.gamma, given.dtype),
        ("bias", norm.beta, given.dtype),
    )
    arrays = {name: _exact(given, values, dtype) for name, values, dtype in named if values is not None}
    given.note_variance(target, "Flax has no other: translate back with unbiased=True")
    if given.frozen:
        given.notes.append(
            "it is frozen, Flax has use_running_average=True for it: keep γ and β out of the optimizer yourself"
        )
    return options, arrays


def _exact(given: Portable, values: np.ndarray, dtype: str) -> Any:
    if dtype == "float64" and jnp.zeros(0).dtype != "float64":
        raise OptionError(
            f"{given.named} holds float64, which JAX stores as float32: switch float64 on "
            "(jax.config.update('jax_enable_x64', True)), or convert the layer to float32 first"
        )
    return jnp.asarray(values, jnp.dtype(dtype))
