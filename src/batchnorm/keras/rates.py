"""How fast an optimizer turns the kernels of linear layers."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras.internals import as_array, inner_optimizers, optimizer_of, own_variables
from batchnorm.keras.linear import has_kernel
from batchnorm.keras.naming import names_of
from batchnorm.states import Rate

__all__ = ["rates"]


def rates(model: Any, optimizer: Any, layers: Sequence[str] = ()) -> list[Rate]:
    """Return learning rate and length of the kernels of linear layers that are trained; Keras keeps no gradients.

    Args:
        model: a Keras model.
        optimizer: of Keras.
        layers: dotted names; empty for all dense layers and convolutions.

    Raises:
        OptionError: no optimizer of Keras, or one that was built for other weights.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise OptionError(f"optimizer must be a keras.optimizers.Optimizer, got a {type(optimizer).__name__}")
    held = {id(v) for inner in inner_optimizers(optimizer) for v in inner._trainable_variables}
    if optimizer.built and not any(id(v) in held for v in model.trainable_variables):
        raise OptionError("optimizer must hold weights of the model, it holds none of them")
    return [
        Rate(name, _step(optimizer, kernels[0]), _length(kernels))
        for layer, name in names_of(model).items()
        if has_kernel(layer) and (not layers or name in layers) and (kernels := _kernels(layer))
    ]


def _step(optimizer: Any, kernel: Any) -> float:
    return float(as_array(optimizer_of(optimizer, kernel).learning_rate))


def _kernels(layer: Any) -> list[Any]:
    return [v for v in own_variables(layer) if v.trainable and len(v.shape) > 1]


def _length(kernels: list[Any]) -> float:
    return float(np.sqrt(sum(np.square(as_array(v.value).astype(np.float64)).sum() for v in kernels)))
