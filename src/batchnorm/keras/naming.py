"""What the layers of a Keras model are called, which of them normalize, and which are called with ``training=True``."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras.internals import as_array, calls, graph_of, parts

__all__ = ["hard_wired", "names_of", "norms_of", "numbers_of"]

Path = tuple[str, ...]


def names_of(model: Any) -> dict[Any, str]:
    """Return all layers inside of a model, each with the names of the models around it and its own, as ``"inner.bn"``.

    A layer that is used in several places has the name of the first. Of layers with one and the same name the later ones have a
    number behind it.
    """
    names: dict[Any, str] = {}
    taken: set[str] = set()
    for layer, path in _walk(model, (), set()):
        name, number = ".".join(path), 2
        while name in taken:
            name, number = f"{'.'.join(path)}_{number}", number + 1
        taken.add(name)
        names[layer] = name
    return names


def _walk(holder: Any, path: Path, seen: set[int]) -> Iterator[tuple[Any, Path]]:
    """Yield the layers of a model or layer with their paths, those of its graph first, in the order of their calls."""
    graph = graph_of(holder)
    called = [] if graph is None else [call.operation for call in calls(graph)]
    for inner in (*called, *getattr(holder, "_layers", getattr(holder, "operations", ()))):
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        own = (*path, inner.name)
        if isinstance(inner, keras.layers.Layer):
            yield inner, own
        yield from _walk(inner, own, seen)


def norms_of(model: Any) -> dict[Any, str]:
    """Return the ``BatchNormalization`` layers of a model in the order in which it holds them, with their names.

    Raises:
        OptionError: a layer that is not built.
    """
    names = names_of(model)
    held = dict.fromkeys((*parts(model), *names))
    found = {layer: names[layer] for layer in held if isinstance(layer, keras.layers.BatchNormalization)}
    for layer in found:
        if not layer.built:
            raise OptionError(
                f"layer {layer.name!r} must be built, so that it knows its channels: call the model once first"
            )
    return found


def numbers_of(norm: Any) -> list[np.ndarray | None]:
    """Return mean, variance, γ and β of a layer in float64, ``None`` for what it has not."""
    return [
        None if variable is None else as_array(variable.value).astype(np.float64)
        for variable in (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
    ]


def hard_wired(model: Any) -> set[int]:
    """Return the `id` of each layer that a functional graph calls with ``training=True``, if the caller says nothing else."""
    graph = graph_of(model)
    return set() if graph is None else set(_in_training(graph, None))


def _in_training(graph: Any, around: bool | None) -> Iterator[int]:
    for call in calls(graph):
        own = call.arguments.kwargs.get("training")
        asked = around if around is not None or not isinstance(own, bool | int) else bool(own)
        inner = graph_of(call.operation)
        if inner is not None:
            yield from _in_training(inner, asked)
        elif asked:
            yield from (id(part) for part in parts(call.operation))
