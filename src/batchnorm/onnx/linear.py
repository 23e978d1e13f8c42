"""Convolutions and matrix products of ONNX, in the words of the neutral picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.graph import Layout, Linear, Weights
from batchnorm.onnx.calls import Call
from batchnorm.onnx.scopes import Constant, Site
from batchnorm.onnx.tensors import FLOATS, dtype_name

__all__ = ["LinearKey", "conv", "conv_transpose", "gemm", "matmul"]


@dataclass(frozen=True, slots=True)
class LinearKey:
    """Where the numbers of a linear layer are in the model.

    Args:
        site: the node.
        weight: the place of the weight among its inputs.
        bias: the node that adds the bias (the same one, or an Add behind it) and the place there; ``None`` where an Add
            has to be made.
        bias_shape: what the bias looks like there.
    """

    site: Site
    weight: int
    bias: tuple[Site, int] | None
    bias_shape: tuple[int, ...] = (-1,)


def conv(call: Call) -> Linear | None:
    """Conv: the kernel is ``(O, I / groups, *k)``."""
    geometry = _geometry(call)
    x, groups = call.shape(0), call.attributes.get("group", 1)
    if geometry is None or x is None or groups < 1 or call.constant(0) is not None:
        return None
    kernel, before, after = geometry
    weight = call.shape(1)
    assert weight is not None  # noqa: S101
    if len(weight) != len(x) or weight[1] * groups != x[1] or weight[0] % groups:
        return None
    padding = tuple((axis + 2, a, b) for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a or b)
    layer = _weights(call, Layout(0, 1, groups), outputs=weight[0], bias=2)
    return Linear(layer, 1, 1, padding) if kernel else None


def conv_transpose(call: Call) -> Linear | None:
    """ConvTranspose: the kernel is ``(I, O / groups, *k)``; its pads cut off, they put nothing around the data."""
    geometry = _geometry(call)
    x, groups = call.shape(0), call.attributes.get("group", 1)
    if geometry is None or x is None or groups < 1 or call.constant(0) is not None:
        return None
    weight = call.shape(1)
    assert weight is not None  # noqa: S101
    if len(weight) != len(x) or weight[0] != x[1] or weight[0] % groups:
        return None
    a = call.attributes
    pointwise = all(n == 1 for n in (*geometry[0], *a.get("strides", ())))
    exact = pointwise and not any(
        (*geometry[1], *geometry[2], *a.get("output_padding", ()), *a.get("output_shape", ()))
    )
    layer = _weights(call, Layout(1, 0, groups, "in"), outputs=weight[1] * groups, bias=2)
    return Linear(layer, 1, 1, every_tap=exact)


def _geometry(call: Call) -> tuple[list[int], list[int], list[int]] | None:
    """Return kernel sizes and the padding before and after; ``None`` for what is not understood.

    Automatic padding depends on the size of the input, so a place with more than one tap counts as padded.
    """
    weight = call.shape(1)
    if weight is None or len(weight) < 3:
        return None
    kernel = list(weight[2:])
    pads = list(call.attributes.get("pads", [0] * (2 * len(kernel))))
    mode = call.text("auto_pad", "NOTSET")
    if list(call.attributes.get("kernel_shape", kernel)) != kernel or len(pads) != 2 * len(kernel) or min(pads) < 0:
        return None
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        padded = [int(k > 1) for k in kernel]
        return kernel, padded, padded
    if mode == "VALID":
        pads = [0] * len(pads)
    return (kernel, pads[: len(kernel)], pads[len(kernel) :]) if mode in ("NOTSET", "VALID") else None


def gemm(call: Call) -> Linear | None:
    """Gemm: ``α · A · B + β · C`` with a constant B; α and β are taken into the weights where that is exact."""
    a, b = call.shape(0), call.shape(1)
    if a is None or b is None or (len(a), len(b)) != (2, 2) or call.constant(0) is not None:
        return None
    inputs, outputs = (1, 0) if call.attributes.get("transB", 0) else (0, 1)
    layer = _weights(call, Layout(outputs, inputs), outputs=b[outputs], bias=2)
    if call.opset < 11:
        layer.fixed = "Gemm has to have a bias before opset 11"
    factors = call.attributes.get("alpha", 1.0), call.attributes.get("beta", 1.0)
    if factors != (1.0, 1.0) and not layer.locked:
        _scale(layer, *factors)
    return Linear(layer, 0 if call.attributes.get("transA", 0) else 1, 1)


def _scale(layer: Weights, alpha: float, beta: float) -> None:
    """Let a layer's numbers hold two factors, or lock it where they would be rounded."""
    read = layer.read

    def scaled() -> tuple[Any, Any]:
        weight, bias = read()
        return _times(weight, alpha), None if bias is None else _times(bias, beta)

    held, products = read(), scaled()
    for values, product, factor in zip(held, products, (alpha, beta), strict=True):
        if values is not None and not np.array_equal(values.astype(np.float64) * factor, product.astype(np.float64)):
            layer.locked = (
                f"its factors alpha = {alpha:g} and beta = {beta:g} can't be taken into them without rounding"
            )
    layer.read = scaled


def _times(values: Any, factor: float) -> Any:
    with np.errstate(over="ignore"):
        return (values.astype(np.float64) * factor).astype(values.dtype)


def matmul(call: Call) -> Linear | None:
    """MatMul with a constant matrix on either side; an Add of a constant vector behind it is its bias."""
    left = call.constant(0) is not None
    x, weight = (call.shape(1), call.shape(0)) if left else (call.shape(0), call.shape(1))
    if x is None or weight is None or len(x) < 2 or len(weight) != 2 or call.constant(int(left)) is not None:
        return None
    if call.constant(1 - int(left)) is None:
        return None
    axis = len(x) - (2 if left else 1)
    layout = Layout(0, 1) if left else Layout(1, 0)
    return Linear(_weights(call, layout, outputs=weight[layout.out_axis], weight=0 if left else 1), axis, axis)


def _weights(call: Call, layout: Layout, outputs: int, *, weight: int = 1, bias: int | None = None) -> Weights:
    """Return the numbers of a layer, and why they may not change, if so."""
    site = call.scope.site(call.node)
    held, added = call.constant(weight), None if bias is None or not call.given(bias) else call.constant(bias)
    computed = bias is not None and call.given(bias) and added is None
    sources = [call.source(place) for place in (weight, bias) if place is not None and call.given(place)]
    locked = next((reason for reason in sources if reason), "")
    types = {c.elem_type for c in (held, added) if c is not None}
    if not locked and (len(types) != 1 or not types <= set(FLOATS)):
        locked = f"they are of {', '.join(map(dtype_name, sorted(types)))}"
    if not locked and added is not None and not _per_output(added, outputs):
        locked = f"its bias of shape {added.shape} is not one number for each output"
    key = LinearKey(site, weight, None if bias is None else (site, bias))
    read = _reader(held, added, outputs)
    return Weights(call.name, layout, read, has_bias=added is not None or computed, locked=locked, key=key)


def _per_output(bias: Constant, outputs: int) -> bool:
    """Whether a bias broadcasts along the last axis alone."""
    if any(n != 1 for n in bias.shape[:-1]):
        return False
    return not bias.shape or bias.shape[-1] in (1, outputs)


def _reader(held: Constant | None, added: Constant | None, outputs: int) -> Any:
    def read() -> tuple[Any, Any]:
        assert held is not None  # noqa: S101
        bias = None if added is None else np.broadcast_to(added.read().reshape(-1), (outputs,))
        return held.read(), bias

    return read
