"""Dense layers and convolutions of Keras: where their channels are, how they are read, how they are written."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from batchnorm.arrays import Array
from batchnorm.graph import Layout
from batchnorm.keras.internals import as_array, found_class, producers
from batchnorm.keras.layers import ScaleShift

__all__ = [
    "Step",
    "Values",
    "assign",
    "bias_config",
    "bias_of",
    "has_kernel",
    "linear_before",
    "no_bias_config",
    "read",
    "steps",
    "why_locked",
    "why_no_bias",
]

Shape = tuple[int, ...]
Values = dict[str, tuple[Array, Array | None]]
"""New kernel and bias of a layer, by the name of the kernel."""

_KERNELS = {"depthwise": "depthwise_kernel", "pointwise": "pointwise_kernel", "kernel": "kernel", "scale": "scale"}


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of a linear layer at work; a separable convolution has two.

    Args:
        kernel: its name, a key of `Values`.
        layout: where the channels are in it.
        axes: of the input channels and of the output channels in the data.
        shape: of what it puts out.
        padding: zeros around the data.
        every_tap: whether each output sees all weights of its channel.
    """

    kernel: str
    layout: Layout
    axes: tuple[int, int]
    shape: Shape
    padding: tuple[tuple[int, int, int], ...] = ()
    every_tap: bool = True


def steps(layer: Any, shape: Shape, symbolic: tuple[int | None, ...], output: Shape) -> list[Step] | None:
    """Return what a linear layer does, before its activation, to data of a shape; ``None`` for any other layer.

    Args:
        layer: a layer.
        shape: of its input.
        symbolic: the same, ``None`` for the sizes that the model leaves open.
        output: the shape of its output.
    """
    known = ScaleShift if type(layer) is ScaleShift else found_class(layer)
    reader = _READERS.get(known)
    return None if reader is None else reader(layer, shape, symbolic, output)


def _dense(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step]:
    last = len(shape) - 1
    return [Step("kernel", Layout(out_axis=-1, in_axis=-2), (last, last), output)]


def _einsum(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step] | None:
    letters = _letters(layer, len(shape))
    if letters is None:
        return None
    data, kernel, into, out = letters
    axis = data.index(into)
    return [Step("kernel", Layout(out_axis=kernel.index(out), in_axis=kernel.index(into)), (axis, axis), output)]


def _letters(layer: Any, ndim: int) -> tuple[str, str, str, str] | None:
    """Return the letters of the data, of the kernel, and of its two channel axes; ``None`` if it is no plain dense layer."""
    match = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", layer.equation.replace(" ", ""))
    if match is None or any(side.count(".") not in (0, 3) for side in match.groups()):
        return None
    given, kernel, wanted = match.groups()
    others = "0123456789"[: ndim - len(given.replace("...", ""))]
    data, wanted = given.replace("...", others), wanted.replace("...", others)
    if len(data) != ndim or len(set(data)) != ndim or len(kernel) != 2:
        return None
    into, out = sorted(kernel, key=lambda letter: letter not in data)
    fits = into in data and out not in data and wanted == data.replace(into, out)
    return (data, kernel, into, out) if fits and layer.bias_axes in (None, out) else None


def _conv(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step] | None:
    if len(shape) != layer.rank + 2:
        return None
    layout = Layout(out_axis=-1, in_axis=-2, groups=layer.groups)
    return [Step("kernel", layout, _axes(layer), output, _padding(layer, shape, symbolic))]


def _depthwise_layout(layer: Any, channels: int) -> Layout:
    shape = (*layer.kernel_size, 1, channels * layer.depth_multiplier)
    return Layout(out_axis=-1, in_axis=-2, groups=channels, shape=shape)


def _depthwise(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step] | None:
    if len(shape) != layer.rank + 2:
        return None
    axes = _axes(layer)
    layout = _depthwise_layout(layer, shape[axes[0]])
    return [Step("kernel", layout, axes, output, _padding(layer, shape, symbolic))]


def _separable(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step] | None:
    if len(shape) != layer.rank + 2:
        return None
    axes = _axes(layer)
    channels = shape[axes[0]]
    between = list(output)
    between[axes[0]] = channels * layer.depth_multiplier
    return [
        Step("depthwise", _depthwise_layout(layer, channels), axes, tuple(between), _padding(layer, shape, symbolic)),
        Step("pointwise", Layout(out_axis=-1, in_axis=-2), axes, output),
    ]


def _transposed(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step] | None:
    if len(shape) != layer.rank + 2:
        return None
    return [Step("kernel", Layout(out_axis=-2, in_axis=-1), _axes(layer), output, every_tap=False)]


def _scale_shift(layer: Any, shape: Shape, symbolic: Any, output: Shape) -> list[Step]:
    axis = layer.axis % len(shape)
    layout = Layout(out_axis=1, in_axis=0, groups=shape[axis], shape=(1, shape[axis]))
    return [Step("scale", layout, (axis, axis), output)]


def _axes(layer: Any) -> tuple[int, int]:
    axis = 1 if layer.data_format == "channels_first" else layer.rank + 1
    return axis, axis


def _padding(layer: Any, shape: Shape, symbolic: tuple[int | None, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return the zeros that a convolution puts around its input; where a size is open, those of the worst size."""
    first = 2 if layer.data_format == "channels_first" else 1
    amounts = []
    for i in range(layer.rank):
        axis, stride = first + i, layer.strides[i]
        reach = (layer.kernel_size[i] - 1) * layer.dilation_rate[i]
        if layer.padding == "causal":
            amounts.append((axis, reach, 0))
        elif layer.padding != "valid":
            open_size = symbolic[axis] is None
            total = reach if open_size else max(0, ((shape[axis] - 1) // stride) * stride + reach + 1 - shape[axis])
            amounts.append((axis, total // 2, total - total // 2))
    return tuple(amount for amount in amounts if any(amount[1:]))


_READERS: dict[Any, Callable[[Any, Shape, Any, Shape], list[Step] | None]] = {
    ScaleShift: _scale_shift,
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum,
    **dict.fromkeys((keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D), _conv),
    **dict.fromkeys((keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D), _depthwise),
    **dict.fromkeys((keras.layers.SeparableConv1D, keras.layers.SeparableConv2D), _separable),
    **dict.fromkeys(
        (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose), _transposed
    ),
}


def linear_before(layer: Any) -> Any | None:
    """Return the linear layer whose output a layer is called with, and nothing else; ``None`` where there is none."""
    found = list(producers(layer))
    return found[0] if len(found) == 1 and _is_linear(found[0]) else None


def _is_linear(layer: Any) -> bool:
    """Whether a layer puts out a weighted sum of its input, without an activation."""
    return has_kernel(layer) and layer.activation is keras.activations.linear


def has_kernel(layer: Any) -> bool:
    """Whether a layer is a dense layer or a convolution of Keras."""
    known = found_class(layer)
    return known in _READERS and known is not ScaleShift


# -- reading -------------------------------------------------------------------------------------------------------


def why_locked(layer: Any) -> str:
    """Return why the weights of a linear layer may not change; empty where they may."""
    if layer.quantization_mode is not None:
        return f"it is quantized ({layer.quantization_mode}): fold before quantizing"
    if getattr(layer, "lora_enabled", False):
        return "it has LoRA weights: save and load the model, which merges them"
    if layer.variable_dtype == "bfloat16" and keras.backend.backend() != "torch":
        return "its weights are bfloat16: give it the dtype policy mixed_bfloat16"
    if not keras.backend.is_float_dtype(layer.variable_dtype):
        return f"its weights are {layer.variable_dtype}"
    return ""


def why_no_bias(layer: Any) -> str:
    """Return why a linear layer can't be given a bias; empty where it can."""
    if type(layer) is ScaleShift or type(layer).__module__.startswith("keras.src."):
        return ""
    return f"it is of the class {type(layer).__name__}, which may have its reasons: give it a bias of zeros"


def bias_of(layer: Any) -> Any:
    """Return the variable that a linear layer adds; ``None`` without one."""
    return layer.shift if type(layer) is ScaleShift else layer.bias


def read(layer: Any, kernel: str) -> tuple[Array, Array | None]:
    """Return a kernel, and the bias that belongs to it, as they are stored."""
    bias = None if kernel == "depthwise" else bias_of(layer)
    return _stored(getattr(layer, _KERNELS[kernel])), None if bias is None else _stored(bias).reshape(-1)


def _stored(variable: Any) -> Array:
    if keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
        # NumPy has no such dtype, torch has
        return variable.value.detach()
    return as_array(variable.value)


# -- writing -------------------------------------------------------------------------------------------------------


def bias_config(layer: Any) -> dict[str, Any]:
    """Return the entries of its config that give a linear layer a bias."""
    if isinstance(layer, keras.layers.EinsumDense):
        kernel = layer.equation.split(",")[1].split("->")[0].strip()
        data = layer.equation.split(",")[0]
        return {"bias_axes": next(letter for letter in kernel if letter not in data)}
    return {"use_bias": True}


def no_bias_config(layer: Any) -> dict[str, Any]:
    """Return the entries of its config that take the bias from a linear layer; nothing for a class that may need it."""
    if why_no_bias(layer) or type(layer) is ScaleShift:
        return {}
    return {"bias_axes": None} if isinstance(layer, keras.layers.EinsumDense) else {"use_bias": False}


def assign(layer: Any, values: Values) -> None:
    """Write new kernels and biases into a layer that has room for them."""
    for kernel, (weight, _) in values.items():
        getattr(layer, _KERNELS[kernel]).assign(weight)
    biases = [bias for _, bias in values.values() if bias is not None]
    if "depthwise" in values and values["depthwise"][1] is not None:
        biases = [_through_pointwise(layer, values)]
    for bias in biases:
        variable = bias_of(layer)
        assert variable is not None  # noqa: S101
        variable.assign(bias.reshape(tuple(variable.shape)))


def _through_pointwise(layer: Any, values: Values) -> np.ndarray:
    """Return the bias of a separable convolution whose depthwise kernel was given one, ``b + Σ_c P[c, o] · d[c]``."""
    depthwise = values["depthwise"][1]
    assert depthwise is not None  # noqa: S101
    kernel, bias = (_wide(v.value) for v in (layer.pointwise_kernel, layer.bias))
    if "pointwise" in values:
        kernel, own = values["pointwise"]
        kernel, bias = _wide(kernel), np.zeros_like(bias) if own is None else _wide(own)
    total: np.ndarray = bias + _wide(depthwise) @ kernel.reshape(-1, kernel.shape[-1])
    return total


def _wide(v: Any) -> np.ndarray:
    return as_array(v).astype(np.float64)
