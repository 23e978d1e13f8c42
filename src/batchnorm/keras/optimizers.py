"""What a Keras optimizer does to batch normalization, and taking its weight decay off."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras.internals import (
    as_array,
    excluded,
    forget_compiled,
    inner_optimizers,
    leave_out,
    optimizer_of,
    run_compiled,
)
from batchnorm.keras.naming import norms_of
from batchnorm.states import Optimization

__all__ = ["optimization", "spare"]


def optimization(model: Any, optimizer: Any) -> Optimization:
    """Return the weight decay of γ and β, with the L2 penalties of the layers, the steps, and the accumulation.

    A penalty l2 · γ² pulls as a weight decay of 2 · l2 does.

    Raises:
        OptionError: no optimizer of Keras, or one that was built for another model.
    """
    pairs = _parameters(model, optimizer)
    decayed: dict[str, float] = {}
    for name, variable in pairs:
        decay = _decay(optimizer, variable) + _penalty(variable)
        if decay > 0:
            decayed[name] = max(decay, decayed.get(name, 0.0))
    accumulations = {inner.gradient_accumulation_steps for inner in inner_optimizers(optimizer)}
    return Optimization(
        decayed=decayed,
        steps=int(as_array(optimizer.iterations)),
        accumulation=max((int(n) for n in accumulations if n), default=None),
    )


def spare(model: Any, optimizer: Any) -> int:
    """Exclude γ and β from weight decay beside what is excluded already, and return how many variables that were decayed.

    Raises:
        OptionError: no optimizer of this model, or one that can't be changed any more.
    """
    decayed = [v for _, v in _parameters(model, optimizer) if _decay(optimizer, v) > 0]
    owners = {id(owner): owner for owner in (optimizer_of(optimizer, v) for v in decayed)}
    reason = _why_not(model, optimizer, owners) if decayed else ""
    if reason:
        raise OptionError(f"the optimizer can't be changed: {reason}")
    for owner in owners.values():
        leave_out(owner, [v for v in decayed if optimizer_of(optimizer, v) is owner])
    if decayed:
        forget_compiled(model)
    return len(decayed)


def _why_not(model: Any, optimizer: Any, owners: Mapping[int, Any]) -> str:
    if not set(owners) <= {id(inner) for inner in inner_optimizers(optimizer)}:
        return "its optimizers are made by a function as they are needed; let that exclude γ and β from weight decay"
    if optimizer.built and run_compiled() and getattr(model, "optimizer", None) is not optimizer:
        return (
            "it was built, and a compiled step may hold its weight decay; call "
            "optimizer.exclude_from_weight_decay(var_names=['gamma', 'beta']) on a new one"
        )
    return ""


def _parameters(model: Any, optimizer: Any) -> list[tuple[str, Any]]:
    """Return γ and β of all layers that are trained, each with the name of its layer."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise OptionError(
            f"the optimizer of a Keras model must be a keras.optimizers.Optimizer, got a {type(optimizer).__name__}"
        )
    trained = {id(v) for v in model.trainable_variables}
    held = {id(v) for inner in inner_optimizers(optimizer) for v in inner._trainable_variables}
    if optimizer.built and trained and not trained & held:
        raise OptionError(
            "the optimizer must be that of the model, it was built with variables that are not the model's"
        )
    pairs = [(name, v) for layer, name in norms_of(model).items() for v in (layer.gamma, layer.beta)]
    return [(name, v) for name, v in pairs if v is not None and id(v) in trained]


def _decay(optimizer: Any, variable: Any) -> float:
    inner = optimizer_of(optimizer, variable)
    decay = float(inner.weight_decay or 0.0)
    return 0.0 if decay == 0 or excluded(inner, variable) else decay


def _penalty(variable: Any) -> float:
    l2 = getattr(getattr(variable, "regularizer", None), "l2", None)
    return 0.0 if l2 is None else 2 * float(np.asarray(as_array(l2)))
