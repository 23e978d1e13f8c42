"""What the operations of ATen are in the neutral vocabulary; those without weights of their own.

Each reader gets the arguments of a call by name and returns the operation and the tensors that flow through it, or ``None``
where the arguments ask for something that the vocabulary does not have.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from batchnorm.graph import Activation, Add, Concat, Identity, Operation, Pad, Pool, Reshape, Transpose
from batchnorm.torch.events import Call, Slot

__all__ = ["arguments", "read"]

Read = tuple[Operation, list[Slot]] | None


def arguments(call: Call) -> dict[str, Any]:
    """Return all arguments of a call by name, defaults filled in."""
    schema = call.function._schema.arguments
    given = dict(zip((a.name for a in schema), call.args, strict=False)) | call.kwargs
    return {a.name: a.default_value for a in schema if a.has_default_value()} | given


def read(call: Call) -> Read:
    """Return what a call does, in the neutral vocabulary; ``None`` where it has no word for it."""
    reader = _READERS.get(call.name)
    return None if reader is None else reader(arguments(call), call)


def _activation(*, homogeneous: bool = False, monotone: bool = False) -> Callable[[dict[str, Any], Call], Read]:
    def read_activation(given: dict[str, Any], call: Call) -> Read:
        return Activation(homogeneous, monotone, partial(_apply, call)), [given["self"]]

    return read_activation


def _apply(call: Call, values: np.ndarray) -> np.ndarray:
    """Compute an activation on other values, with the arguments of its call."""
    x = torch.from_numpy(np.array(values, dtype=np.float64))
    args = [x, *call.args[1:]]
    with torch.no_grad():
        return np.asarray(call.function(*args, **call.kwargs))


def _prelu(given: dict[str, Any], call: Call) -> Read:
    return Activation(homogeneous=True), [given["self"]]


def _add(given: dict[str, Any], call: Call) -> Read:
    x, y = given["self"], given["other"]
    if not isinstance(y, Slot) or not (x.depends and y.depends) or given.get("alpha", 1) != 1:
        return None
    return (Add(), [x, y]) if x.shape == y.shape and x.dtype == y.dtype else None


def _cat(given: dict[str, Any], call: Call) -> Read:
    tensors = given["tensors"]
    # torch lets empty tensors of one axis join any others
    if any(not slot.depends or slot.dtype != tensors[0].dtype or len(slot.shape) < 2 for slot in tensors):
        return None
    return Concat(given["dim"] % len(tensors[0].shape)), list(tensors)


def _average_pool(given: dict[str, Any], call: Call) -> Read:
    if given.get("divisor_override") is not None:
        return None
    counted = any(given.get("padding") or ()) and bool(given.get("count_include_pad", True))
    return Pool("average", _places(given["self"], len(given["kernel_size"])), counted), [given["self"]]


def _adaptive_average(given: dict[str, Any], call: Call) -> Read:
    return Pool("average", _places(given["self"], len(given["output_size"]))), [given["self"]]


def _max_pool(given: dict[str, Any], call: Call) -> Read:
    size = given.get("kernel_size") or given["output_size"]
    return Pool("max", _places(given["self"], len(size))), [given["self"]]


def _interpolate(given: dict[str, Any], call: Call) -> Read:
    x: Slot = given["self"] if "self" in given else given["input"]
    return Pool("average", tuple(range(2, len(x.shape)))), [x]


def _mean(given: dict[str, Any], call: Call) -> Read:
    x, dims = given["self"], given.get("dim")
    if not dims or given.get("dtype") not in (None, x.dtype):
        return None
    return Pool("average", tuple(sorted(d % len(x.shape) for d in dims))), [x]


def _amax(given: dict[str, Any], call: Call) -> Read:
    x, dims = given["self"], given.get("dim")
    return (Pool("max", tuple(sorted(d % len(x.shape) for d in dims))), [x]) if dims else None


def _constant_pad(given: dict[str, Any], call: Call) -> Read:
    pad, x = given["pad"], given["self"]
    # cropping is no padding, but passes all the same
    axes = tuple(len(x.shape) - 1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1])
    return Pad(axes, float(given.get("value", 0))), [x]


def _edge_pad(given: dict[str, Any], call: Call) -> Read:
    x = given["self"]
    return Pad(_places(x, len(given["padding"]) // 2)), [x]


def _reshape(given: dict[str, Any], call: Call) -> Read:
    x = given["self"]
    return (Reshape(), [x]) if prod(x.shape) == prod(call.outputs[0].shape) else None


def _permute(given: dict[str, Any], call: Call) -> Read:
    x = given["self"]
    return Transpose(tuple(d % len(x.shape) for d in given["dims"])), [x]


def _transpose(given: dict[str, Any], call: Call) -> Read:
    x = given["self"]
    order = list(range(len(x.shape)))
    a, b = (given["dim0"], given["dim1"]) if "dim0" in given else (0, -1)
    if order:
        order[a], order[b] = order[b], order[a]
    return Transpose(tuple(order)), [x]


def _same(given: dict[str, Any], call: Call) -> Read:
    x = given["self"]
    return (Identity(), [x]) if call.outputs[0].dtype == x.dtype and call.outputs[0].shape == x.shape else None


def _dropout(given: dict[str, Any], call: Call) -> Read:
    return None if given.get("train") else (Identity(), [given.get("input") or given["self"]])


def _places(x: Slot, n: int) -> tuple[int, ...]:
    return tuple(range(len(x.shape) - n, len(x.shape)))


_HOMOGENEOUS = ("relu", "relu_", "leaky_relu", "leaky_relu_")
_MONOTONE = (
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "hardtanh",
    "hardtanh_",
    "hardsigmoid",
    "hardsigmoid_",
    "softplus",
    "elu",
    "elu_",
)
_CURVED = ("gelu", "gelu_", "silu", "silu_", "hardswish", "hardswish_", "mish", "mish_")

_READERS: dict[str, Callable[[dict[str, Any], Call], Read]] = {
    **dict.fromkeys(_HOMOGENEOUS, _activation(homogeneous=True, monotone=True)),
    **dict.fromkeys(_MONOTONE, _activation(monotone=True)),
    **dict.fromkeys(_CURVED, _activation()),
    "prelu": _prelu,
    "_prelu_kernel": _prelu,
    "add": _add,
    "add_": _add,
    "cat": _cat,
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average_pool),
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        _adaptive_average,
    ),
    **dict.fromkeys(
        (
            "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d",
            "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        ),
        _max_pool,
    ),
    **dict.fromkeys(
        (
            "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
            "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
            "upsample_trilinear3d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
        ),
        _interpolate,
    ),
    "mean": _mean,
    "amax": _amax,
    "constant_pad_nd": _constant_pad,
    **dict.fromkeys(
        (
            "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
            "replication_pad1d", "replication_pad2d", "replication_pad3d",
        ),
        _edge_pad,
    ),
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "expand", "flatten", "_reshape_alias", "unflatten"),
        _reshape,
    ),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "_to_copy", "lift_fresh"), _same),
    **dict.fromkeys(("dropout", "native_dropout", "feature_dropout", "alpha_dropout"), _dropout),
}  # fmt: skip
