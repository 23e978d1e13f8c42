"""How the batch normalization of an ONNX model stands, and setting it right in the file."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from batchnorm.errors import OptionError
from batchnorm.onnx.picture import is_norm
from batchnorm.onnx.scopes import Index, Scope
from batchnorm.onnx.tensors import dtype_name
from batchnorm.states import Mend, NormState

__all__ = ["mend", "states"]

# of the standard
_EPS, _DECAY = 1e-5, 0.9


def states(model: Any) -> list[NormState]:
    """List the batch normalization of a model, of its subgraphs and functions too, in the order of `stored`."""
    index = Index(model)
    holders: dict[Any, list[NormState]] = defaultdict(list)
    listed = []
    for scope in index.scopes.values():
        for node in filter(is_norm, scope.graph.node):
            listed.append(_state(index, scope, node))
            holders[_holder(scope, node)].append(listed[-1])
    for alike in holders.values():
        for state in alike:
            state.shared = tuple(other.name for other in alike if other is not state)
    inside = [(function, node) for function in model.functions for node in filter(is_norm, function.node)]
    return listed + [_bare(index.label_in(function, node), node) for function, node in inside]


def _bare(name: str, node: Any) -> NormState:
    """Return what a node alone tells, without its numbers."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    by_batch = bool(attributes.get("training_mode", 0)) or sum(map(bool, node.output)) > 1
    return NormState(
        name=name,
        kind=node.op_type,
        mean=None,
        variance=None,
        gamma=None,
        beta=None,
        eps=float(attributes.get("epsilon", _EPS)),
        decay=float(attributes.get("momentum", _DECAY)),
        by_batch=by_batch,
        training=by_batch,
        moves=by_batch,
        trainable=False,
        frozen=not by_batch,
    )


def _state(index: Index, scope: Scope, node: Any) -> NormState:
    gamma, beta, mean, variance = (_numbers(index, scope, name) for name in node.input[1:5])
    dtype = dtype_name(_elem_type(index, scope, node.input[4]))
    bare = _bare(index.label(scope, node), node)
    return replace(bare, mean=mean, variance=variance, gamma=gamma, beta=beta, dtype=dtype)


def _numbers(index: Index, scope: Scope, name: str) -> np.ndarray | None:
    """Return numbers that are the same in every run, one a channel; ``None`` for others."""
    constant = index.constant(scope, name)
    if constant is None or constant.overridable or len(constant.shape) != 1:
        return None
    return constant.read().astype(np.float64)


def _elem_type(index: Index, scope: Scope, name: str) -> int:
    constant, home = index.constant(scope, name), scope.home(name)
    if constant is not None:
        return constant.elem_type
    declared = [] if home is None else [*home.graph.input, *home.graph.value_info]
    kinds = (v.type.tensor_type.elem_type for v in declared if v.name == name)
    return int(next(kinds, TensorProto.FLOAT))


def _holder(scope: Scope, node: Any) -> Any:
    """Return where the running mean of a node is, by which nodes are found that have the same."""
    home = scope.home(node.input[3])
    return None if home is None else home.path, node.input[3]


def mend(model: Any, mends: Mapping[str, Mend]) -> None:
    """Set nodes of a ``ModelProto`` right, in place.

    Raises:
        OptionError: a name that no node has, or what can't be mended; nodes before it are changed by then.
    """
    index = Index(model)
    nodes = {
        index.label(scope, node): (scope, node)
        for scope in index.scopes.values()
        for node in filter(is_norm, scope.graph.node)
    }
    inside = {index.label_in(function, node) for function in model.functions for node in filter(is_norm, function.node)}
    for name, wanted in mends.items():
        if name not in nodes:
            where = "it is in a function: call onnx.inliner.inline_local_functions first"
            raise OptionError(
                f"layer {name!r} can't be mended in place: {where}"
                if name in inside
                else f"a layer to mend must be one of {', '.join(map(repr, nodes)) or 'none'}, got {name!r}"
            )
        scope, node = nodes[name]
        reason = _why_not(scope, node, wanted)
        if reason:
            raise OptionError(f"layer {name!r} can't be mended in place: {reason}")
        _set(scope, node, wanted)


def _why_not(scope: Scope, node: Any, wanted: Mend) -> str:
    """Return why a node can't be mended like this; empty where it can."""
    if wanted.training:
        return "an ONNX model is not trained here"
    if wanted.decay is not None or wanted.freeze or wanted.count_once:
        return "an ONNX model is not trained: set this right in the model that it was exported from"
    if wanted.wide:
        return "its numbers have the dtype that the file gives them: export the model again with float32 statistics"
    if wanted.eps is not None and not 0 <= wanted.eps < float("inf"):
        return f"eps must be 0 or more, and finite, got {wanted.eps}"
    if wanted.training is False:
        read = [name for name in node.output[1:] if name and (scope.readers.get(name) or name in scope.outputs)]
        if read:
            return (
                f"{read[0]}, the statistics that it computes in training, is read: export the model in evaluation mode"
            )
    return ""


def _set(scope: Scope, node: Any, wanted: Mend) -> None:
    if wanted.eps is not None:
        _drop(node.attribute, {"epsilon"})
        node.attribute.append(helper.make_attribute("epsilon", float(wanted.eps)))
    if wanted.training is False:
        _drop(node.attribute, {"training_mode"})
        _drop(scope.graph.value_info, set(node.output[1:]))
        del node.output[1:]


def _drop(values: Any, names: set[str]) -> None:
    for place in reversed(range(len(values))):
        if values[place].name in names:
            del values[place]
