"""How the batch normalization layers of a Keras model stand, and setting them right in place."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from batchnorm.errors import OptionError
from batchnorm.keras.internals import as_array, forget_compiled
from batchnorm.keras.naming import hard_wired, norms_of, numbers_of
from batchnorm.keras.normalization import LONG
from batchnorm.states import Mend, NormState

__all__ = ["HALF", "mend", "states"]

HALF = ("float16", "bfloat16")


def states(model: Any) -> list[NormState]:
    """List the layers in the order in which the model holds them.

    Raises:
        OptionError: a layer that is not built.
    """
    names, wired = norms_of(model), hard_wired(model)
    trained = {id(variable) for variable in model.trainable_variables}
    return [_state(layer, names, trained, by_batch=id(layer) in wired) for layer in names]


def _state(layer: Any, names: Mapping[Any, str], trained: set[int], *, by_batch: bool) -> NormState:
    mean, variance, gamma, beta = numbers_of(layer)
    parameters = [v for v in (layer.gamma, layer.beta) if v is not None]
    return NormState(
        name=names[layer],
        kind=type(layer).__name__,
        mean=mean,
        variance=variance,
        gamma=gamma,
        beta=beta,
        eps=float(layer.epsilon),
        decay=float(layer.momentum),
        dtype=_dtype(layer),
        by_batch=by_batch and layer.trainable,
        # what fit() does, which overrides what the graph of a functional model says
        training=bool(layer.trainable),
        moves=bool(layer.trainable),
        trainable=any(id(v) in trained for v in parameters) if parameters else None,
        frozen=not layer.trainable,
        debiased=bool(getattr(layer, "debias", False)),
        updates=_updates(layer),
        synchronized=bool(getattr(layer, "synchronized", False)),
        ghost=getattr(layer, "virtual_batch_size", None),
        shared=_sharing(layer, names),
    )


def _dtype(layer: Any) -> str:
    return str(keras.backend.standardize_dtype(layer.moving_variance.dtype))


def _updates(layer: Any) -> int | None:
    """Return the steps that a layer has counted; one that was given statistics without a count does not know."""
    counter = getattr(layer, "updates", None)
    steps = None if counter is None else int(as_array(counter.value))
    return steps if steps is None or steps < LONG else None


def _sharing(layer: Any, names: Mapping[Any, str]) -> tuple[str, ...]:
    own = {id(layer.moving_mean), id(layer.moving_variance)}
    others = [other for other in names if other is not layer]
    return tuple(names[other] for other in others if own & {id(other.moving_mean), id(other.moving_variance)})


def mend(model: Any, mends: Mapping[str, Mend]) -> None:
    """Set layers right, all or none, and let what Keras has compiled of the model be compiled anew.

    Raises:
        OptionError: a name that no layer has, or what can't be mended in place.
    """
    layers = {name: layer for layer, name in norms_of(model).items()}
    wired = hard_wired(model)
    for name, wanted in mends.items():
        if name not in layers:
            raise OptionError(f"a layer to mend must be one of {_listed(layers)}, got {name!r}")
        reason = _why_not(layers[name], wanted, wired=id(layers[name]) in wired)
        if reason:
            raise OptionError(f"layer {name!r} can't be mended in place: {reason}")
    for name, wanted in mends.items():
        _set(layers[name], wanted)
    forget_compiled(model)


def _set(layer: Any, wanted: Mend) -> None:
    if wanted.decay is not None:
        layer.momentum = float(wanted.decay)
    if wanted.eps is not None:
        layer.epsilon = float(wanted.eps)
    if wanted.freeze:
        layer.trainable = False


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "those of the model, which has none"


def _why_not(layer: Any, wanted: Mend, *, wired: bool) -> str:
    """Return why a layer can't be mended like this; empty where it can."""
    if wanted.training is not None:
        if wired:
            return (
                "the graph of the model calls it with training=True: build the model again and call the layer without"
            )
        return "Keras has no modes, each call says how it is meant: call the model with training=True or training=False"
    if wanted.count_once:
        return (
            "keras.remat and keras.RematScope call it again in the backward pass: build the model with the layer outside of "
            "them"
        )
    if wanted.wide and _dtype(layer) in HALF:
        return (
            f"it stores its statistics in {_dtype(layer)}: build the model with dtype='mixed_{_dtype(layer)}', which "
            "stores them in float32, and give it the weights with set_weights(model.get_weights())"
        )
    return _why_not_numbers(wanted)


def _why_not_numbers(wanted: Mend) -> str:
    if wanted.decay is not None and not 0 <= wanted.decay <= 1:
        return f"the weight of the past must be between 0 and 1, got {wanted.decay}"
    if wanted.eps is not None and not 0 <= wanted.eps < float("inf"):
        return f"eps must be 0 or more, and finite, got {wanted.eps}"
    return ""
