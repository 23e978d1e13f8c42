"""Draw the neutral picture of a functional Keras graph by running it once, layer by layer."""

from dataclasses import dataclass, field
from typing import Any

import keras

from batchnorm.errors import OptionError
from batchnorm.graph import (
    Concat,
    Graph,
    Identity,
    Linear,
    Norm,
    Normalize,
    Operation,
    Other,
    Pool,
    Reshape,
    Value,
    Weights,
)
from batchnorm.keras import linear
from batchnorm.keras.internals import calls, found_class, graph_of, own_variables, parts, standardized, told
from batchnorm.keras.naming import names_of, numbers_of
from batchnorm.keras.vocabulary import activation, chain, merge

__all__ = ["Key", "Path", "Picture", "draw"]

Path = tuple[str, ...]
"""Names of the models around a layer, and its own."""


@dataclass(frozen=True, slots=True)
class Key:
    """What the wing knows a layer by in a model and in its copies; ``kernel`` is one of the kernels of a linear layer."""

    path: Path
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class _Flow:
    """An array of the run, and its place in the picture."""

    tensor: Any
    value: Value


@dataclass(slots=True)
class Picture:
    """What was seen in a run.

    Args:
        graph: the neutral picture.
        layers: the layers in the order of their first calls, with their paths and the shapes of their last outputs.
    """

    graph: Graph
    layers: dict[Any, tuple[Path, tuple[int, ...] | None]] = field(default_factory=dict)


def draw(model: Any, functional: Any, inputs: list[Any]) -> Picture:
    """Run a model in evaluation on tensors, one for each of its inputs, and return what was seen.

    Args:
        model: a Keras model.
        functional: the graph behind it.
        inputs: in the order of the inputs of the graph.
    """
    artist = _Artist(model)
    outputs = artist.run(functional, [_Flow(tensor, Value(tuple(tensor.shape))) for tensor in inputs], (), None)
    for flow in outputs:
        flow.value.pin("it is an output of the model")
    return artist.finish()


class _Artist:
    def __init__(self, model: Any) -> None:
        self.picture = Picture(Graph())
        self.graph = self.picture.graph
        self.norms: dict[int, Norm] = {}
        self.weights: dict[tuple[int, str], Weights] = {}
        self.seen: dict[int, Any] = {}
        self.opaque: dict[int, Any] = {}
        self.hidden: list[Norm] = []
        self.sharing = _sharing(model)
        self.names = names_of(model)

    def run(self, functional: Any, inputs: list[_Flow], path: Path, training: bool | None) -> list[_Flow]:
        """Run a graph; ``training`` is what the model around it is called with, ``None`` for nothing."""
        flows = {id(symbol): flow for symbol, flow in zip(functional.inputs, inputs, strict=True)}
        for call in calls(functional):
            given = [flows[id(symbol)] for symbol in call.input_tensors]
            filled = {id(symbol): flow.tensor for symbol, flow in zip(call.input_tensors, given, strict=True)}
            args, kwargs = call.arguments.fill_in(filled)
            asked = kwargs.get("training") if training is None else training
            own = (*path, call.operation.name)
            inner = graph_of(call.operation)
            enters = inner is not None and len(args) == 1 and not _given(kwargs) - {"training"}
            results = self._enter(inner, args[0], given, own, asked) if enters else None
            if results is None:
                results = self._run_one(call, args, kwargs, given, own, bool(asked))
            flows.update((id(symbol), flow) for symbol, flow in zip(call.outputs, results, strict=True))
        return [flows[id(symbol)] for symbol in functional.outputs]

    def _enter(
        self, inner: Any, inputs: Any, given: list[_Flow], path: Path, training: bool | None
    ) -> list[_Flow] | None:
        """Run a model inside of the model; ``None`` where it is not clear which input goes where."""
        tensors = standardized(inner, inputs)
        entering = []
        for tensor in tensors:
            found = [flow for flow in given if flow.tensor is tensor]
            found = found or (given if len(given) == len(tensors) == 1 else [])
            if not found:
                return None
            entering.append(self._adjusted(found[0], tensor, path))
        return self.run(inner, entering, path, training)

    def _adjusted(self, flow: _Flow, tensor: Any, path: Path) -> _Flow:
        """Follow an input into a model that squeezes it, or converts its dtype."""
        name, shape = ".".join(path), tuple(tensor.shape)
        kinds = [keras.backend.is_float_dtype(t.dtype) for t in (flow.tensor, tensor)]
        if kinds[0] != kinds[1]:
            return _Flow(tensor, self.graph.add(Other("a conversion of its dtype"), [flow.value], [shape], name)[0])
        if shape != flow.value.shape:
            return _Flow(tensor, self.graph.add(Reshape(), [flow.value], [shape], name)[0])
        return _Flow(tensor, flow.value)

    def _run_one(
        self, call: Any, args: Any, kwargs: Any, given: list[_Flow], path: Path, training: bool
    ) -> list[_Flow]:
        operation = call.operation
        if getattr(operation, "_call_has_training_arg", False):
            kwargs = {**kwargs, "training": False}
        try:
            outputs = keras.tree.flatten(operation(*args, **kwargs))
        except Exception as error:
            raise OptionError(
                f"the model must run on the example, but {'.'.join(path)} failed: {told(error)}"
            ) from error
        shapes = [tuple(tensor.shape) for tensor in outputs]
        known = self.seen.setdefault(id(operation), (operation, path))[1]
        if isinstance(operation, keras.layers.Layer):
            self.picture.layers[operation] = known, shapes[0] if len(shapes) == 1 else None
        values = self._draw(call, given, shapes, known, training)
        return [_Flow(tensor, value) for tensor, value in zip(outputs, values, strict=True)]

    # -- one call --------------------------------------------------------------------------------------------------

    def _draw(
        self, call: Any, given: list[_Flow], shapes: list[tuple[int, ...]], path: Path, training: bool
    ) -> list[Value]:
        operation, found = call.operation, None
        normalizes = isinstance(operation, keras.layers.BatchNormalization)
        data = _without_masks(call, given)
        values = [flow.value for flow in data]
        if len(shapes) != 1 or _given(call.arguments.kwargs) - {"training", "mask", "inputs", "x"}:
            pass
        elif normalizes and len(data) == 1 and found_class(operation) is not None:
            found = self._draw_norm(operation, data[0], path, training)
        elif len(data) == 1 and len(call.arguments.args) <= 1:
            found = self._draw_linear(operation, values[0], tuple(call.input_tensors[0].shape), shapes[0], path)
            found = found or self._draw_chain(operation, values[0], shapes[0], ".".join(path), training)
        elif len(keras.tree.flatten(call.arguments.args)) == len(data) > 1:
            found = self._draw_merge(operation, values, shapes[0], ".".join(path))
        if found is not None:
            return [found]
        if normalizes or any(part is not operation for part in parts(operation)):
            self.opaque[id(operation)] = operation, path
        return self.graph.add(Other(type(operation).__name__), [flow.value for flow in given], shapes, ".".join(path))

    def _draw_norm(self, layer: Any, flow: _Flow, path: Path, training: bool) -> Value:
        norm = self.norms.get(id(layer))
        if norm is None:
            norm = self.norms[id(layer)] = self._norm(layer, path)
        if training and layer.trainable:
            norm.by_batch = True
            norm.locked = "it is called with training=True, which normalizes by the batch: call it without"
        if not keras.backend.is_float_dtype(flow.tensor.dtype):
            norm.locked = norm.locked or f"what it normalizes are {keras.backend.standardize_dtype(flow.tensor.dtype)}"
        shape = flow.value.shape
        return self.graph.add(Normalize(norm, layer.axis % len(shape)), [flow.value], [shape], norm.name)[0]

    def _draw_linear(
        self, layer: Any, value: Value, symbolic: tuple[int | None, ...], output: tuple[int, ...], path: Path
    ) -> Value | None:
        steps = linear.steps(layer, value.shape, symbolic, output)
        if steps is None:
            return None
        for step in steps:
            weights = self._weights(layer, step, path)
            operation = Linear(weights, *step.axes, step.padding, step.every_tap)
            (value,) = self.graph.add(operation, [value], [step.shape], weights.name)
        after = activation(getattr(layer, "activation", None))
        if not isinstance(after, Identity):
            (value,) = self.graph.add(after, [value], [output], ".".join((*path, "activation")))
        return value

    def _weights(self, layer: Any, step: linear.Step, path: Path) -> Weights:
        found = self.weights.get((id(layer), step.kernel))
        if found is None:
            own = () if step.kernel in ("kernel", "scale") else (step.kernel,)
            found = self.weights[id(layer), step.kernel] = Weights(
                ".".join((*path, *own)),
                step.layout,
                lambda: linear.read(layer, step.kernel),
                has_bias=step.kernel != "depthwise" and linear.bias_of(layer) is not None,
                no_bias=linear.why_no_bias(layer),
                locked=linear.why_locked(layer) or self.sharing.get(id(layer), ""),
                key=Key(path, step.kernel),
            )
        return found

    def _draw_chain(self, layer: Any, value: Value, output: tuple[int, ...], name: str, training: bool) -> Value | None:
        found = chain(layer, value.shape, output, training=training)
        if found is None:
            return None
        for operation, shape in found:
            (value,) = self.graph.add(operation, [value], [shape], name)
        return value

    def _draw_merge(self, layer: Any, given: list[Value], output: tuple[int, ...], name: str) -> Value | None:
        operation = merge(layer, [value.shape for value in given], output)
        if not isinstance(operation, Pool):
            return None if operation is None else self.graph.add(operation, given, [output], name)[0]
        stacked = (len(given), *output)
        rows = [self.graph.add(Reshape(), [value], [(1, *output)], name)[0] for value in given]
        steps: list[tuple[Operation, list[Value], tuple[int, ...]]] = [(Concat(0), rows, stacked)]
        steps += [(operation, [], (1, *output)), (Reshape(), [], output)]
        for step, values, shape in steps:
            rows = self.graph.add(step, values or rows, [shape], name)
        return rows[0]

    # -- what the picture does not show ----------------------------------------------------------------------------

    def finish(self) -> Picture:
        """Lock layers that a layer uses whose own call can't be seen through, and list the norms inside of it."""
        for layer, path in self.opaque.values():
            where = f"{'.'.join(path)} ({type(layer).__name__}) uses it, whose call can't be seen through"
            for part in parts(layer):
                for key, weights in self.weights.items():
                    if key[0] == id(part):
                        weights.locked = weights.locked or where
                if isinstance(part, keras.layers.BatchNormalization) and part.built:
                    inside = (path if part is layer else (*path, part.name)), where
                    self._hide(part, *inside)
        self.graph.uncalled = tuple(self.hidden)
        return self.picture

    def _hide(self, layer: Any, path: Path, where: str) -> None:
        norm = self.norms.get(id(layer))
        if norm is None:
            norm = self.norms[id(layer)] = self._norm(layer, path)
            self.hidden.append(norm)
        if found_class(layer) is None:
            where = f"it is of the class {type(layer).__name__}, which computes in its own way"
        norm.locked = norm.locked or f"{where}: build the model from layers of Keras"

    def _norm(self, layer: Any, path: Path) -> Norm:
        mean, variance, gamma, beta = numbers_of(layer)
        name = self.names.get(layer, ".".join(path))
        return Norm(
            name, mean, variance, gamma, beta, layer.epsilon,
            decay=float(layer.momentum), unbiased=bool(getattr(layer, "unbiased", False)), key=Key(path),
        )  # fmt: skip


def _given(kwargs: dict[str, Any]) -> set[str]:
    """Return the names of the arguments that are not ``None`` all through."""
    return {name for name, value in kwargs.items() if any(leaf is not None for leaf in keras.tree.flatten(value))}


def _without_masks(call: Any, given: list[_Flow]) -> list[_Flow]:
    """Return what a call reads, but for the places that are masked: the layers that are known keep to them or have no use."""
    masks = {id(symbol) for symbol in keras.tree.flatten(call.arguments.kwargs.get("mask"))}
    return [
        flow
        for flow, symbol in zip(given, call.input_tensors, strict=True)
        if id(symbol) not in masks or keras.backend.standardize_dtype(symbol.dtype) != "bool"
    ]


def _sharing(model: Any) -> dict[int, str]:
    """Return for each layer whose variables another layer holds too, with which one."""
    holders: dict[int, list[Any]] = {}
    for layer in parts(model):
        for variable in own_variables(layer):
            holders.setdefault(id(variable), []).append(layer)
    shared = [layers for layers in holders.values() if len(layers) > 1]
    reasons = {}
    for layers in shared:
        for layer in layers:
            others = ", ".join(sorted({other.name for other in layers if other is not layer}))
            reasons[id(layer)] = f"it shares weights with {others}"
    return reasons
