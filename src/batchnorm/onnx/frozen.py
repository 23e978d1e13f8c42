"""Frozen normalization: a Mul and an Add of one constant for each channel, as detectors have it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm.graph import Norm
from batchnorm.onnx.calls import Call
from batchnorm.onnx.scopes import Index, Scope
from batchnorm.onnx.shapes import Shapes

__all__ = ["COMPUTES", "frozen_norm", "wide_constant"]

COMPUTES: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Neg": np.negative,
}
"""What makes scale and shift of statistics."""
_LAYS_OUT = ("Identity", "Reshape", "Squeeze", "Unsqueeze")
_DEPTH = 16


def frozen_norm(call: Call) -> tuple[Norm, Any, str] | None:
    """Return the normalization that a Mul and the only reader of its product, an Add, are: with the Add, and the input's name.

    Its scale and shift are computed in float64 from the constants that the model holds.
    """
    found = _times_constant(call)
    if found is None or not _is_of_channels(found[1], call):
        return None
    source, scale = found
    product = call.node.output[0]
    readers = call.scope.readers.get(product, [])
    if len(readers) != 1 or product in call.scope.outputs or readers[0][0] is not call.scope:
        return None
    _, add, place = readers[0]
    if add is None or add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
        return None
    shift = wide_constant(call.index, call.shapes, call.scope, add.input[1 - place])
    if shift is None or not _is_of_channels(shift, call):
        return None
    scale, shift = scale.reshape(-1), shift.reshape(-1)
    mean, variance = np.zeros_like(shift), np.ones_like(scale)
    return Norm(call.name, mean, variance, scale, shift, 0.0, computed="it is frozen", plain=True), add, source


def _times_constant(call: Call) -> tuple[str, np.ndarray] | None:
    """Return what a Mul multiplies by a constant, and that constant."""
    if call.node.op_type != "Mul" or call.node.domain not in ("", "ai.onnx") or len(call.node.input) != 2:
        return None
    factors = [wide_constant(call.index, call.shapes, call.scope, name) for name in call.node.input]
    if (factors[0] is None) == (factors[1] is None):
        return None
    place = 0 if factors[0] is None else 1
    factor = factors[1 - place]
    assert factor is not None  # noqa: S101
    return call.node.input[place], factor


def _is_of_channels(values: np.ndarray, call: Call) -> bool:
    """Whether a constant has one number for each channel of an image or a sequence, along its second axis."""
    shape = call.result()
    if shape is None or len(shape) < 3 or values.ndim > len(shape):
        return False
    full = (1,) * (len(shape) - values.ndim) + values.shape
    return full == (1, shape[1]) + (1,) * (len(shape) - 2) and shape in (call.shape(0), call.shape(1))


def wide_constant(index: Index, shapes: Shapes, scope: Scope, name: str, depth: int = _DEPTH) -> np.ndarray | None:
    """Return a constant, or what plain arithmetic makes of constants, in float64; ``None`` for anything else."""
    constant = index.constant(scope, name)
    if constant is not None:
        usable = not constant.overridable and constant.read().dtype.kind == "f"
        return constant.read().astype(np.float64) if usable else None
    home = scope.home(name)
    node = None if home is None else home.producers.get(name)
    if home is None or node is None or node.domain not in ("", "ai.onnx") or depth == 0:
        return None
    if node.op_type in _LAYS_OUT:
        inner = wide_constant(index, shapes, home, node.input[0], depth - 1)
        shape = shapes.of(home, name)
        return None if inner is None or shape is None else inner.reshape(shape)
    if node.op_type not in COMPUTES or node.attribute:
        return None
    operands = [wide_constant(index, shapes, home, each, depth - 1) for each in node.input]
    known = [operand for operand in operands if operand is not None]
    with np.errstate(all="ignore"):
        return COMPUTES[node.op_type](*known) if len(known) == len(operands) else None
