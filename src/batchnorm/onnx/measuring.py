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
from batchnorm.onnx.shapes import asked, feeds
from batchnorm.protocol import Measure, Measured, Pair, Statistics

__all__ = ["measuring", "stored"]

LEAST = "least_count"
_PARTS = ("mean", "variance", "count")
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
            found.append(Statistics(_name(node), None, None, 0.0, unbiased=False, fixed=reason))
    return found


def _statistics(index: Index, scope: Scope, node: Any) -> Statistics:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    eps = float(attributes.get("epsilon", 1e-5))
    held = [index.constant(scope, name) for name in node.input[1:5]]
    reason = _why_fixed(scope, node, attributes, held)
    mean, variance = (None if c is None else c.read().astype(np.float64) for c in held[2:])
    key = Norm(_name(node), mean, variance, None, None, eps, key=NormKey(scope.site(node), 0))
    # the standard's own running variance is that of the population
    return Statistics(_name(node), mean, variance, eps, unbiased=False, fixed=reason, key=key)


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


def _name(node: Any) -> str:
    return str(node.name or node.output[0])


@contextmanager
def measuring(model: Any, statistics: list[Statistics]) -> Iterator[Measure]:
    """Yield what runs a batch through a copy of the model that puts out the Moments of each layer's input.

    The copy is handed the statistics to normalize by as inputs, and takes those of the batch in their place for layers that
    see more than ``least_count`` values of a channel.
    """
    moving = [one for one in statistics if not one.fixed]
    watched, kinds = _watched(model, moving)
    runner = Runner(watched, evaluated=False)

    def measure(batch: Any, use: Mapping[Statistics, Pair] | None) -> Measured:
        try:
            given = feeds(model, _selected(model, batch))
        except OptionError as error:
            raise DataError(str(error).replace("the example", "a batch")) from error
        arrays = {**given, LEAST: np.array(1.0 if use is None else np.inf, np.float32)}
        for number, one in enumerate(moving):
            pair = (one.mean, one.variance) if use is None or one not in use else use[one]
            dtype = np.float64 if kinds[number] == TensorProto.DOUBLE else np.float32
            arrays |= {f"{name}_{number}": np.asarray(v, dtype) for name, v in zip(_STORED, pair, strict=True)}
        try:
            outputs = runner.outputs(arrays)
        except OptionError as error:
            raise DataError(f"the model must take the batches of the data: {error}") from error
        found = {one: _moments(one, outputs[3 * n : 3 * n + 3]) for n, one in enumerate(moving)}
        return Measured(next((len(v) for v in given.values() if v.ndim), 1), found)

    yield measure


def _selected(model: Any, batch: Any) -> Any:
    """Return what a model takes of a batch: the arrays that have the names of its inputs, or the first ones."""
    names = [value.name for value in asked(model)]
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in batch if name in names}
    return tuple(batch[: len(names)]) if isinstance(batch, tuple | list) else batch


def _moments(one: Statistics, outputs: list[np.ndarray]) -> Moments:
    mean, variance, count = outputs
    if not np.isfinite(mean + variance).all():
        raise DataError(
            f"what reaches layer {one.name!r} must be finite, it holds inf or NaN: look for them in the data, or in the "
            "weights of the layers before"
        )
    return Moments(int(count.item()), mean, variance * count.item())


def _watched(model: Any, moving: list[Statistics]) -> tuple[Any, list[int]]:
    """Return a copy that measures, and the dtypes of the statistics that it is handed."""
    copy = type(model)()
    copy.CopyFrom(model)
    index = Index(copy)
    opset = max(entry.version for entry in copy.opset_import if entry.domain in ("", "ai.onnx"))
    del copy.graph.output[:]
    copy.graph.input.append(helper.make_tensor_value_info(LEAST, TensorProto.FLOAT, []))
    before: dict[str, list[Any]] = {}
    kinds = []
    for number, one in enumerate(moving):
        scope, node = index.find(one.key.key.site)
        constants = [index.constant(scope, name) for name in node.input[3:5]]
        assert one.mean is not None  # noqa: S101
        own = [c.elem_type for c in constants if c is not None]
        wide = TensorProto.DOUBLE if own[0] == TensorProto.DOUBLE else TensorProto.FLOAT
        before[node.output[0]] = _measurement(number, node.input[0], len(one.mean), own, wide, opset)
        kinds.append(wide)
        copy.graph.input.extend(
            helper.make_tensor_value_info(f"{name}_{number}", wide, [len(one.mean)]) for name in _STORED
        )
        node.input[3], node.input[4] = f"used_mean_{number}", f"used_variance_{number}"
        copy.graph.output.extend(
            helper.make_tensor_value_info(
                f"{part}_{number}", TensorProto.DOUBLE, [len(one.mean)] if part != "count" else []
            )
            for part in _PARTS
        )
    nodes = [made for node in copy.graph.node for made in (*before.get(_first(node), ()), node)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy, kinds


def _first(node: Any) -> str:
    return str(node.output[0]) if node.output else ""


def _measurement(number: int, source: str, channels: int, own: list[int], wide: int, opset: int) -> list[Any]:
    """Return nodes that measure ``source``, centred, in float64, and choose the statistics to normalize it by."""
    n = f"_{number}"
    nodes: list[Any] = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(
            helper.make_node(
                kind, [name if name == source else name + n for name in inputs], [output + n], **attributes
            )
        )
        return output

    def constant(values: Any, name: str, dtype: Any) -> str:
        value = onnx.numpy_helper.from_array(np.array(values, dtype), "")
        return add("Constant", [], name, value=value)

    def mean(x: str, output: str) -> str:
        if opset < 18:
            return add("ReduceMean", [x], output, axes=[0, 2], keepdims=1)
        return add("ReduceMean", [x, "axes"], output, keepdims=1)

    if opset >= 18:
        constant([0, 2], "axes", np.int64)
    constant([0, channels, -1], "columns", np.int64)
    constant([channels], "vector", np.int64)
    constant(channels, "channels", np.float64)
    add("Cast", [source], "wide", to=TensorProto.DOUBLE)
    x = add("Reshape", ["wide", "columns"], "x")
    m = mean(x, "m")
    d = add("Sub", [x, m], "d")
    v = mean(add("Mul", [d, d], "squares"), "v")
    add("Reshape", [m, "vector"], "mean")
    add("Reshape", [v, "vector"], "variance")
    add("Cast", [add("Size", [source], "size")], "numbers", to=TensorProto.DOUBLE)
    add("Div", ["numbers", "channels"], "count")
    add("Cast", ["count"], "narrow_count", to=TensorProto.FLOAT)
    nodes.append(helper.make_node("Greater", [f"narrow_count{n}", LEAST], [f"many{n}"]))
    add("Cast", ["many"], "batch_share", to=wide)
    one = constant(1, "one", np.float64 if wide == TensorProto.DOUBLE else np.float32)
    add("Sub", [one, "batch_share"], "stored_share")
    for what, kind in (("mean", own[0]), ("variance", own[1])):
        add("Cast", [what], f"narrow_{what}", to=wide)
        add("Mul", [f"narrow_{what}", "batch_share"], f"of_batch_{what}")
        add("Mul", [f"stored_{what}", "stored_share"], f"of_model_{what}")
        total = add("Add", [f"of_batch_{what}", f"of_model_{what}"], f"total_{what}")
        add("Cast", [total], f"used_{what}", to=kind)
    return nodes
