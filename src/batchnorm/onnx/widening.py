"""A copy of an ONNX model that computes in float64 throughout."""

from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from batchnorm.onnx.tensors import FLOATS, array

__all__ = ["widened"]

_NARROW = set(FLOATS) - {TensorProto.DOUBLE}
# attributes that name a dtype
_TYPES = {"to", "dtype", "output_dtype"}


def widened(model: Any) -> Any:
    """Return a copy with every floating number, input and output in float64.

    An operator that knows no float64 gets what it asks for by a Cast, and its result is cast back.
    """
    wide = type(model)()
    wide.CopyFrom(model)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    _widen_graph(wide.graph, versions)
    for function in wide.functions:
        _widen_nodes(function.node, {entry.domain: entry.version for entry in function.opset_import})
        _widen_types(function.value_info)
    return wide


def _widen_graph(graph: Any, versions: dict[str, int]) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _widen_tensor(sparse.values)
    for values in (graph.input, graph.output, graph.value_info):
        _widen_types(values)
    _widen_nodes(graph.node, versions)


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type in _NARROW:
        name, text = tensor.name, tensor.doc_string
        values = array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
        tensor.doc_string = text


def _widen_types(values: Any) -> None:
    for value in values:
        for kind in ("tensor_type", "sparse_tensor_type"):
            if value.type.HasField(kind) and getattr(value.type, kind).elem_type in _NARROW:
                getattr(value.type, kind).elem_type = TensorProto.DOUBLE
        if value.type.HasField("sequence_type") and value.type.sequence_type.elem_type.HasField("tensor_type"):
            inner = value.type.sequence_type.elem_type.tensor_type
            inner.elem_type = TensorProto.DOUBLE if inner.elem_type in _NARROW else inner.elem_type


def _widen_nodes(nodes: Any, versions: dict[str, int]) -> None:
    written: list[Any] = []
    for node in nodes:
        for attribute in node.attribute:
            _widen_attribute(node, attribute, versions)
        casts, back = _casts(node, versions)
        written += [*casts, node, *back]
    if len(written) > len(nodes):
        new = onnx.GraphProto()
        new.node.extend(written)
        del nodes[:]
        nodes.extend(new.node)


def _widen_attribute(node: Any, attribute: Any, versions: dict[str, int]) -> None:
    if attribute.HasField("t"):
        _widen_tensor(attribute.t)
    for tensor in attribute.tensors:
        _widen_tensor(tensor)
    for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
        _widen_graph(graph, versions)
    if attribute.name in _TYPES and attribute.type == AttributeProto.INT and attribute.i in _NARROW:
        attribute.i = TensorProto.DOUBLE
    if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        value = np.array(onnx.helper.get_attribute_value(attribute), np.float64)
        attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(value)))


def _casts(node: Any, versions: dict[str, int]) -> tuple[list[Any], list[Any]]:
    """Return the casts that an operator without float64 needs before and behind it."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = versions.get(domain, versions.get("ai.onnx", 0) if not domain else 0)
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return [], []
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    casts, back = [], []
    for place, name in enumerate(node.input):
        if name and _narrow_only(schema.inputs, place, allowed):
            made = f"{name}__narrow_{node.output[0]}_{place}"
            casts.append(onnx.helper.make_node("Cast", [name], [made], to=TensorProto.FLOAT))
            node.input[place] = made
    for place, name in enumerate(node.output):
        if name and _narrow_only(schema.outputs, place, allowed):
            made = f"{name}__narrow"
            back.append(onnx.helper.make_node("Cast", [made], [name], to=TensorProto.DOUBLE))
            node.output[place] = made
    return casts, back


def _narrow_only(formal: Any, place: int, allowed: dict[str, set[str]]) -> bool:
    if not formal:
        return False
    # the last one may stand for many
    kind = formal[min(place, len(formal) - 1)].type_str
    types = allowed.get(kind, {kind})
    return "tensor(float)" in types and "tensor(double)" not in types
