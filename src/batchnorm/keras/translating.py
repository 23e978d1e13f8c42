"""A Keras layer as one without a framework, and back."""

from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.graph import Norm
from batchnorm.keras.internals import as_array, found_class
from batchnorm.keras.naming import numbers_of
from batchnorm.keras.normalization import BatchNormalization
from batchnorm.portable import Portable

__all__ = ["layer", "portable"]

_OWN = ("virtual_batch_size", "debias", "on_single")
_WEIGHTS = ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")


def portable(given: Any) -> Portable:
    """Return what a layer stores and does.

    Raises:
        OptionError: no batch normalization, one that is not built, or one that computes something else.
    """
    name = type(given).__name__
    if not isinstance(given, keras.layers.BatchNormalization) or found_class(given) is None:
        raise OptionError(f"a Keras layer must be BatchNormalization, Keras's or ours, got a {name}")
    if not given.built:
        raise OptionError(f"layer {given.name!r} must be built, so that it holds numbers: call it once first")
    mean, variance, gamma, beta = numbers_of(given)
    ours, updates = isinstance(given, BatchNormalization), getattr(given, "updates", None)
    ndim, dtype = given.input_spec.ndim, _dtype(given.moving_mean)
    return Portable(
        f"Keras {name}",
        Norm(
            given.name, mean, variance, gamma, beta, given.epsilon, decay=given.momentum, unbiased=ours and given.unbiased
        ),
        _dtype(given.gamma if given.gamma is not None else given.moving_mean),
        dtype,
        computes=given.compute_dtype if given.compute_dtype != dtype else "",
        dims=max(0, ndim - 2),
        axis=-1 if given.axis % ndim == ndim - 1 else given.axis % ndim,
        frozen=not given.trainable,
        updates=None if updates is None else int(as_array(updates.value)),
        options=_options(given, ours),
    )  # fmt: skip


def _options(given: Any, ours: bool) -> dict[str, Any]:
    options = {name: value for name in _WEIGHTS if (value := getattr(given, name)) is not None}
    if given.renorm:
        options["renorm"] = True
    if given.synchronized:
        options["synchronized"] = True
    if ours:
        # on_single has another default elsewhere
        options |= {name: value for name in _OWN if (value := getattr(given, name)) or name == "on_single"}
    return options


def layer(given: Portable, *, plain: bool, axis: int | None) -> Any:
    """Return a new layer, built.

    Args:
        given: what it shall store and do.
        plain: of Keras's own class, and not of ours.
        axis: of the channels; ``None`` for that of the layer it comes from, or the last.

    Raises:
        OptionError: Keras has no such layer.
    """
    target = "Keras's own layer" if plain else "the Keras layer"
    known = {*_WEIGHTS, "on_single", "synchronized"} if plain else {*_WEIGHTS, *_OWN, "synchronized"}
    options, (mean, variance), ndim = given.taken(known, target), given.statistics(target), given.rank(target)
    place = given.place() if axis is None else axis
    if not -ndim < place < ndim or place == 0:
        raise OptionError(f"axis must be one of the {ndim} axes of the data, and not that of the samples, got {axis}")
    if plain:
        options.pop("on_single", None)
        given.note_variance(target, "plain=False keeps the convention")
    else:
        options["unbiased"] = bool(given.norm.unbiased)
    norm, made = given.norm, keras.layers.BatchNormalization if plain else BatchNormalization
    layer = made(
        place, given.decay(target), norm.eps, center=norm.beta is not None, scale=norm.gamma is not None,
        dtype=_policy(given), trainable=not given.frozen, **options,
    )  # fmt: skip
    layer.build(tuple(given.channels if i == place % ndim else None for i in range(ndim)))
    pairs = (
        (layer.moving_mean, mean),
        (layer.moving_variance, variance),
        (layer.gamma, norm.gamma),
        (layer.beta, norm.beta),
    )
    for variable, values in pairs:
        if variable is not None:
            assert values is not None  # noqa: S101
            variable.assign(values)
            _check_exact(variable, values)
    if getattr(layer, "updates", None) is not None:
        # by which it forgets its initial values
        layer.updates.assign(given.updates or 0)
    return layer


def _policy(given: Portable) -> Any:
    """Return the dtype policy of a layer: statistics that are wider than γ and β make all of its variables wide."""
    stored = given.dtype if given.dtype == "float64" else given.statistics_dtype
    computes = given.computes or given.dtype
    if stored == computes:
        return stored
    if stored == "float32" and computes in ("float16", "bfloat16"):
        return f"mixed_{computes}"
    return stored


def _check_exact(variable: Any, values: np.ndarray) -> None:
    held = as_array(variable.value).astype(np.float64)
    if not np.array_equal(held, values, equal_nan=True):
        raise OptionError(
            f"the numbers of the layer are float64, which Keras on {keras.backend.backend()} stores as {_dtype(variable)}: "
            "switch float64 on (jax.config.update('jax_enable_x64', True)), or convert the layer to float32 first"
        )


def _dtype(variable: Any) -> str:
    return str(keras.backend.standardize_dtype(variable.dtype))
