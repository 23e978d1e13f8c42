"""Convolutions, pools and interpolation for the reference evaluator, in any dtype that NumPy computes in.

The evaluator's own are written for reading, and some take seconds a layer. What is not computed here is handed to them. Each
operator is a sum over the taps of its kernel: a strided view of the padded data for each.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op

__all__ = ["KERNELS"]

_Pads = list[tuple[int, int]]


class _Kernel(OpRun):  # type: ignore[misc]
    """An operator of the standard that is computed here where it can be."""

    def _stock(self, *inputs: Any) -> Any:
        """Let the evaluator's own implementation do it."""
        version = self.run_params["opsets"][self.onnx_node.domain]
        own = load_op("", self.onnx_node.op_type, version)(self.onnx_node, self.run_params)
        return own.run(*inputs)

    def _given(self, name: str, default: Any) -> Any:
        value = getattr(self, name, None)
        value = value.decode() if isinstance(value, bytes) else value
        return default if value is None or (isinstance(value, list | tuple) and not len(value)) else value


class _Window(_Kernel):
    """An operator with a kernel that slides over the data."""

    def _geometry(self, sizes: tuple[int, ...], kernel: list[int]) -> tuple[list[int], list[int], _Pads]:
        """Return strides, dilations and the padding of each axis."""
        rank = len(kernel)
        strides, dilations = self._given("strides", [1] * rank), self._given("dilations", [1] * rank)
        mode, pads = self._given("auto_pad", "NOTSET"), self._given("pads", [0] * (2 * rank))
        if mode == "NOTSET":
            return strides, dilations, list(zip(pads[:rank], pads[rank:], strict=True))
        if mode == "VALID":
            return strides, dilations, [(0, 0)] * rank
        around: _Pads = []
        for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small = total // 2
            around.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
        return strides, dilations, around


def _taps(kernel: list[int], out: list[int], strides: list[int], dilations: list[int]) -> Iterator[tuple[Any, Any]]:
    """Yield for each tap of a kernel its place, and the slices of the padded data that it reads."""
    for tap in product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, dilations, strict=True)]
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, out, strides, strict=True)]
        yield tap, (..., *(slice(a, e, s) for a, e, s in zip(starts, ends, strides, strict=True)))


def _lengths(x: np.ndarray, kernel: list[int], strides: list[int], dilations: list[int], pads: _Pads) -> list[int]:
    sizes = zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)
    return [max((n + a + b - (k - 1) * d - 1) // s + 1, 0) for n, k, s, d, (a, b) in sizes]


class Conv(_Window):
    """``y[o] = b[o] + Σ_i Σ_tap w[o, i, tap] · x[i, shifted by tap]``."""

    def _run(self, x: Any, w: Any, b: Any = None, **_: Any) -> Any:
        kernel, groups = list(w.shape[2:]), self._given("group", 1)
        strides, dilations, pads = self._geometry(x.shape[2:], kernel)
        out = _lengths(x, kernel, strides, dilations, pads)
        padded = np.pad(x, [(0, 0), (0, 0), *pads])
        # (N, G, I / G, *out) and (G, O / G, I / G, *k)
        split = w.reshape(groups, -1, *w.shape[1:])
        y = np.zeros((x.shape[0], groups, split.shape[1], int(np.prod(out))), _sum_dtype(x))
        for tap, view in _taps(kernel, out, strides, dilations):
            piece = padded[view].reshape(x.shape[0], groups, w.shape[1], -1).astype(y.dtype, copy=False)
            y += _product(split[(..., *tap)].astype(y.dtype, copy=False), piece)
        return (_biased(y.reshape(x.shape[0], w.shape[0], *out), b).astype(x.dtype, copy=False),)


class ConvTranspose(_Window):
    """``y[o, shifted by tap] += Σ_i w[i, o, tap] · x[i]``, then cut by the pads."""

    def _run(self, x: Any, w: Any, b: Any = None, **_: Any) -> Any:
        kernel, groups = list(w.shape[2:]), self._given("group", 1)
        if (
            self._given("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
            or self._given("output_shape", None) is not None
        ):
            return self._stock(*[v for v in (x, w, b) if v is not None])
        strides, dilations, pads = self._geometry(x.shape[2:], kernel)
        more = self._given("output_padding", [0] * len(kernel))
        full = [
            s * (n - 1) + (k - 1) * d + 1 + p
            for n, k, s, d, p in zip(x.shape[2:], kernel, strides, dilations, more, strict=True)
        ]
        split = w.reshape(groups, -1, *w.shape[1:])
        data = x.reshape(x.shape[0], groups, split.shape[1], -1).astype(_sum_dtype(x), copy=False)
        y = np.zeros((x.shape[0], groups, w.shape[1], *full), data.dtype)
        for tap, view in _taps(kernel, list(x.shape[2:]), strides, dilations):
            weight = split[(..., *tap)].swapaxes(1, 2).astype(data.dtype, copy=False)
            y[view] += _product(weight, data).reshape(*y.shape[:3], *x.shape[2:])
        y = y.reshape(x.shape[0], w.shape[1] * groups, *full)
        inside: Any = (..., *(slice(a, n - c) for n, (a, c) in zip(full, pads, strict=True)))
        y = y[inside]
        return (_biased(y, b).astype(x.dtype, copy=False),)


def _sum_dtype(x: np.ndarray) -> Any:
    return np.dtype(np.float32) if x.dtype.itemsize < 4 else x.dtype


def _product(weight: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Multiply ``(G, O, I)`` by ``(N, G, I, L)``; one channel a group needs no matrix product."""
    return np.asarray(weight * data if weight.shape[2] == 1 else np.matmul(weight, data))


def _biased(y: np.ndarray, b: Any) -> np.ndarray:
    return y if b is None else y + b.reshape(-1, *[1] * (y.ndim - 2)).astype(y.dtype)


class _Pool(_Window):
    def _slid(self, x: np.ndarray) -> tuple[list[int], list[int], list[int], list[int], _Pads, _Pads]:
        """Return kernel, output sizes, strides, dilations, and the padding without and with what ``ceil_mode`` adds."""
        kernel = list(self._given("kernel_shape", []))
        strides, dilations, pads = self._geometry(x.shape[2:], kernel)
        out = _lengths(x, kernel, strides, dilations, pads)
        if self._given("ceil_mode", 0):
            for i, (n, k, s, d, (a, b)) in enumerate(zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)):
                out[i] = -(-(n + a + b - (k - 1) * d - 1) // s) + 1
                # a window that starts behind the data is none
                out[i] -= (out[i] - 1) * s >= n + a
        whole = [
            (a, max(b, (m - 1) * s + (k - 1) * d + 1 - n - a))
            for n, m, k, s, d, (a, b) in zip(x.shape[2:], out, kernel, strides, dilations, pads, strict=True)
        ]
        return kernel, out, strides, dilations, pads, whole


class MaxPool(_Pool):
    """The largest value under a window; outside of the data is nothing."""

    def _run(self, x: Any, **_: Any) -> Any:
        if len([name for name in self.onnx_node.output if name]) > 1 or x.dtype.kind not in "fV":
            return self._stock(x)
        kernel, out, strides, dilations, _pads, whole = self._slid(x)
        padded = np.pad(x, [(0, 0), (0, 0), *whole], constant_values=-np.inf)
        y = np.full((*x.shape[:2], *out), -np.inf, x.dtype)
        for _, view in _taps(kernel, out, strides, dilations):
            np.maximum(y, padded[view], out=y)
        return (y,)


class AveragePool(_Pool):
    """The mean under a window, over the data or (``count_include_pad``) over the padding too."""

    def _run(self, x: Any, **_: Any) -> Any:
        kernel, out, strides, dilations, pads, whole = self._slid(x)
        counted = np.ones((1, 1, *x.shape[2:]))
        if self._given("count_include_pad", 0):
            counted = np.pad(counted, [(0, 0), (0, 0), *pads], constant_values=1.0)
            rest = [(0, b - a) for (_, a), (_, b) in zip(pads, whole, strict=True)]
        else:
            rest = whole
        counted = np.pad(counted, [(0, 0), (0, 0), *rest])
        padded = np.pad(x, [(0, 0), (0, 0), *whole])
        y, count = np.zeros((*x.shape[:2], *out), _sum_dtype(x)), np.zeros((1, 1, *out))
        for _, view in _taps(kernel, out, strides, dilations):
            y += padded[view]
            count += counted[view]
        return ((y / count).astype(x.dtype),)


class BatchNormalization(_Kernel):
    """``y = γ · (x - mean) / √(var + ε) + β``; the evaluator's own takes opsets 9 to 13 for training."""

    def _run(self, x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, **_: Any) -> Any:
        training = self._given("training_mode", 0) or len([name for name in self.onnx_node.output if name]) > 1
        if training:
            return self._stock(x, gamma, beta, mean, variance)
        shape = (-1,) + (1,) * (x.ndim - 2) if self._given("spatial", 1) else x.shape[1:]
        dtype = _sum_dtype(x)
        gamma, beta, mean, variance = (v.astype(dtype).reshape(shape) for v in (gamma, beta, mean, variance))
        y = gamma * (x.astype(dtype) - mean) / np.sqrt(variance + dtype.type(self.epsilon)) + beta
        return (y.astype(x.dtype),)


class Pad(_Kernel):
    """Places around the data, or fewer of them where the number is negative."""

    def _run(self, x: Any, amounts: Any = None, value: Any = None, axes: Any = None, **_: Any) -> Any:
        amounts = list(self.pads if amounts is None else amounts)
        listed = range(x.ndim) if axes is None else [int(axis) % x.ndim for axis in axes]
        pairs = {axis: (amounts[i], amounts[i + len(listed)]) for i, axis in enumerate(listed)}
        whole = [pairs.get(axis, (0, 0)) for axis in range(x.ndim)]
        kept = tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(x.shape, whole, strict=True))
        around = [(max(a, 0), max(b, 0)) for a, b in whole]
        mode = self._given("mode", "constant")
        if mode != "constant":
            return (np.pad(x[kept], around, mode=mode),)
        constant = getattr(self, "value", 0.0) if value is None else np.asarray(value).reshape(-1)[0]
        return (np.pad(x[kept], around, constant_values=constant).astype(x.dtype, copy=False),)


class _Interpolation(_Kernel):
    def _sized(
        self, x: np.ndarray, scales: np.ndarray | None, sizes: np.ndarray | None
    ) -> list[tuple[int, int, float]]:
        """Return axis, length and scale for each axis that changes."""
        axes = [axis % x.ndim for axis in self._given("axes", list(range(x.ndim)))]
        if sizes is not None and sizes.size:
            return [
                (axis, int(n), n / x.shape[axis]) for axis, n in zip(axes, sizes, strict=True) if n != x.shape[axis]
            ]
        assert scales is not None  # noqa: S101
        return [
            (axis, int(np.floor(x.shape[axis] * s)), float(s)) for axis, s in zip(axes, scales, strict=True) if s != 1
        ]

    def _resized(
        self, x: np.ndarray, scales: Any, sizes: Any, place: Callable[[int, int, float], np.ndarray]
    ) -> np.ndarray:
        nearest = self._given("mode", "nearest") == "nearest"
        for axis, length, scale in self._sized(x, scales, sizes):
            last, at = x.shape[axis] - 1, place(x.shape[axis], length, scale)
            if nearest:
                x = x.take(np.clip(at, 0, last).astype(np.int64), axis=axis)
                continue
            at = np.clip(at, 0, last)
            low = np.minimum(np.floor(at).astype(np.int64), max(last - 1, 0))
            part = (at - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)]).astype(x.dtype)
            x = x.take(low, axis=axis) * (1 - part) + x.take(np.minimum(low + 1, last), axis=axis) * part
        return x


class Upsample(_Interpolation):
    """Copies or averages of the values nearby, by the rule ``x = y / scale``."""

    def _run(self, x: Any, scales: Any = None, **_: Any) -> Any:
        if self._given("mode", "nearest") not in ("nearest", "linear"):
            return self._stock(*[v for v in (x, scales) if v is not None])
        nearest = self._given("mode", "nearest") == "nearest"
        scales = np.asarray(self.scales) if scales is None else scales

        def place(_: int, length: int, scale: float) -> np.ndarray:
            at = np.arange(length) / scale
            return np.floor(at) if nearest else at

        return (self._resized(x, scales, None, place),)


class Resize(_Interpolation):
    """Copies or averages of the values nearby, by the rules of opset 11 and later."""

    def _run(self, x: Any, *inputs: Any, **_: Any) -> Any:
        rule, version = self._given("coordinate_transformation_mode", "half_pixel"), self.run_params["opsets"][""]
        known = rule in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        odd = self._given("antialias", 0) or self._given("keep_aspect_ratio_policy", "stretch") != "stretch"
        if version < 11 or odd or not known or self._given("mode", "nearest") not in ("nearest", "linear"):
            return self._stock(x, *inputs)
        _, scales, sizes = (*inputs, None, None, None)[:3]
        nearest = self._given("mode", "nearest") == "nearest"
        rounding = _ROUNDINGS[self._given("nearest_mode", "round_prefer_floor")]

        def place(old: int, length: int, scale: float) -> np.ndarray:
            at = _source(np.arange(length), old, length, scale, rule)
            return rounding(at) if nearest else at

        return (self._resized(x, scales, sizes, place),)


def _source(y: np.ndarray, old: int, length: int, scale: float, rule: str) -> np.ndarray:
    """Return where in the input a place of the output lies."""
    if rule == "align_corners":
        return y * ((old - 1) / (length - 1)) if length > 1 else y * 0.0
    if rule == "asymmetric":
        return y / scale
    if rule == "pytorch_half_pixel" and length == 1:
        return y * 0.0
    return (y + 0.5) / scale - 0.5


_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
}
KERNELS = [BatchNormalization, Conv, ConvTranspose, MaxPool, AveragePool, Pad, Resize, Upsample]
"""Operators by the name of their class, as ``ReferenceEvaluator(new_ops=...)`` wants them."""
