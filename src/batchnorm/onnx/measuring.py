"""Run an ONNX model that measures what reaches its batch normalization, in the graph itself."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from batchnorm.errors import DataError, OptionError
from batchnorm.graph import Norm
from batchnorm.moments import Moments
from batchnorm.onnx.picture import NormKey, is_norm
from batchnorm.onnx.running import Runner
from batchnorm.onnx.scopes import Constant, Index, Scope
from batchnorm.onnx.shapes import Shapes, asked, feeds
from batchnorm.protocol import Measure, Measured, Pair, Statistics, note, piece

__all__ = ["measuring", "selected", "stored"]

_STORED = ("stored_mean", "stored_variance")


def stored(model: Any) -> list[Statistics]:
    """List the statistics of the batch normalization of a model, of its subgraphs and functions too."""
    index = Index(model)
    found = [
        _statistics(index, scope, node) for scope in index.scopes.values() for node in filter(is_norm, scope.graph.node)
    ]
    for function in model.functions:
        for node in filter(is_norm, function.node):
            reason = f"it is in the function {function.name}: call onnx.inliner.inline_local_functions first"
            found.append(Statistics(index.label_in(function, node), None, None, 0.0, unbiased=False, fixed=reason))
    return found


def _statistics(index: Index, scope: Scope, node: Any) -> Statistics:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    eps = float(attributes.get("epsilon", 1e-5))
    held = [index.constant(scope, name) for name in node.input[1:5]]
    reason = _why_fixed(scope, node, attributes, held)
    mean, variance = (None if c is None else c.read().astype(np.float64) for c in held[2:])
    name = index.label(scope, node)
    key = Norm(name, mean, variance, None, None, eps, key=NormKey(scope.site(node), 0))
    # the standard's own running variance is that of the population
    return Statistics(name, mean, variance, eps, unbiased=False, fixed=reason, key=key)


def _why_fixed(scope: Scope, node: Any, attributes: dict[str, Any], held: list[Constant | None]) -> str:
    if attributes.get("training_mode", 0) or sum(map(bool, node.output)) > 1:
        return "it normalizes by the statistics of the batch: export the model in evaluation mode"
    if not attributes.get("spatial", 1):
        return "it normalizes each place on its own (spatial = 0)"
    if scope.outer is not None:
        return "it is inside of a subgraph, where nothing can be measured"
    if any(constant is None or constant.overridable for constant in held):
        return "its numbers are computed, or given by the caller"
    return ""


@contextmanager
def measuring(model: Any, statistics: list[Statistics], *, every: bool = False) -> Iterator[Measure]:
    """Yield what runs a batch through a copy of the model that puts out the Moments of each layer's input.

    The copy is handed the statistics to normalize by as inputs, and takes those of the batch in their place for layers that
    see more than so many values of a channel. With ``every``, layers are measured that do not move too, and a second copy puts
    out a piece of what reaches each layer in the first batch.
    """
    moving = [one for one in statistics if not one.fixed]
    watched = _Watched(model, moving, [one for one in statistics if every and one.fixed and _can_be_seen(one)])
    runner = Runner(watched.model, evaluated=False)
    seen: list[int] = []

    def measure(batch: Any, use: Mapping[Statistics, Pair] | None) -> Measured:
        try:
            given = feeds(model, selected(model, batch))
        except OptionError as error:
            raise DataError(str(error).replace("the example", "a batch")) from error
        looking = every and not seen
        try:
            run, shown = watched.showing(given) if looking else (runner, [])
            outputs = run.outputs({**given, **watched.feeds(use)})
        except OptionError as error:
            raise DataError(f"the model must take the batches of the data: {error}") from error
        found: dict[Statistics, list[Moments]] = {}
        for number, one in enumerate(watched.layers):
            note(found, one, _moments(outputs[3 * number : 3 * number + 3]))
        seen.append(samples := next((len(v) for v in given.values() if v.ndim), 1))
        return Measured(samples, found, dict(zip(shown, outputs[3 * len(watched.layers) :], strict=True)))

    yield measure


def _can_be_seen(one: Statistics) -> bool:
    """Whether a layer is in the outermost graph, and has one mean for each channel."""
    return one.key is not None and not one.key.key.site.path and one.mean is not None and one.mean.ndim == 1


def selected(model: Any, batch: Any) -> Any:
    """Return what a model takes of a batch: the arrays that have the names of its inputs, or the first ones."""
    names = [value.name for value in asked(model)]
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in batch if name in names}
    return tuple(batch[: len(names)]) if isinstance(batch, tuple | list) else batch


def _moments(outputs: list[np.ndarray]) -> Moments:
    mean, variance, count = outputs
    return Moments(int(count.item()), mean, variance * count.item())


class _Watched:
    """A copy of a model that measures.

    Args:
        model: stays as it is.
        moving: the statistics of the layers to measure, which are handed what they normalize by.
        still: those of layers that are measured only.
    """

    def __init__(self, model: Any, moving: list[Statistics], still: list[Statistics]) -> None:
        self.moving, self.layers = moving, moving + still
        self.model = type(model)()
        self.model.CopyFrom(model)
        index, graph = Index(self.model), self.model.graph
        self.prefix = "measured"
        while any(name.startswith(self.prefix) for name in index.names()):
            self.prefix += "_"
        self.least = f"{self.prefix}least"
        del graph.output[:]
        graph.input.append(helper.make_tensor_value_info(self.least, TensorProto.FLOAT, []))
        self.before: dict[str, list[Any]] = {}
        self.opset = max(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        self.kinds = [self._watch(index, number, one) for number, one in enumerate(self.layers)]
        _insert(graph, self.before)

    def feeds(self, use: Mapping[Statistics, Pair] | None) -> dict[str, np.ndarray]:
        """Return the inputs that the copy has beyond those of the model: what to normalize by."""
        arrays = {self.least: np.array(1.0 if use is None else np.inf, np.float32)}
        for number, one in enumerate(self.moving):
            pair = one.pair if use is None else use.get(one, one.pair)
            dtype = np.float64 if self.kinds[number] == TensorProto.DOUBLE else np.float32
            for what, values in zip(_STORED, pair, strict=True):
                arrays[f"{self.prefix}{number}_{what}"] = np.asarray(values, dtype)
        return arrays

    def showing(self, given: dict[str, np.ndarray]) -> tuple[Runner, list[Statistics]]:
        """Return what runs the copy and puts out a `piece` of what layers read too; of those whose sizes are known."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        index, shapes = Index(self.model), Shapes(self.model, {**given, **self.feeds(None)})
        before, shown = {}, []
        for number, one in enumerate(self.layers):
            node = index.find(one.key.key.site)[1]
            shape = shapes.of(index.main, node.input[0])
            if not shape or 0 in shape:
                continue
            nodes = _Nodes(f"{self.prefix}{number}_piece_", self.opset)
            wide = shapes.elem_type(index.main, node.input[0]) == TensorProto.DOUBLE
            nodes.take(str(node.input[0]), shape, TensorProto.DOUBLE if wide else TensorProto.FLOAT)
            before[str(node.output[0])] = nodes.made
            shown.append(one)
            model.graph.output.append(helper.make_empty_tensor_value_info(nodes.made[-1].output[0]))
        _insert(model.graph, before)
        return Runner(model, evaluated=False), shown

    def _watch(self, index: Index, number: int, one: Statistics) -> int:
        """Measure what one layer reads; return the dtype of the statistics that it is handed, if it is."""
        size = len(one.pair[0])
        scope, node = index.find(one.key.key.site)
        own = [c.elem_type for name in node.input[3:5] if (c := index.constant(scope, name)) is not None]
        wide = TensorProto.DOUBLE if own[0] == TensorProto.DOUBLE else TensorProto.FLOAT
        nodes = _Nodes(f"{self.prefix}{number}_", self.opset)
        count = nodes.measure(str(node.input[0]), size)
        graph, channels = self.model.graph, [size]
        if number < len(self.moving):
            share = nodes.batch_share(count, self.least, wide)
            for place, (what, kind) in enumerate(zip(("mean", "variance"), own, strict=True)):
                node.input[3 + place] = nodes.choose(what, share, wide, kind)
            graph.input.extend(helper.make_tensor_value_info(nodes.name(what), wide, channels) for what in _STORED)
        sizes = {"mean": channels, "variance": channels, "count": []}
        graph.output.extend(
            helper.make_tensor_value_info(nodes.name(what), TensorProto.DOUBLE, shape) for what, shape in sizes.items()
        )
        self.before[str(node.output[0])] = nodes.made
        return int(wide)


def _insert(graph: Any, before: dict[str, list[Any]]) -> None:
    """Put nodes in front of those with these first outputs."""
    nodes = [made for node in graph.node for made in (*before.get(_first(node), ()), node)]
    del graph.node[:]
    graph.node.extend(nodes)


def _first(node: Any) -> str:
    return str(node.output[0]) if node.output else ""


class _Nodes:
    """Nodes to be put in front of a layer, with names of their own."""

    def __init__(self, prefix: str, opset: int) -> None:
        self.prefix, self.opset, self.made = prefix, opset, list[Any]()

    def name(self, what: str) -> str:
        return self.prefix + what

    def add(self, kind: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        output = self.name(into or f"value{len(self.made)}")
        self.made.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, values: Any, dtype: Any) -> str:
        return self.add("Constant", value=onnx.numpy_helper.from_array(np.array(values, dtype), ""))

    def measure(self, source: str, channels: int) -> str:
        """Measure ``source`` in float64, centred; return the name of the number of values."""
        columns = self.constant([0, channels, -1], np.int64)
        vector = self.constant([channels], np.int64)
        x = self.add("Reshape", self.add("Cast", source, to=TensorProto.DOUBLE), columns)
        mean = self._mean(x)
        d = self.add("Sub", x, mean)
        variance = self._mean(self.add("Mul", d, d))
        self.add("Reshape", mean, vector, into="mean")
        self.add("Reshape", variance, vector, into="variance")
        size = self.add("Cast", self.add("Size", source), to=TensorProto.DOUBLE)
        return self.add("Div", size, self.constant(channels, np.float64), into="count")

    def _mean(self, x: str) -> str:
        if self.opset < 18:
            return self.add("ReduceMean", x, axes=[0, 2], keepdims=1)
        return self.add("ReduceMean", x, self.constant([0, 2], np.int64), keepdims=1)

    def take(self, source: str, shape: tuple[int, ...], kind: int) -> None:
        """Take a `piece` of what has this shape; by Gather, which is the same in all versions."""
        for axis, part in enumerate(piece(shape)):
            rows = np.arange(shape[axis])[part]
            if len(rows) < shape[axis]:
                source = self.add("Gather", source, self.constant(rows, np.int64), axis=axis)
        self.add("Cast", source, to=kind)

    def batch_share(self, count: str, least: str, wide: int) -> tuple[str, str]:
        """Return 1 and 0 for more values than ``least``, else 0 and 1; without Where, which old versions lack."""
        many = self.add("Greater", self.add("Cast", count, to=TensorProto.FLOAT), least)
        batch = self.add("Cast", many, to=wide)
        one = self.constant(1, np.float64 if wide == TensorProto.DOUBLE else np.float32)
        return batch, self.add("Sub", one, batch)

    def choose(self, what: str, share: tuple[str, str], wide: int, kind: int) -> str:
        """Return the statistic of the batch, or the one that is handed in."""
        narrow = self.add("Cast", self.name(what), to=wide)
        parts = self.add("Mul", narrow, share[0]), self.add("Mul", self.name(f"stored_{what}"), share[1])
        return self.add("Cast", self.add("Add", *parts), to=kind)
