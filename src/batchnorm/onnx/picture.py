"""Draw an ONNX model as a neutral `Graph`: its nodes, those of its subgraphs, and what must not change."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.graph import Graph, Linear, Norm, Normalize, Operation, Other, Reshape, Value
from batchnorm.onnx.calls import Call
from batchnorm.onnx.frozen import frozen_norm
from batchnorm.onnx.linear import LinearKey
from batchnorm.onnx.scopes import Index, Scope, Site, subgraphs
from batchnorm.onnx.shapes import Shapes
from batchnorm.onnx.tensors import FLOATS
from batchnorm.onnx.words import Word, word
from batchnorm.portable import shortest

__all__ = ["NormKey", "draw", "is_norm"]

# they read the sizes of a value, which folding does not change
_SIZES = ("Shape", "Size")
_KNOWN_BY_NORMS = {"epsilon", "momentum", "spatial", "training_mode"}


@dataclass(frozen=True, slots=True)
class NormKey:
    """Where a normalization is in the model, and the number of axes of its data.

    Args:
        site: the node that writes its output.
        ndim: of its data.
        first: the node that reads its input, where these are two.
        source: the name of that input then, and ``constants`` those of its numbers.
    """

    site: Site
    ndim: int
    first: Site | None = None
    source: str = ""
    constants: tuple[str, ...] = ()


def is_norm(node: Any) -> bool:
    """Whether a node is batch normalization."""
    return bool(node.op_type == "BatchNormalization") and node.domain in ("", "ai.onnx")


def draw(index: Index, shapes: Shapes, opset: int) -> Graph:
    """Return the picture of a model.

    Args:
        index: of the model.
        shapes: the sizes of all its values.
        opset: the version of the standard operators.
    """
    artist = _Artist(index, shapes, opset)
    artist.draw(index.main, "it is an output of the model")
    artist.draw_functions()
    return artist.graph


class _Artist:
    def __init__(self, index: Index, shapes: Shapes, opset: int) -> None:
        self.index, self.shapes, self.opset = index, shapes, opset
        self.graph = Graph()
        self.values: dict[tuple[Any, str], Value] = {}
        self.drawn: set[Site] = set()

    def draw(self, scope: Scope, output: str) -> None:
        for node in scope.graph.node:
            for step, _ in subgraphs(node):
                name = node.name or step[0]
                self.draw(self.index.scopes[*scope.path, step], f"it is an output of the graph inside of {name}")
            if any(node.output) and not self.index.is_constant(scope, node):
                self._draw_node(Call(node, scope, self.index, self.shapes, self.opset))
        for name in scope.outputs:
            self._value(scope, name).pin(output)

    def _draw_node(self, call: Call) -> None:
        node = call.node
        if (node.op_type in _SIZES and node.domain in ("", "ai.onnx")) or call.scope.site(node) in self.drawn:
            return
        if is_norm(node):
            self._draw_norm(call)
            return
        if self._draw_frozen(call):
            return
        spoken = word(call)
        unused = [] if spoken is None else self._unheard(call, spoken)
        if spoken is None or unused:
            kind = node.op_type + (f", where {call.source(unused[0])}" if unused else "")
            self._write(call, Other(kind), [self._value(call.scope, name) for name in self._all_read(call)])
            return
        operation, output = self._with_bias(call, spoken.operation)
        inputs = [self._value(call.scope, name) for name in spoken.inputs]
        if spoken.before_reshape is not None:
            inputs = self.graph.add(operation, inputs, [spoken.before_reshape], call.name)
            operation = Reshape()
        self._write(call, operation, inputs, output)

    def _unheard(self, call: Call, spoken: Word) -> list[int]:
        """Return the inputs that the word does not speak of, though they may vary and are no sizes."""
        kinds = (*FLOATS, 0)
        return [
            place
            for place, name in enumerate(call.node.input)
            if name
            and name not in spoken.inputs
            and call.constant(place) is None
            and self.shapes.elem_type(call.scope, name) in kinds
        ]

    def _all_read(self, call: Call) -> list[str]:
        """Return all that a node and the graphs inside of it read and that may vary."""
        names = call.varying()
        inside = [inner for inner in self.index.scopes.values() if len(inner.path) > len(call.scope.path)]
        steps = {(*call.scope.path, step) for step, _ in subgraphs(call.node)}
        for name, readers in call.scope.readers.items():
            if any(reader in inside and reader.path[: len(call.scope.path) + 1] in steps for reader, _, _ in readers):
                names.append(name)
                self._value(call.scope, name).pin(f"a graph inside of {call.name} reads it")
        return [name for name in names if self.index.constant(call.scope, name) is None]

    def _write(self, call: Call, operation: Operation, inputs: list[Value], output: str = "") -> None:
        scope, names = call.scope, [output] if output else call.node.output
        sizes = [self.shapes.of(scope, name) or () for name in names]
        if any(self.shapes.of(scope, name) is None for name in names if name):
            operation = operation if isinstance(operation, Other) else Other(call.node.op_type)
        for name, value in zip(names, self.graph.add(operation, inputs, sizes, call.name), strict=True):
            self.values[scope.path, name] = value

    def _value(self, scope: Scope, name: str) -> Value:
        home = scope.home(name) or scope
        key = home.path, name
        if key not in self.values:
            self.values[key] = Value(self.shapes.of(home, name) or ())
        return self.values[key]

    def _draw_norm(self, call: Call) -> None:
        shape = call.shape(0)
        norm = _norm(call)
        inputs = [self._value(call.scope, name) for name in call.varying()[:1]] or [Value(shape or (1, 1))]
        for name in call.varying()[1:]:
            self._value(call.scope, name).pin(f"{call.name} reads it")
        for name, value in zip(
            call.node.output,
            self.graph.add(Normalize(norm, 1), inputs, [shape or ()] * len(call.node.output), call.name),
            strict=True,
        ):
            self.values[call.scope.path, name] = value

    def _draw_frozen(self, call: Call) -> bool:
        """Draw a Mul and its Add as one normalization, where they are a frozen one."""
        found = frozen_norm(call)
        if found is None:
            return False
        norm, add, source = found
        shape, product = call.result() or (), call.node.output[0]
        constants = tuple(name for name in (*call.node.input, *add.input) if name not in (source, product))
        norm.key = NormKey(call.scope.site(add), len(shape), call.scope.site(call.node), source, constants)
        (value,) = self.graph.add(Normalize(norm, 1), [self._value(call.scope, source)], [shape], call.name)
        self.values[call.scope.path, add.output[0]] = value
        self.drawn.add(call.scope.site(add))
        return True

    def _with_bias(self, call: Call, operation: Operation) -> tuple[Operation, str]:
        """Let an Add of a constant vector behind a layer without a bias be its bias; return what to draw and its output."""
        output = call.node.output[0]
        if not isinstance(operation, Linear) or operation.weights.has_bias or operation.weights.locked:
            return operation, output
        result = call.result()
        assert result is not None  # noqa: S101
        layer, outputs = operation.weights, result[operation.out_axis]
        key: LinearKey = layer.key
        spread = (-1,) + (1,) * (len(result) - 1 - operation.out_axis)
        if key.bias is None:
            layer.key = LinearKey(key.site, key.weight, None, spread)
        readers = call.scope.readers.get(output, [])
        if len(readers) != 1 or output in call.scope.outputs or readers[0][0] is not call.scope:
            return operation, output
        _, node, place = readers[0]
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or node.attribute:
            return operation, output
        bias = self.index.constant(call.scope, node.input[1 - place])
        if bias is None or bias.overridable or not _along(bias.shape, result, operation.out_axis):
            return operation, output
        site, read = call.scope.site(node), layer.read
        layer.read = lambda: (read()[0], np.broadcast_to(bias.read().reshape(-1), (outputs,)))
        layer.has_bias, layer.key = True, LinearKey(key.site, key.weight, (site, 1 - place), spread)
        self.drawn.add(site)
        return operation, node.output[0]

    def draw_functions(self) -> None:
        """Show the norms inside of functions that the model calls; they stay as they are."""
        for function in self.index.model.functions:
            for node in filter(is_norm, function.node):
                norm = Norm(self.index.label_in(function, node), np.zeros(1), np.ones(1), None, None, 1e-5)
                norm.locked = f"it is in the function {function.name}: call onnx.inliner.inline_local_functions first"
                self.graph.add(Normalize(norm, 1), [Value((1, 1))], [(1, 1)], norm.name)


def _along(shape: tuple[int, ...], result: tuple[int, ...], axis: int) -> bool:
    """Whether a constant broadcasts against a result along one axis alone."""
    if len(shape) > len(result):
        return False
    full = (1,) * (len(result) - len(shape)) + shape
    return all(n == 1 or (i == axis and n == result[axis]) for i, n in enumerate(full))


def _norm(call: Call) -> Norm:
    """Return a batch normalization with its numbers, and why it may not be replaced, if so."""
    site, shape = call.scope.site(call.node), call.shape(0)
    eps = float(call.attributes.get("epsilon", np.float32(1e-5)))
    norm = Norm(
        call.name, np.zeros(1), np.ones(1), None, None, eps,
        decay=shortest(call.attributes.get("momentum", 0.9)), unbiased=False, key=NormKey(site, len(shape or ())),
    )  # fmt: skip
    norm.locked = _why_locked(call)
    if norm.locked:
        return norm
    held = [call.numbers(place) for place in (1, 2, 3, 4)]
    if shape is None or call.constant(0) is not None:
        norm.locked = "the shape of its input is not known" if shape is None else "its input is a constant"
        return norm
    if len(shape) < 2 or any(v is None or v.shape != (shape[1],) for v in held):
        norm.locked = f"its numbers do not fit its input of shape {shape}"
        return norm
    norm.gamma, norm.beta, norm.mean, norm.variance = (v.astype(np.float64) for v in held if v is not None)
    return norm


def _why_locked(call: Call) -> str:
    a = call.attributes
    unknown = [x.name for x in call.node.attribute if x.name not in _KNOWN_BY_NORMS or x.ref_attr_name]
    if a.get("training_mode", 0) or (len(call.outputs()) > 1):
        return "it normalizes by the statistics of the batch: export the model in evaluation mode"
    if unknown:
        return f"its attribute {unknown[0]} is not understood"
    if not a.get("spatial", 1):
        return "it normalizes each place on its own (spatial = 0)"
    reasons = (call.source(place) for place in (1, 2, 3, 4))
    return next((reason for reason in reasons if reason), "")
