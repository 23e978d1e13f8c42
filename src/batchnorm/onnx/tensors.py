"""Tensors of an ONNX model as arrays, and back; bfloat16, which NumPy lacks, is held as float32."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from batchnorm.errors import DataError

__all__ = ["FLOATS", "array", "check_tensor", "dtype_name", "is_external", "rounded", "tensor", "tensors"]

FLOATS = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
}
"""The floating types that weights have, by their number."""

# numbers of which two are packed into a byte, and numbers that stand in an integer field one by one
_PACKED = {"UINT4", "INT4", "FLOAT4E2M1", "UINT2", "INT2"}


def dtype_name(elem_type: int) -> str:
    """Return ``"float32"`` for ``TensorProto.FLOAT``, and so on."""
    return FLOATS.get(elem_type) or str(TensorProto.DataType.Name(elem_type)).lower()


def is_external(tensor: Any) -> bool:
    """Whether the numbers of a tensor are in a file of their own."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def array(tensor: Any) -> np.ndarray:
    """Return the numbers of a ``TensorProto``; bfloat16 becomes float32, exactly.

    Raises:
        DataError: there are more or fewer numbers than its shape says, or they are in a file that was not loaded.
    """
    check_tensor(tensor)
    if tensor.data_type != TensorProto.BFLOAT16:
        return np.asarray(numpy_helper.to_array(tensor))
    held = np.frombuffer(tensor.raw_data, "<u2") if tensor.HasField("raw_data") else np.array(tensor.int32_data, "<u2")
    return (held.astype(np.uint32) << 16).view(np.float32).reshape(tuple(tensor.dims))


def tensor(values: np.ndarray, name: str, elem_type: int) -> Any:
    """Return a ``TensorProto`` of one of the `FLOATS`, rounded to nearest."""
    if elem_type == TensorProto.BFLOAT16:
        made = TensorProto(name=name, data_type=elem_type, dims=values.shape)
        made.raw_data = _to_bfloat16(values).astype("<u2").tobytes()
        return made
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(np.ascontiguousarray(values, dtype=FLOATS[elem_type]), name)


def rounded(values: np.ndarray, elem_type: int) -> np.ndarray:
    """Return in float64 what is left of values that are stored as ``elem_type``."""
    return array(tensor(values, "", elem_type)).astype(np.float64)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def check_tensor(tensor: Any) -> None:
    """Hold the declared shape of a tensor against the numbers that are there, before anything is allocated.

    Raises:
        DataError: they differ, or the numbers are in a file that was not loaded.
    """
    if is_external(tensor):
        raise DataError(
            f"the numbers of tensor {tensor.name!r} must be in the model, they are in a file that was not loaded: "
            "give the path of the model, or use onnx.load"
        )
    if any(d < 0 for d in tensor.dims):
        raise DataError(f"tensor {tensor.name!r} must have sizes of at least 0, got {list(tensor.dims)}")
    declared = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING) or not tensor.HasField("raw_data"):
        return
    kind = TensorProto.DataType.Name(tensor.data_type)
    # to_array reads packed numbers itself; float8 and its kin are one byte each
    size = 0 if kind in _PACKED else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if size and declared * size != len(tensor.raw_data):
        raise DataError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} in {dtype_name(tensor.data_type)} must hold "
            f"{declared * size:,} bytes, it holds {len(tensor.raw_data):,}: the file is damaged"
        )


def tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor that a model holds: initializers and attributes, of subgraphs and functions too."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            yield from attribute.tensors
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                yield from _of_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _of_graph(graph)
