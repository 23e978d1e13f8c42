"""What each ONNX operator is in the vocabulary of the neutral picture.

Attributes are whitelisted: a node with one that is not understood here is no word of the vocabulary, and stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchnorm.graph import (
    Activation,
    Add,
    Concat,
    Identity,
    Linear,
    Operation,
    Pad,
    Pool,
    Reshape,
    Transpose,
)
from batchnorm.onnx import linear
from batchnorm.onnx.calls import Call

__all__ = ["Word", "word"]


@dataclass(frozen=True, slots=True)
class Word:
    """What a node does, to which of its inputs.

    Args:
        operation: of the vocabulary.
        inputs: names of what flows through it.
        before_reshape: sizes of the result, where the node also drops the axes that it reduced.
    """

    operation: Operation
    inputs: tuple[str, ...]
    before_reshape: tuple[int, ...] | None = None


def word(call: Call) -> Word | None:
    """Return what a node does; ``None`` where the vocabulary has no word for it, or an attribute is not understood."""
    known = _WORDS.get(call.node.op_type)
    if known is None or call.node.domain not in ("", "ai.onnx") or call.result() is None:
        return None
    speak, attributes = known
    understood = set(attributes.split())
    if any(a.name not in understood or a.ref_attr_name for a in call.node.attribute):
        return None
    return speak(call)


def _linear(read: Callable[[Call], Linear | None]) -> Callable[[Call], Word | None]:
    def speak(call: Call) -> Word | None:
        operation = read(call)
        # one input carries the data: the first that may vary
        return None if operation is None else Word(operation, tuple(call.varying()[:1]))

    return speak


def _plain(operation: Operation) -> Callable[[Call], Word | None]:
    """Say that a node with one input of the shape of its output is always the same."""

    def speak(call: Call) -> Word | None:
        return Word(operation, (call.node.input[0],)) if call.shape(0) == call.result() else None

    return speak


def _leaky(call: Call) -> Word | None:
    rising = call.attributes.get("alpha", 0.01) >= 0
    return Word(Activation(homogeneous=True, monotone=rising), (call.node.input[0],))


def _prelu(call: Call) -> Word | None:
    slope = call.numbers(1)
    if slope is None or call.shape(0) != call.result():
        return None
    return Word(Activation(homogeneous=True, monotone=bool((slope >= 0).all())), (call.node.input[0],))


def _clip(call: Call) -> Word | None:
    if any(call.given(place) and call.constant(place) is None for place in (1, 2)):
        return None
    low, high = call.numbers(1, "min"), call.numbers(2, "max")
    from_zero = low is not None and high is None and not call.given(2) and bool((low == 0).all())
    return Word(Activation(homogeneous=from_zero, monotone=True), (call.node.input[0],))


def _times(call: Call) -> Word | None:
    """Mul and Div by a constant that does not widen the data: each value is multiplied by its own number."""
    places = [place for place in (0, 1) if call.constant(place) is None]
    if len(places) != 1 or call.shape(places[0]) != call.result() or (call.node.op_type == "Div" and places[0] == 1):
        return None
    factor = call.numbers(1 - places[0])
    if factor is None or factor.dtype.kind != "f" or not np.isfinite(factor).all():
        return None
    if call.node.op_type == "Div" and not factor.all():
        return None
    return Word(Activation(homogeneous=True, monotone=bool((factor >= 0).all())), (call.node.input[places[0]],))


def _add(call: Call) -> Word | None:
    shapes = {call.shape(place) for place in range(len(call.node.input))}
    return Word(Add(), tuple(call.node.input)) if shapes == {call.result()} else None


def _concat(call: Call) -> Word | None:
    result, axis = call.result(), call.attributes.get("axis", 1)
    assert result is not None  # noqa: S101
    if not -len(result) <= axis < len(result) or None in {call.shape(place) for place in range(len(call.node.input))}:
        return None
    return Word(Concat(axis % len(result)), tuple(call.node.input))


def _pool(kind: str) -> Callable[[Call], Word | None]:
    def speak(call: Call) -> Word | None:
        x, kernel = call.shape(0), call.attributes.get("kernel_shape")
        if x is None or kernel is None or len(kernel) != len(x) - 2 or len(call.outputs()) > 1:
            return None
        mode, a = call.text("auto_pad", "NOTSET"), call.attributes
        pads = list(a.get("pads", [])) if mode == "NOTSET" else []
        if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER") or (pads and min(pads) < 0):
            return None
        around = any(pads) or mode.startswith("SAME")
        # windows that may hold nothing but padding: no maximum, no average
        spread = around and any(d > 1 for d in a.get("dilations", []))
        empty = spread or any(p >= k for p, k in zip(pads, list(kernel) * 2, strict=False))
        jumps = any(s > k for s, k in zip(a.get("strides", []), kernel, strict=False))
        odd = bool(a.get("ceil_mode", 0)) and (jumps or any(pads))
        if kind == "max":
            return None if empty or odd else Word(Pool("max", _places(x)), (call.node.input[0],))
        counted = empty or odd or ((around or bool(a.get("ceil_mode", 0))) and bool(a.get("count_include_pad", 0)))
        return Word(Pool("average", _places(x), counted), (call.node.input[0],))

    return speak


def _places(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(2, len(shape)))


def _global_pool(kind: str) -> Callable[[Call], Word | None]:
    def speak(call: Call) -> Word | None:
        x = call.shape(0)
        return None if x is None or len(x) < 3 else Word(Pool(kind, _places(x)), (call.node.input[0],))

    return speak


def _reduce(kind: str) -> Callable[[Call], Word | None]:
    def speak(call: Call) -> Word | None:
        x, axes = call.shape(0), call.numbers(1, "axes")
        if x is None or (axes is None and call.given(1)) or (axes is not None and not axes.size):
            return None
        reduced = range(len(x)) if axes is None else sorted({int(a) % len(x) for a in axes.ravel()})
        if axes is None and call.attributes.get("noop_with_empty_axes", 0):
            return None
        kept = tuple(1 if axis in reduced else n for axis, n in enumerate(x))
        operation = Pool(kind, tuple(reduced))
        return Word(operation, (call.node.input[0],), None if call.attributes.get("keepdims", 1) else kept)

    return speak


def _resize(call: Call) -> Word | None:
    """Resize and Upsample where each output is a copy or an average of values nearby."""
    x, result, a = call.shape(0), call.result(), call.attributes
    mode, where = call.text("mode", "nearest"), call.text("coordinate_transformation_mode", "half_pixel")
    places = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    if x is None or result is None or len(x) != len(result) or mode not in ("nearest", "linear") or where not in places:
        return None
    if (
        a.get("antialias", 0)
        or call.text("keep_aspect_ratio_policy", "stretch") != "stretch"
        or a.get("exclude_outside", 0)
    ):
        return None
    moved = _resized_axes(call, x, result)
    return None if moved is None else Word(Pool("average", moved), (call.node.input[0],))


def _resized_axes(call: Call, x: tuple[int, ...], result: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the axes that are resized, or may be on other inputs."""
    old = call.node.op_type == "Upsample" or call.opset < 11
    scales = call.numbers(1, "scales") if old else call.numbers(2)
    axes = [int(axis) % len(x) for axis in call.attributes.get("axes", range(len(x)))]
    if scales is not None and scales.size:
        if scales.size != len(axes) or not (scales > 0).all():
            return None
        return tuple(axis for axis, scale in zip(axes, scales, strict=True) if scale != 1)
    if old or not call.given(3):
        return None
    return tuple(axis for axis in range(len(x)) if x[axis] != result[axis] or (axis > 1 and axis in axes))


def _pad(call: Call) -> Word | None:
    x, mode = call.shape(0), call.text("mode", "constant")
    amounts, value = call.numbers(1, "pads"), call.numbers(2, "value")
    if x is None or amounts is None or mode not in ("constant", "reflect", "edge", "wrap"):
        return None
    if (value is None and call.given(2)) or (call.given(3) and call.numbers(3) is None):
        return None
    listed = call.numbers(3)
    axes = [*range(len(x))] if listed is None else [int(axis) % len(x) for axis in listed]
    if amounts.size != 2 * len(axes):
        return None
    pairs = zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True)
    moved = {axis: max(before, after) for axis, before, after in pairs if before or after}
    constant = 0.0 if value is None else float(value.reshape(-1)[0])
    # what only cuts off puts no constant anywhere
    copies = mode != "constant" or all(n <= 0 for n in moved.values())
    return Word(Pad(tuple(sorted(moved)), None if copies else constant), (call.node.input[0],))


def _reshape(call: Call) -> Word | None:
    return None if call.shape(0) is None else Word(Reshape(), (call.node.input[0],))


def _transpose(call: Call) -> Word | None:
    x = call.shape(0)
    if x is None:
        return None
    order = tuple(call.attributes.get("perm", range(len(x))[::-1]))
    return Word(Transpose(order), (call.node.input[0],)) if sorted(order) == [*range(len(x))] else None


def _dropout(call: Call) -> Word | None:
    training = call.numbers(2)
    if len(call.outputs()) > 1 or (call.given(2) and (training is None or bool(training.any()))):
        return None
    return Word(Identity(), (call.node.input[0],))


_POOL = "auto_pad ceil_mode count_include_pad dilations kernel_shape pads storage_order strides"
_CONV = "auto_pad dilations group kernel_shape pads strides"
_ELEMENTWISE = {
    Activation(homogeneous=True, monotone=True, function=lambda x: np.maximum(x, 0.0)): "Relu",
    Activation(homogeneous=True, function=np.abs): "Abs",
    Activation(homogeneous=True, function=np.negative): "Neg",
    Activation(monotone=True, function=lambda x: 1 / (1 + np.exp(-x))): "Sigmoid",
    Activation(monotone=True, function=np.tanh): "Tanh",
    Activation(monotone=True): "Softplus Softsign Erf Exp Floor Ceil Sign",
    Activation(): "HardSwish Gelu Mish Swish Sin Cos Elu Selu Celu HardSigmoid ThresholdedRelu",
}
_WORDS: dict[str, tuple[Callable[[Call], Word | None], str]] = {
    "Conv": (_linear(linear.conv), _CONV),
    "ConvTranspose": (_linear(linear.conv_transpose), f"{_CONV} output_padding output_shape"),
    "Gemm": (_linear(linear.gemm), "alpha beta transA transB"),
    "MatMul": (_linear(linear.matmul), ""),
    "LeakyRelu": (_leaky, "alpha"),
    "PRelu": (_prelu, ""),
    "Clip": (_clip, "min max"),
    "Mul": (_times, ""),
    "Div": (_times, ""),
    "Add": (_add, ""),
    "Sum": (_add, ""),
    "Concat": (_concat, "axis"),
    "MaxPool": (_pool("max"), _POOL),
    "AveragePool": (_pool("average"), _POOL),
    "GlobalMaxPool": (_global_pool("max"), ""),
    "GlobalAveragePool": (_global_pool("average"), ""),
    "ReduceMax": (_reduce("max"), "axes keepdims noop_with_empty_axes"),
    "ReduceMean": (_reduce("average"), "axes keepdims noop_with_empty_axes"),
    "Resize": (
        _resize,
        "antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside extrapolation_value "
        "keep_aspect_ratio_policy mode nearest_mode",
    ),
    "Upsample": (_resize, "mode scales"),
    "Pad": (_pad, "mode pads value"),
    "Flatten": (_reshape, "axis"),
    "Reshape": (_reshape, "allowzero"),
    "Squeeze": (_reshape, "axes"),
    "Unsqueeze": (_reshape, "axes"),
    "Transpose": (_transpose, "perm"),
    "Identity": (_plain(Identity()), ""),
    "Dropout": (_dropout, "ratio seed"),
}
_WORDS |= {
    name: (_plain(kind), "alpha beta gamma approximate")
    for kind, names in _ELEMENTWISE.items()
    for name in names.split()
}
