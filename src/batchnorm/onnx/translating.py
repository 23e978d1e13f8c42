"""A BatchNormalization node as a layer without a framework, and back."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from batchnorm.errors import DataError, OptionError
from batchnorm.graph import Norm
from batchnorm.onnx.picture import is_norm
from batchnorm.onnx.scopes import Index
from batchnorm.onnx.states import states
from batchnorm.onnx.tensors import FLOATS, check_tensor, tensor, tensors
from batchnorm.portable import Portable, shortest

__all__ = ["layer", "portable"]

# in evaluation they are something else than batch normalization alone
_MATTERS = {"activation", "domains", "example_weight"}
_OPSET, _IR = 17, 8


def portable(given: Any) -> Portable:
    """Return what a node stores and does.

    Args:
        given: a ``ModelProto`` with one BatchNormalization, ``(model, name of the node)``, or ``(node, initializers)``.

    Raises:
        OptionError: no such node, or one whose numbers are computed.
        DataError: a tensor that is damaged.
    """
    model, name = given if isinstance(given, tuple) else (given, None)
    if isinstance(model, onnx.NodeProto):
        model, name = _around(model, name), None
    if not isinstance(model, onnx.ModelProto):
        raise OptionError(
            f"an ONNX layer must be a model, (model, name) or (node, initializers), got a {type(model).__name__}"
        )
    for held in tensors(model):
        check_tensor(held)
    found = {state.name: state for state in states(model)}
    listed = ", ".join(map(repr, found)) or "none"
    if name is None and len(found) != 1:
        raise OptionError(f"an ONNX model must have one BatchNormalization, or be given with its name: it has {listed}")
    state = found.get(next(iter(found)) if name is None else name)
    if state is None:
        raise OptionError(f"the name must be that of a BatchNormalization, {listed}, got {name!r}")
    numbers = state.mean, state.variance, state.gamma, state.beta
    if any(v is None or len(v) != len(next(n for n in numbers if n is not None)) for v in numbers):
        raise OptionError(f"node {state.name!r} must read constants of one number for each channel, it computes them")
    norm = Norm(
        state.name, *numbers, shortest(state.eps), decay=shortest(state.decay or 0.0), unbiased=False
    )  # fmt: skip
    index = Index(model)
    node = next(
        n for s in index.scopes.values() for n in s.graph.node if is_norm(n) and index.label(s, n) == state.name
    )
    dtype = next((c.elem_type for s in index.scopes.values() if (c := index.constant(s, node.input[1])) is not None), 0)
    return Portable(
        "ONNX BatchNormalization", norm, FLOATS.get(dtype, state.dtype), state.dtype, dims=_dims(model, node), axis=None
    )


def _around(node: Any, initializers: Any) -> Any:
    """Return a model of one node and the tensors that it reads."""
    values = initializers.values() if isinstance(initializers, dict) else initializers
    held = [value for value in values if isinstance(value, TensorProto) and value.name in node.input]
    if not is_norm(node) or len(node.input) != 5 or {tensor.name for tensor in held} < set(node.input[1:]):
        raise OptionError(
            f"a node must be a BatchNormalization, given with the initializers {', '.join(node.input[1:5])}, got a "
            f"{node.op_type} with {', '.join(t.name for t in held) or 'none'}"
        )
    ends = [helper.make_empty_tensor_value_info(name) for name in (node.input[0], node.output[0])]
    return helper.make_model(helper.make_graph([node], "layer", ends[:1], ends[1:], held))


def _dims(model: Any, node: Any) -> int | None:
    for value in (*model.graph.input, *model.graph.value_info):
        if value.name == node.input[0] and value.type.tensor_type.HasField("shape"):
            return max(0, len(value.type.tensor_type.shape.dim) - 2)
    return None


def layer(given: Portable) -> Any:
    """Return a ``ModelProto`` of one node in its form for inference, from ``x`` to ``y``.

    Raises:
        OptionError: ONNX has no such node.
    """
    target = "BatchNormalization of ONNX"
    given.taken({name for name in given.options if name not in _MATTERS}, target)
    mean, variance = given.statistics(target)
    gamma = np.ones_like(mean) if given.norm.gamma is None else given.norm.gamma
    beta = np.zeros_like(mean) if given.norm.beta is None else given.norm.beta
    kinds = {name: kind for kind, name in FLOATS.items()}
    kind, wide = kinds[given.dtype], kinds[given.statistics_dtype]
    held = [
        tensor(values, name, elem_type)
        for name, values, elem_type in (
            ("scale", gamma, kind), ("B", beta, kind), ("input_mean", mean, wide), ("input_var", variance, wide)
        )
    ]  # fmt: skip
    decay = {} if given.norm.decay is None else {"momentum": given.norm.decay}
    names = [tensor.name for tensor in held]
    node = helper.make_node(
        "BatchNormalization",
        ["x", *names],
        ["y"],
        given.norm.name or "batch_normalization",
        epsilon=given.norm.eps,
        **decay,
    )
    sizes = ["N", len(mean), *(f"D{i}" for i in range(given.rank(target) - 2))]
    ends = [helper.make_tensor_value_info(name, kind, sizes) for name in "xy"]
    graph = helper.make_graph([node], "batch_normalization", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise DataError(f"the node must be valid ONNX: {error}") from error
    return model
