"""The softmax at the end of a network: taken off to be trained and compared on logits, and put back in what is shipped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.keras.internals import forget_compiled, graph_of

__all__ = ["PutBack", "are_probabilities", "bare", "take_off"]

PutBack = Callable[[Any], Any]

_SUM = 1e-4


def take_off(model: Any) -> tuple[Any, PutBack | None]:
    """Take the softmax off the end of a model.

    A layer that has it as its activation loses it, in place: the model must be nobody else's. A last layer that is nothing but
    a softmax is left out of the model that is returned.

    Args:
        model: a Sequential or functional model; anything else is returned as it is.

    Returns:
        The model that ends in logits, and what puts the softmax back into a model with the same end; ``None`` where no
        softmax was seen.
    """
    graph = graph_of(model)
    if graph is None or len(graph.outputs) != 1:
        return model, None
    owner = _last(model)
    if owner is not None and _has_softmax(owner):
        owner.activation = keras.activations.linear
        return model, _put_into_last
    history = graph.outputs[0]._keras_history
    last = history.operation
    if not _is_softmax(last):
        return model, None
    if isinstance(model, keras.Sequential):
        shorter = keras.Sequential([keras.Input(batch_shape=model.input_shape), *model.layers[:-1]], name=model.name)
    else:
        [logits] = last._inbound_nodes[history.node_index].input_tensors
        shorter = keras.Model(model.inputs, logits, name=model.name)
    return shorter, lambda other: _appended(other, last.name)


@contextmanager
def bare(model: Any) -> Iterator[Any]:
    """Give a model that gives the logits of ``model``; afterwards that is as it was."""
    logits, put_back = take_off(model)
    forget_compiled(logits)
    try:
        yield logits
    finally:
        if put_back is _put_into_last:
            put_back(model)


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether the rows of outputs look like those of a softmax."""
    return bool((outputs >= 0).all() and (np.abs(outputs.sum(-1) - 1) < _SUM).all())


def _last(model: Any) -> Any | None:
    """Return the operation that gives the output of a model, or of the last model inside of it."""
    graph = graph_of(model)
    while graph is not None and len(graph.outputs) == 1:
        operation = graph.outputs[0]._keras_history.operation
        graph = graph_of(operation)
        if graph is None:
            return operation
    return None


def _has_softmax(operation: Any) -> bool:
    """Whether a layer computes something, and then a softmax."""
    alone = isinstance(operation, keras.layers.Activation | keras.layers.Softmax)
    return not alone and getattr(operation, "activation", None) is keras.activations.softmax


def _is_softmax(operation: Any) -> bool:
    """Whether an operation is a softmax over the classes and nothing else."""
    if isinstance(operation, keras.layers.Activation):
        return operation.activation is keras.activations.softmax
    if type(operation) is keras.layers.Softmax or type(operation).__name__ == "Softmax":
        return getattr(operation, "axis", None) in (-1, 1)
    return False


def _put_into_last(model: Any) -> Any:
    layer = _last(model)
    assert layer is not None  # noqa: S101 - it was there before
    layer.activation = keras.activations.softmax
    # it may have run without
    forget_compiled(model)
    return model


def _appended(model: Any, name: str) -> Any:
    softmax = keras.layers.Softmax(name=name)
    if isinstance(model, keras.Sequential):
        return keras.Sequential([keras.Input(batch_shape=model.input_shape), *model.layers, softmax], name=model.name)
    return keras.Model(model.inputs, softmax(model.outputs[0]), name=model.name)
