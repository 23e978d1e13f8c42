"""One step of training in a copy of a Keras model, and what it shows of batch normalization."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras.internals import as_array, quietly, told
from batchnorm.keras.naming import names_of, norms_of

__all__ = ["Seen", "train_once"]

Values = dict[str, list[np.ndarray]]


class Seen(NamedTuple):
    """What a step has shown.

    Args:
        calls: of each layer in the forward pass, by its name.
        twice: the layers whose statistics moved once more in the backward pass.
    """

    calls: dict[str, int]
    twice: tuple[str, ...]


def train_once(model: Any, copy: Any, inputs: Any) -> Seen:
    """Run a copy of a model forward in training, and backward on torch: elsewhere a recomputed call has no effect.

    It draws random numbers and takes gradients: see `leaving_random`.

    Args:
        model: the user's, which stays as it is.
        copy: shares no layer with it.
        inputs: as the model takes them.

    Raises:
        OptionError: the copy shares layers with the model, or fails.
    """
    if {id(layer) for layer in names_of(model)} & {id(layer) for layer in names_of(copy)}:
        raise OptionError("a model must be copied to be trained, and it holds layers in a way that can't be copied")
    norms = norms_of(copy)
    with quietly(), keras.StatelessScope(collect_losses=True) as scope, _counted(norms) as calls:
        try:
            outputs = copy(inputs, training=True)
            before, counts = _moved(norms, scope), dict(calls)
            if keras.backend.backend() == "torch":
                _backward(copy, keras.tree.flatten(outputs))
        except Exception as error:
            raise OptionError(f"the model must train on the example, but it failed: {told(error)}") from error
        after = _moved(norms, scope)
    twice = [name for name in before if not all(map(np.array_equal, before[name], after[name]))]
    return Seen(counts, tuple(twice))


@contextmanager
def _counted(norms: dict[Any, str]) -> Iterator[Counter[str]]:
    """Count the calls of layers of a copy."""
    calls: Counter[str] = Counter(dict.fromkeys(norms.values(), 0))

    def watched(call: Any, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return run

    for layer, name in norms.items():
        # past Keras, which would track what is set
        vars(layer)["call"] = watched(layer.call, name)
    yield calls


def _moved(norms: dict[Any, str], scope: Any) -> Values:
    """Return the statistics of layers as they stand in a scope."""
    return {
        name: [as_array(_current(v, scope)).copy() for v in (layer.moving_mean, layer.moving_variance)]
        for layer, name in norms.items()
    }


def _current(variable: Any, scope: Any) -> Any:
    found = scope.get_current_value(variable)
    return variable.value if found is None else found


def _backward(copy: Any, outputs: list[Any]) -> None:
    """Make the backward pass of the sum of all outputs; gradients are not kept anywhere."""
    import torch

    weights = [v.value for v in copy.trainable_variables if v.value.requires_grad]
    ends = [y.sum() for y in outputs if torch.is_tensor(y) and y.requires_grad]
    # in this very thread, in which the scope holds
    with torch.autograd.set_multithreading_enabled(False):
        if weights and ends:
            torch.autograd.grad(ends, weights, allow_unused=True)
