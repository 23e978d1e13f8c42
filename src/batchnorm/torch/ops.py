"""Normalize a torch batch: by ATen's kernels where they are exact, by the definition where they are not.

ATen sums channels-last and ``(N, C)`` batches in float32, one row after another, which costs digits as a batch grows or its
mean moves away from zero: see `rows`. ATen's derivatives are right up to the second order; when more are asked for, the
definition gives them.
"""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from batchnorm.arrays import namespace
from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_train
from batchnorm.moments import Moments
from batchnorm.torch import fused, operators
from batchnorm.torch.choice import FEW, choose, is_eager
from batchnorm.torch.options import ACTIVATIONS
from batchnorm.torch.rows import FEW_ROWS, are_near, full, in_rows, normalize_rows, over_channels

__all__ = [
    "dense",
    "evaluate",
    "few_of",
    "followed",
    "has_no_values",
    "is_eager",
    "normalize",
    "normalize_in_place",
    "normalize_weighted",
    "renormalize",
]


# values from which the kernels are quicker, where there are few rows
FEW_IN_ROWS = 3 << 19

# the namespaces that a compiler must find, not look for
for _kind in (Tensor, torch.nn.Parameter):
    namespace(_kind(torch.empty(0)))


def has_no_values(x: Tensor) -> bool:
    """Say whether ``x`` is a shape and a dtype only, outside of a compiler."""
    return not torch.compiler.is_compiling() and (x.is_meta or isinstance(x, FakeTensor))


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *follow: Any
) -> tuple[Tensor, Moments]:
    """Return ``activation(normalize(x) + residual)`` by the fastest way that is exact, and the Moments of the batch.

    ``follow`` is the residual and the activation, or nothing.
    """
    residual, activation = follow or (None, None)
    if operators.is_kept(x, weight, bias, residual):
        return operators.normalize(x, weight, bias, eps, residual, activation)
    y, moments = _normalize(x, weight, bias, eps)
    return followed(y, residual, activation), moments


def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    if peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        # functorch differentiates to any order and through any nesting, ATen's formulas do not
        step = batch_norm_train(x, weight, bias, eps=eps)
        return step.y, step.moments
    if torch.compiler.is_compiling():
        return _native(x, weight, bias, eps)
    choice = choose(x, weight, bias, None, None, few=few_of(x))
    if choice.name == "definition":
        step = batch_norm_train(x, weight, bias, eps=eps)
        return step.y, step.moments
    if not is_eager(x):
        return _native(x, weight, bias, eps)
    x = dense(x)
    if choice.name == "kernel":
        y, found = fused.normalize(x, weight, bias, None, fused.Step(None, eps))
        return y, Moments(x.numel() // x.shape[1], found.mean, found.m2)
    if not in_rows(x) or forward_ad._current_level >= 0:
        return _native(x, weight, bias, eps)
    rows = x.numel() // x.shape[1]
    if rows <= FEW_ROWS:
        y, moments = _native(x, weight, bias, eps)
        if are_near(moments.mean, (moments.variance + eps).rsqrt(), rows):
            return y, moments
    y, moments = normalize_rows(x, weight, bias, eps)
    return y, Moments(moments.count, torch.from_numpy(moments.mean), torch.from_numpy(moments.m2))


def few_of(x: Tensor, residual: Any = None, activation: str | None = None) -> int:
    """Return how many values of such a batch PyTorch's kernels normalize sooner, where nothing follows.

    Few rows are what its kernels are best at, and its node of autograd costs less than one in Python.
    """
    alone = residual is None and activation is None
    if alone and x.dtype == torch.float32 and in_rows(x) and x.numel() <= FEW_ROWS * x.shape[1]:
        return FEW_IN_ROWS
    return FEW


def followed(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Return ``activation(y + residual)``."""
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation](y)


def evaluate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *follow: Any
) -> Tensor:
    """Return ``activation(normalize(x) + residual)`` by given statistics; ``follow`` is the residual and the activation."""
    residual, activation = follow
    alone = residual is None and activation is None
    if choose(x, weight, bias, residual, None, few=x.numel() + 1 if alone else fused.FEW).name != "kernel":
        return followed(torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), residual, activation)
    x = dense(x)
    fixed = mean.detach().double(), (var.detach().double() + eps).rsqrt()
    return fused.normalize(x, weight, bias, alike(residual, x), fused.Step(activation, eps, fixed))[0]


def alike(residual: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a residual in the layout of ``x``."""
    return None if residual is None else residual.contiguous(memory_format=fused.layout_of(x))


def normalize_in_place(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
    *follow: Any,
) -> Tensor | None:
    """Return ``activation(normalize(x) + residual)`` and update the running statistics, in as few readings as there can be.

    Returns ``None``, and changes nothing, if something is not finite. ``x`` is eager; ``follow`` is the residual and the
    activation.
    """
    residual, activation = follow
    choice = choose(x, weight, bias, residual, mean, few=few_of(x, *follow), at_hand=True)
    if choice.name == "definition":
        return None
    if choice.name == "kernel":
        x = dense(x)
        step = fused.Step(activation, eps, None, (mean, var), momentum)
        y, found = fused.normalize(x, weight, bias, alike(residual, x), step)
        return y if found.finite else None
    plain = _native_in_place(x, weight, bias, mean, var, momentum, eps)
    return None if plain is None else followed(plain, residual, activation)


def _native_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Tensor | None:
    """Normalize and update the running statistics in one call of ATen's, where its sums are exact."""
    if x.is_contiguous():
        rows = x.shape[0] if x.ndim == 2 else 0
    else:
        x = dense(x)
        rows = x.numel() // x.shape[1] if in_rows(x) else 0
    if rows > FEW_ROWS:
        return _rows_in_place(x, weight, bias, mean, var, momentum, eps)
    before = torch.cat((mean, var))
    # without .data, DDP's broadcast into the buffers would invalidate what the backward has saved
    y, batch_mean, invstd = torch.native_batch_norm(x, weight, bias, mean.data, var.data, True, momentum, eps)
    near = rows == 0 or are_near(batch_mean, invstd, rows)
    if near and _is_finite(var, weight):
        _derive_to_any_order(y)
        return y
    mean.data.copy_(before[: len(mean)])
    var.data.copy_(before[len(mean) :])
    return None if near else _rows_in_place(x, weight, bias, mean, var, momentum, eps)


def normalize_weighted(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    virtual_batch_size: int | None = None,
    running: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    renorm: Renorm | None = None,
) -> tuple[Tensor, Moments]:
    """Return `batch_norm_train` with everything it can do, by the definition; the backward keeps ``x`` and no copy of it."""
    if (sample_weight is not None and sample_weight.requires_grad) or not is_eager(x) or forward_ad._current_level >= 0:
        step = batch_norm_train(
            x, weight, bias, *running, eps=eps, mask=mask, sample_weight=sample_weight,
            virtual_batch_size=virtual_batch_size, renorm=renorm,
        )  # fmt: skip
        return step.y, step.moments
    kept = {"eps": eps, "virtual_batch_size": virtual_batch_size, "renorm": renorm}
    # the running statistics move on before the backward comes
    before = [None if v is None or renorm is None else v.clone() for v in running]
    y, count, mean, m2 = _Definition.apply(x, weight, bias, mask, sample_weight, *before, kept)  # type: ignore[no-untyped-call]
    return y, Moments(count, mean, m2)


def renormalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Tensor, Tensor], bounds: Renorm
) -> tuple[Tensor, Moments]:
    """Return batch renormalization: ``γ·(x̂·r + d) + β`` with constants ``r``, ``d``."""
    wide = x if x.element_size() > 2 else x.float()
    y, moments = normalize(wide, None, None, eps)
    mean, var = (v.double() for v in running)
    sigma = (var + eps).sqrt()
    r = ((moments.variance + eps).sqrt() / sigma).clamp(1 / bounds.rmax, bounds.rmax)
    d = ((moments.mean - mean) / sigma).clamp(-bounds.dmax, bounds.dmax)
    y = y * over_channels(r.detach().to(y.dtype), x) + over_channels(d.detach().to(y.dtype), x)
    y = y if weight is None else y * over_channels(weight, x)
    y = y if bias is None else y + over_channels(bias, x)
    return y.to(x.dtype), moments


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Normalize by ATen, which leaves the batch's statistics in buffers of our own: a step of momentum 1."""
    count = x.numel() // x.shape[1]
    weight, bias = full(weight, x), full(bias, x)
    dtype = torch.float32 if x.element_size() < 4 else x.dtype
    mean, var = x.new_zeros(2, x.shape[1], dtype=dtype).unbind()
    if is_eager(x):
        # the node that `normalize_in_place` makes, so that one of them can be run again as the other
        y, *_ = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)
        _derive_to_any_order(y)
    else:
        y = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled)
    m2 = var.double() * (count - 1) if count > 1 else torch.zeros_like(var, dtype=torch.float64)
    return y, Moments(count, mean.double(), m2)


class _Definition(torch.autograd.Function):
    """The definition, forward and explicit backward: derivatives of any order, in the memory of one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        sample_weight: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        kept: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalize; the Moments are constants."""
        step = batch_norm_train(
            x, weight, bias, running_mean, running_var, mask=mask, sample_weight=sample_weight, **kept
        )
        ctx.save_for_backward(x, weight, mask, sample_weight, running_mean, running_var)
        ctx.kept, ctx.bias = kept, None if bias is None else bias.dtype
        count = torch.as_tensor(step.moments.count, dtype=torch.float64)
        moments = (count, step.moments.mean, step.moments.m2)
        ctx.mark_non_differentiable(*moments)
        return step.y, *moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        """Return the gradients of x, γ and β."""
        x, weight, mask, sample_weight, *running = ctx.saved_tensors
        g = batch_norm_backward(dy, x, weight, *running, mask=mask, sample_weight=sample_weight, **ctx.kept)
        dgamma = None if weight is None else g.dgamma.to(weight.dtype)
        return g.dx, dgamma, None if ctx.bias is None else g.dbeta.to(ctx.bias), None, None, None, None, None


@np.errstate(all="ignore")
def _rows_in_place(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Tensor | None:
    if mean.element_size() < 4 or forward_ad._current_level >= 0:
        return None
    y, moments = normalize_rows(x, weight, bias, eps)
    batch_mean, batch_var = moments.mean.astype(mean.numpy().dtype), moments.unbiased_variance.astype(var.numpy().dtype)
    if not np.isfinite(batch_mean.sum() + batch_var.sum()) or not _is_finite(var, weight):
        return None
    for running, batch in ((mean, batch_mean), (var, batch_var)):
        running.numpy()[:] += momentum * (batch - running.numpy())
    return y


def dense(x: Tensor) -> Tensor:
    """Return ``x`` in a layout that ATen sums exactly, which strides of another order are not."""
    return x if x.is_contiguous() or in_rows(x) else x.contiguous()


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
_CARRIER: Any = torch.zeros((), requires_grad=True)
_CARRIER._backward_hooks = OrderedDict({0: _before_backward})
