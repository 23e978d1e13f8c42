"""What an ONNX model asks for, and the size of every value in it on given inputs."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from batchnorm.errors import OptionError
from batchnorm.onnx.scopes import Scope, subgraphs
from batchnorm.onnx.tensors import FLOATS, dtype_name

__all__ = ["Shapes", "asked", "feeds", "random_feeds", "skeleton"]

BATCH, PLACES = 2, 64
"""Sizes for dimensions without one, where no example is given: the first axis, and all others."""
LARGEST = 2**33
"""Numbers that a value may have; more can't be computed on an ordinary machine."""
_SMALL = 4096
_Shapes = dict[str, tuple[int, ...]]


def asked(model: Any) -> list[Any]:
    """Return the inputs that a caller has to give: those without an initializer."""
    held = {tensor.name for tensor in model.graph.initializer}
    held |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in held]


def feeds(model: Any, example: Any) -> dict[str, np.ndarray]:
    """Return an example by name, each array in the dtype that the model declares.

    Args:
        model: an ``onnx.ModelProto``.
        example: an array, a tuple or list of arrays, or a dict of arrays by name.

    Raises:
        OptionError: names, number, dtypes or sizes are not those of the inputs.
    """
    inputs = asked(model)
    names = [value.name for value in inputs]
    given = example if isinstance(example, dict) else dict(_paired(names, example))
    if set(given) != set(names):
        raise OptionError(f"the example must have an array for each of the inputs {names}, got {list(given)}")
    return {value.name: _fitting(value, given[value.name]) for value in inputs}


def _paired(names: list[str], example: Any) -> Iterator[tuple[str, Any]]:
    arrays = list(example) if isinstance(example, tuple | list) else [example]
    if len(arrays) != len(names):
        raise OptionError(f"the example must have an array for each of the inputs {names}, got {len(arrays)} of them")
    return zip(names, arrays, strict=True)


def _fitting(value: Any, given: Any) -> np.ndarray:
    if not value.type.HasField("tensor_type"):
        raise OptionError(
            f"input {value.name!r} must be a tensor, the model declares another type: it can't be run here"
        )
    wanted = value.type.tensor_type.elem_type
    held = np.asarray(given)
    if wanted == TensorProto.BFLOAT16:
        # as the model will see it, in the dtype that NumPy has
        held = held.astype(np.float32)
    dtype = np.dtype(np.float32) if wanted == TensorProto.BFLOAT16 else onnx.helper.tensor_dtype_to_np_dtype(wanted)
    if not (held.dtype == dtype or (held.dtype.kind == dtype.kind and held.dtype.kind in "fiu")):
        raise OptionError(f"input {value.name!r} must be of {dtype_name(wanted)}, got {held.dtype}")
    if value.type.tensor_type.HasField("shape"):
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        if len(sizes) != held.ndim or any(n is not None and n != m for n, m in zip(sizes, held.shape, strict=True)):
            raise OptionError(f"input {value.name!r} must have the shape {_written(value)}, got {held.shape}")
    return np.ascontiguousarray(held.astype(dtype)).reshape(held.shape)


def _written(value: Any) -> str:
    dims = value.type.tensor_type.shape.dim
    return f"({', '.join(str(d.dim_value) if d.HasField('dim_value') else d.dim_param or '?' for d in dims)})"


def random_feeds(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Return random arrays of the declared dtypes and sizes; dimensions without a size get `BATCH` and `PLACES`.

    Raises:
        OptionError: an input that no array can be made for.
    """
    rng, sizes, made = np.random.default_rng(seed), dict[str, int](), {}
    for value in asked(model):
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            raise OptionError(f"the model does not tell the shape of input {value.name!r}: give an example")
        shape = []
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            default = PLACES if axis else BATCH
            named = sizes.setdefault(dim.dim_param, default) if dim.dim_param else default
            shape.append(dim.dim_value if dim.HasField("dim_value") else named)
        if math.prod(shape) > LARGEST // 8 or min(shape, default=0) < 0:
            raise OptionError(f"input {value.name!r} of shape {tuple(shape)} is too large to be made: give an example")
        made[value.name] = _random(rng, value.type.tensor_type.elem_type, tuple(shape))
    return made


def _random(rng: np.random.Generator, elem_type: int, shape: tuple[int, ...]) -> np.ndarray:
    if elem_type in FLOATS:
        dtype = "float32" if elem_type == TensorProto.BFLOAT16 else FLOATS[elem_type]
        return rng.standard_normal(shape).astype(dtype)
    if elem_type == TensorProto.STRING:
        return np.full(shape, "", dtype=object)
    # 0 and 1 are indices into any table, and truth values
    return rng.integers(0, 2, shape).astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def skeleton(model: Any) -> Any:
    """Return a copy without large weights, which are declared as inputs instead."""
    bare = type(model)(ir_version=max(model.ir_version, 4))
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name
    bare.graph.input.extend(asked(model))
    bare.graph.output.extend(model.graph.output)
    bare.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    for tensor in model.graph.initializer:
        _keep_small(bare, tensor, tensor.name)
    for node in model.graph.node:
        # a large Constant is weights, too
        if node.op_type == "Constant" and node.attribute and math.prod(node.attribute[0].t.dims) > _SMALL:
            _keep_small(bare, node.attribute[0].t, node.output[0])
        else:
            bare.graph.node.append(node)
    return bare


def _keep_small(bare: Any, tensor: Any, name: str) -> None:
    if math.prod(tensor.dims) <= _SMALL:
        bare.graph.initializer.append(tensor)
    else:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def _forget(graph: Any) -> None:
    """Drop all shapes that a file claims for what is computed."""
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _forget(inner)


class Shapes:
    """The sizes and types of all values.

    Args:
        model: an ``onnx.ModelProto``.
        arrays: what it is run on; ``None`` to leave open what the model leaves open.

    Raises:
        OptionError: a value would be too large for any machine.
    """

    def __init__(self, model: Any, arrays: dict[str, np.ndarray] | None) -> None:
        bare = skeleton(model)
        _forget(bare.graph)
        for value in bare.graph.input:
            if arrays is not None and value.name in arrays:
                shape = value.type.tensor_type.shape
                del shape.dim[:]
                for n in arrays[value.name].shape:
                    shape.dim.add().dim_value = n
        self.known: dict[tuple[Any, str], tuple[int | None, ...]] = {}
        self.types: dict[tuple[Any, str], int] = {}
        self._enter(_inferred(bare).graph, ())

    def _enter(self, graph: Any, path: tuple[tuple[str, str, int], ...]) -> None:
        for tensor in graph.initializer:
            self.known[path, tensor.name] = tuple(tensor.dims)
            self.types[path, tensor.name] = tensor.data_type
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.HasField("tensor_type"):
                self._note(path, value)
        for node in graph.node:
            for step, inner in subgraphs(node):
                self._enter(inner, (*path, step))

    def _note(self, path: Any, value: Any) -> None:
        declared = value.type.tensor_type
        self.types[path, value.name] = declared.elem_type
        if not declared.HasField("shape"):
            return
        sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in declared.shape.dim)
        if math.prod(n for n in sizes if n) > LARGEST:
            raise OptionError(f"{value.name} of shape {sizes} is too large to be computed: give a smaller example")
        self.known[path, value.name] = sizes

    def missing(self, scope: Scope) -> list[str]:
        """Return what nodes of a graph write that is floating, or may be, and whose sizes are not known."""
        kinds = (*FLOATS, 0)
        return [name for name in scope.producers if self.elem_type(scope, name) in kinds and not self.of(scope, name)]

    def learn(self, scope: Scope, name: str, array: np.ndarray) -> None:
        """Take over the sizes and type of an array that was seen in a run."""
        self.known[scope.path, name] = array.shape
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        self.types.setdefault((scope.path, name), elem_type)

    def open(self, scope: Scope, name: str) -> tuple[int | None, ...] | None:
        """Return sizes of which some may be open (``None``); ``None`` where nothing is known."""
        home = scope.home(name)
        return None if home is None else self.known.get((home.path, name))

    def of(self, scope: Scope, name: str) -> tuple[int, ...] | None:
        """Return the sizes of a value; ``None`` where one is not known."""
        sizes = self.open(scope, name)
        return None if sizes is None or None in sizes else sizes  # type: ignore[return-value]

    def elem_type(self, scope: Scope, name: str) -> int:
        """Return the number of a value's dtype, 0 where it is not known."""
        home = scope.home(name)
        return 0 if home is None else self.types.get((home.path, name), 0)


def _inferred(bare: Any) -> Any:
    for propagated in (True, False):
        try:
            return onnx.shape_inference.infer_shapes(bare, data_prop=propagated)
        except Exception:  # noqa: S110 - sizes stay unknown, and what needs them is left alone
            pass
    return bare
