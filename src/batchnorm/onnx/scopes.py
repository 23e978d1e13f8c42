"""Who defines a name in an ONNX model, and who reads it: graphs inside of graphs, and constants in all their forms."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from batchnorm.onnx.tensors import FLOATS, array, tensor

__all__ = ["Constant", "Index", "Scope", "Site", "subgraphs"]

# what may stand between a constant and its reader, and is looked through
_PURE = ("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze")
_LARGEST = 2**28


@dataclass(frozen=True, slots=True)
class Site:
    """A node that is found again in any copy of a model.

    Args:
        path: the graph it is in: for each step inwards the first output of the node, the attribute and the place in it.
        output: its first output.
    """

    path: tuple[tuple[str, str, int], ...]
    output: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is the same in every run.

    Args:
        read: returns it.
        elem_type: a number of ``TensorProto.DataType``.
        shape: its sizes.
        overridable: whether a caller may give another value, as for an initializer that is an input too.
    """

    read: Callable[[], np.ndarray]
    elem_type: int
    shape: tuple[int, ...]
    overridable: bool = False


@dataclass(eq=False, slots=True)
class Scope:
    """A graph, and the graph around it."""

    graph: Any
    outer: "Scope | None" = None
    path: tuple[tuple[str, str, int], ...] = ()
    producers: dict[str, Any] = field(default_factory=dict)
    initializers: dict[str, Any] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    readers: dict[str, list[tuple["Scope", Any, int]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.inputs = {value.name for value in self.graph.input}
        self.outputs = {value.name for value in self.graph.output}

    def home(self, name: str) -> "Scope | None":
        """Return the innermost graph, from here outwards, that defines a name."""
        scope: Scope | None = self
        while scope is not None:
            sparse = any(tensor.values.name == name for tensor in scope.graph.sparse_initializer)
            if name in scope.producers or name in scope.initializers or name in scope.inputs or sparse:
                return scope
            scope = scope.outer
        return None

    def captured(self, name: str) -> bool:
        """Whether a graph inside of this one reads a name of it."""
        return any(scope is not self for scope, _, _ in self.readers[name]) if name in self.readers else False

    def site(self, node: Any) -> Site:
        """Return where a node of this graph is."""
        return Site(self.path, next(name for name in node.output if name))


class Index:
    """All graphs of a model, from the outside in, with every reader of every name."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.scopes: dict[tuple[tuple[str, str, int], ...], Scope] = {}
        self._computed: dict[tuple[Any, str], Constant | None] = {}
        self._enter(model.graph, None, ())
        for scope in self.scopes.values():
            for node in scope.graph.node:
                for place, name in enumerate(node.input):
                    if name and (home := scope.home(name)) is not None:
                        home.readers[name].append((scope, node, place))
            for name in scope.outputs:
                # a subgraph may hand out a value of the graph around it
                if (home := scope.home(name)) is not None and home is not scope:
                    home.readers[name].append((scope, None, 0))

    def _enter(self, graph: Any, outer: Scope | None, path: tuple[tuple[str, str, int], ...]) -> None:
        self.scopes[path] = scope = Scope(graph, outer, path)
        for node in graph.node:
            for step, inner in subgraphs(node):
                self._enter(inner, scope, (*path, step))

    @property
    def main(self) -> Scope:
        """The outermost graph."""
        return self.scopes[()]

    def find(self, site: Site) -> tuple[Scope, Any]:
        """Return a node and the graph that it is in."""
        scope = self.scopes[site.path]
        return scope, scope.producers[site.output]

    def names(self) -> set[str]:
        """Return every name of a value or a node, so that a new one can differ."""
        used = {""}
        for scope in self.scopes.values():
            used |= {*scope.inputs, *scope.outputs, *scope.initializers, *scope.producers}
            used |= {node.name for node in scope.graph.node} | {
                name for node in scope.graph.node for name in node.input
            }
        return used

    def label(self, scope: Scope, node: Any) -> str:
        """Return what a person knows a node by: its name, or its first output where it has none or shares it."""
        return self._labels[scope.site(node)]

    def label_in(self, function: Any, node: Any) -> str:
        """Return the same for a node of a function."""
        return self._labels[_site_in(function, node)]

    @cached_property
    def _labels(self) -> dict[Site, str]:
        nodes = [(s.site(node), node) for s in self.scopes.values() for node in s.graph.node if any(node.output)]
        nodes += [(_site_in(f, node), node) for f in self.model.functions for node in f.node if any(node.output)]
        named = Counter(node.name for _, node in nodes)
        labels, taken = {}, {name for name, times in named.items() if times == 1}
        for site, node in nodes:
            label, number = node.name, 2
            if not label or named[label] > 1:
                label = site.output
                while label in taken:
                    label, number = f"{site.output}_{number}", number + 1
            taken.add(label)
            labels[site] = label
        return labels

    def overridable(self, scope: Scope, name: str) -> bool:
        """Whether an initializer is an input too; before version 4 of the format all were, and meant nothing by it."""
        return scope.outer is None and name in scope.inputs and self.model.ir_version >= 4

    def constant(self, scope: Scope, name: str) -> Constant | None:
        """Return a value that is the same in every run; ``None`` for one that is computed or unknown."""
        home = scope.home(name)
        if home is None:
            return None
        if name in home.initializers:
            return _of_tensor(home.initializers[name], self.overridable(home, name))
        node = home.producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            return _of_node(node)
        if node.op_type == "CastLike":
            return self._cast(home, node)
        return self._through(home, node) if node.op_type in _PURE else None

    def _cast(self, scope: Scope, node: Any) -> Constant | None:
        """Return a constant in the dtype of another value, where the model declares that."""
        source, home = self.constant(scope, node.input[0]), scope.home(node.input[1])
        kinds = [] if home is None else [*home.graph.input, *home.graph.value_info]
        kind = next((v.type.tensor_type.elem_type for v in kinds if v.name == node.input[1]), 0)
        if source is None or source.elem_type not in FLOATS or kind not in FLOATS:
            return None
        return Constant(lambda: array(tensor(source.read(), "", kind)), kind, source.shape, source.overridable)

    def _through(self, scope: Scope, node: Any) -> Constant | None:
        """Return what a node makes of constants, and of nothing else."""
        key = scope.path, node.output[0]
        if key not in self._computed:
            sources = [self.constant(scope, name) for name in node.input if name]
            known = [source for source in sources if source is not None]
            complete = len(known) == len(sources) > 0
            self._computed[key] = _computed(node, known, self.model.opset_import) if complete else None
        return self._computed[key]

    def is_constant(self, scope: Scope, node: Any) -> bool:
        """Whether a node only says what a constant is."""
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            return True
        return node.op_type in (*_PURE, "CastLike") and self.constant(scope, node.output[0]) is not None


def subgraphs(node: Any) -> Iterator[tuple[tuple[str, str, int], Any]]:
    """Yield the graphs that a node holds, each with the step of a path that leads to it."""
    first = next((name for name in node.output if name), node.name)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield (first, attribute.name, 0), attribute.g
        for place, graph in enumerate(attribute.graphs):
            yield (first, attribute.name, place), graph


def _site_in(function: Any, node: Any) -> Site:
    return Site(((function.domain, function.name, 0),), next(name for name in node.output if name))


def _of_tensor(held: Any, overridable: bool = False) -> Constant:
    return Constant(lambda: array(held), held.data_type, tuple(held.dims), overridable)


def _of_node(node: Any) -> Constant | None:
    """Return what a Constant node says, in any of its forms but the sparse one and strings."""
    if len(node.attribute) != 1:
        return None
    (attribute,) = node.attribute
    if attribute.name == "value":
        return _of_tensor(attribute.t)
    if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
        return None
    value = onnx.helper.get_attribute_value(attribute)
    kind = np.float32 if "float" in attribute.name else np.int64
    held = np.array(value, dtype=kind)
    return Constant(lambda: held, onnx.helper.np_dtype_to_tensor_dtype(held.dtype), held.shape)


def _computed(node: Any, sources: list[Constant], opsets: Any) -> Constant | None:
    """Return what a node makes of constants; the two that weights pass are not computed before they are read."""
    if node.op_type == "Identity":
        return sources[0]
    if node.op_type == "Transpose":
        return _transposed(sources[0], node)
    if (
        node.op_type == "Expand"
        and math.prod(sources[1].shape) < 32
        and math.prod(sources[1].read().tolist()) > _LARGEST
    ):
        return None
    if any(source.elem_type == TensorProto.BFLOAT16 for source in sources):
        return None
    names = [name for name in node.input if name]
    inputs = [onnx.helper.make_tensor_value_info(n, s.elem_type, s.shape) for n, s in zip(names, sources, strict=True)]
    graph = onnx.helper.make_graph(
        [node], "constant", inputs, [onnx.helper.make_empty_tensor_value_info(node.output[0])]
    )
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    try:
        arrays = {name: source.read() for name, source in zip(names, sources, strict=True)}
        made = np.asarray(ReferenceEvaluator(model).run(None, arrays)[0])
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(made.dtype)
    except Exception:
        # what can't be computed is no constant
        return None
    return Constant(lambda: made, elem_type, made.shape, any(source.overridable for source in sources))


def _transposed(source: Constant, node: Any) -> Constant | None:
    order = [*range(len(source.shape))][::-1]
    for attribute in node.attribute:
        order = list(attribute.ints) if attribute.name == "perm" else order
    if sorted(order) != [*range(len(source.shape))]:
        return None
    shape = tuple(source.shape[i] for i in order)
    return Constant(lambda: source.read().transpose(order), source.elem_type, shape, source.overridable)
