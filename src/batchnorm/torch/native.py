"""Normalization by ATen's kernels, where their sums are exact.

ATen sums channels-last and ``(N, C)`` batches in float32, one row after another, which costs digits as a batch grows or its
mean moves away from zero: see `rows`. ATen's derivatives are right up to the second order; when more are asked for, the
definition gives them.
"""

import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, native_batch_norm
from torch.autograd import forward_ad

from batchnorm.functional import batch_norm_backward
from batchnorm.kernels.running import MOVED, NOT_FINITE
from batchnorm.moments import Moments
from batchnorm.torch.choice import HAS_NUMBA, Running, is_eager, is_sound, may_move
from batchnorm.torch.fused import kernels
from batchnorm.torch.rows import FEW_ROWS, are_near, bound_of, full, in_rows, normalize_rows

__all__ = ["dense", "normalize", "normalize_in_place"]

# values from which the statistics are looked over by a kernel
WORTH_A_KERNEL = 1 << 13


def dense(x: Tensor) -> Tensor:
    """Return ``x`` in a layout that ATen sums exactly, which strides of another order are not."""
    return x if x.is_contiguous() or in_rows(x) else x.contiguous()


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Normalize by ATen, which leaves the batch's statistics in buffers of our own: a step of momentum 1."""
    count = x.numel() // x.shape[1]
    weight, bias = full(weight, x), full(bias, x)
    dtype = torch.float32 if x.element_size() < 4 else x.dtype
    mean, var = x.new_zeros(2, x.shape[1], dtype=dtype).unbind()
    if is_eager(x):
        # the node that `normalize_in_place` makes, so that one of them can be run again as the other
        y, *_ = _checked(x, weight, bias, mean, var, 1.0, eps)
        _derive_to_any_order(y)
    else:
        y = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
    m2 = var.double() * (count - 1) if count > 1 else torch.zeros_like(var, dtype=torch.float64)
    return y, Moments(count, mean.double(), m2)


def normalize_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float
) -> Tensor | None:
    """Normalize and move the running statistics, in one call of ATen's where its sums are exact.

    Returns ``None``, and changes nothing, if something is not finite.
    """
    if x.is_contiguous():
        rows = x.shape[0] if x.ndim == 2 else 0
    else:
        x = dense(x)
        rows = x.numel() // x.shape[1] if in_rows(x) else 0
    if rows > FEW_ROWS:
        return _rows_in_place(x, weight, bias, running, eps)
    if x.numel() >= WORTH_A_KERNEL and _is_plain(x, weight, bias, running):
        return _looked_over(x, weight, bias, running, eps, rows)
    mean, var, batches, momentum = running
    before = torch.cat((mean, var))
    # without .data, DDP's broadcast into the buffers would invalidate what the backward has saved
    y, batch_mean, rstd = _checked(x, weight, bias, mean.data, var.data, momentum, eps)
    near = rows == 0 or are_near(batch_mean, rstd, rows)
    if near and _is_finite(var, weight):
        _derive_to_any_order(y)
        if batches is not None:
            batches.add_(1)
        return y
    mean.data.copy_(before[: len(mean)])
    var.data.copy_(before[len(mean) :])
    return None if near else _rows_in_place(x, weight, bias, running, eps)


def _checked(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    """Return what ATen's kernel returns, which reads past the end of parameters that are too short."""
    if any(v is not None and v.numel() != x.shape[1] for v in (weight, bias, mean, var)):
        # who calls this one is told
        torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, False)
    return native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)


class _Scratch(threading.local):
    """Statistics of a batch by number of channels, in this thread; those that are kept are finite."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def taken(self, channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, variances and both, which nobody else gets: a finalizer may run another layer anywhere."""
        found = self.kept.pop(channels, None)
        if found is None:
            with torch.inference_mode(mode=False):
                both = torch.zeros(2, channels, device="cpu")
                found = both[0], both[1], both
        return found


_SCRATCH = _Scratch()
# where the batches of those are counted who do not count them
_NOT_COUNTED = torch.zeros((), dtype=torch.int64, device="cpu")


def _is_plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running) -> bool:
    """Whether the kernel can read everything: float32 without gaps."""
    dtype, channels = torch.float32, x.shape[1]
    return (
        HAS_NUMBA
        and x.dtype is dtype
        and (weight is None or is_sound(weight, dtype, channels))
        and (bias is None or is_sound(bias, dtype, channels))
        and may_move(running, dtype, channels)
    )


def _looked_over(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float, rows: int
) -> Tensor | None:
    """Do the same with a kernel of ours that looks at all statistics at once: each call of ATen's costs a cold cache."""
    channels = x.shape[1]
    mean, var, both = scratch = _SCRATCH.taken(channels)
    y, _, rstd = native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)
    running_mean, running_var, batches, momentum = running
    verdict = kernels().mover()(
        both.data_ptr(), rstd.data_ptr(), (rstd if weight is None else weight).data_ptr(), running_mean.data_ptr(),
        running_var.data_ptr(), (_NOT_COUNTED if batches is None else batches).data_ptr(), channels,
        bound_of(rows) if rows else math.inf, momentum,
    )  # fmt: skip
    if verdict == MOVED:
        _SCRATCH.kept[channels] = scratch
        _derive_to_any_order(y)
        return y
    return None if verdict == NOT_FINITE else _rows_in_place(x, weight, bias, running, eps)


@np.errstate(all="ignore")
def _rows_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float
) -> Tensor | None:
    mean, var, batches, momentum = running
    if mean.element_size() < 4 or forward_ad._current_level >= 0:
        return None
    y, moments = normalize_rows(x, weight, bias, eps)
    batch_mean, batch_var = moments.mean.astype(mean.numpy().dtype), moments.unbiased_variance.astype(var.numpy().dtype)
    if not np.isfinite(batch_mean.sum() + batch_var.sum()) or not _is_finite(var, weight):
        return None
    for old, new in ((mean, batch_mean), (var, batch_var)):
        old.numpy()[:] += momentum * (new - old.numpy())
    if batches is not None:
        batches.add_(1)
    return y


def _is_finite(var: Tensor, weight: Tensor | None) -> bool:
    # one product tells: 0 · inf and NaN stay NaN; an overflow of sound values only costs a second look
    return math.isfinite(var.dot(var if weight is None else weight.detach()).item())


def _exact_derivative(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor, ...]) -> Any:
    """Replace the gradients of ATen's node by the definition's, which can be differentiated again."""
    node: Any = torch._C._current_autograd_node()
    node.metadata.pop("exact").remove()
    try:
        x, weight = node._saved_input, node._saved_weight
    except RuntimeError:
        # activation checkpointing hands out what was saved once; ATen's gradients are right to the second order
        return None
    g = batch_norm_backward(grad_outputs[0], x, weight, eps=node._saved_eps)
    return tuple(
        None if old is None else new.to(old.dtype).reshape(old.shape) for old, new in zip(grad_inputs, g, strict=True)
    )


def _before_backward(dy: Tensor | None) -> Tensor | None:
    """Prepare the node that this gradient reaches."""
    if torch.is_grad_enabled():
        node: Any = torch._C._current_autograd_node()
        node.metadata["exact"] = node.register_hook(_exact_derivative)
    # gradients in strides of another order are summed in half precision by ATen
    return None if dy is None or dy.is_contiguous() or in_rows(dy) else dy.contiguous()


def _derive_to_any_order(y: Tensor) -> None:
    if y.grad_fn is not None:
        y.grad_fn._register_hook_dict(_CARRIER)


# Hooking each output costs a tenth of a small layer's time; a node borrows the hooks of this tensor at next to none.
_CARRIER: Any = torch.zeros((), requires_grad=True, device="cpu")
_CARRIER._backward_hooks = OrderedDict({0: _before_backward})
