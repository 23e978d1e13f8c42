"""A step of training on torch, where the calls of a small layer cost more than its arithmetic: few calls, one gradient."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["moved", "normalize"]

Axes = tuple[int, ...]


def normalize(x: Tensor, axis: int, gamma: Any, beta: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch in which all values count alike, and return its mean and biased variance too, ``(C,)``.

    Args:
        x: in float32 or wider, with two values a channel or more.
        axis: of the channels.
        gamma: ``(C,)``, or ``None`` for 1.
        beta: ``(C,)``, or ``None`` for 0.
        eps: added to the variance under the root.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    gamma, beta = (None if v is None else v.to(x.dtype).view(shape) for v in (gamma, beta))
    axes = tuple(i for i in range(x.ndim) if i != axis)
    y, mean, variance = _Normalize.apply(x, gamma, beta, axes, eps)  # type: ignore[no-untyped-call]
    return y, mean.view(-1), variance.view(-1)


def moved(variables: Sequence[Any], values: Sequence[Tensor], w: float) -> list[Tensor] | None:
    """Return ``(1 - w) · variable + w · value`` for each; ``None`` where one is not finite."""
    with torch.no_grad():
        new = [torch.lerp(v.value.to(value.dtype), value, w) for v, value in zip(variables, values, strict=True)]
        return new if math.isfinite(sum(v.sum().item() for v in new)) else None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Any, beta: Any, axes: Axes, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        d, mean, variance = _centred(x, axes)
        inv = (variance + eps).rsqrt_()
        scale = inv if gamma is None else inv * gamma
        y = d * scale if beta is None else torch.addcmul(beta, d, scale)
        ctx.save_for_backward(x, gamma, beta, d, inv)
        ctx.axes, ctx.eps = axes, eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        x, gamma, beta, d, inv = ctx.saved_tensors
        if torch.is_grad_enabled():
            # derivatives of derivatives are asked for
            return (*_derivable(x, gamma, beta, dy, ctx.axes, ctx.eps), None, None)
        axes, count = ctx.axes, x.numel() // inv.numel()
        sums = dy.sum(axes, keepdim=True)
        products = (dy * d).sum(axes, keepdim=True) * inv
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.addcmul(dy, d, products * inv, value=-1 / count)
            dx.sub_(sums, alpha=1 / count).mul_(inv if gamma is None else inv * gamma)
        return dx, None if gamma is None else products, None if beta is None else sums, None, None


def _centred(x: Tensor, axes: Axes) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x - mean``, the mean and the biased variance; what rounding does to the mean is taken out of all three."""
    mean, count = x.mean(axes, keepdim=True), 1
    for i in axes:
        count *= x.shape[i]
    d = x - mean
    off = d.mean(axes, keepdim=True)
    variance = ((d * d).sum(axes, keepdim=True) / count - off * off).clamp_(min=0)
    return d.sub_(off), mean + off, variance


def _derivable(x: Tensor, gamma: Any, beta: Any, dy: Tensor, axes: Axes, eps: float) -> list[Any]:
    """Return the gradients by x, γ and β, computed by what torch can derive again."""
    d = x - x.detach().mean(axes, keepdim=True)
    d = d - d.mean(axes, keepdim=True)
    y = d * ((d * d).mean(axes, keepdim=True) + eps).rsqrt()
    y = y if gamma is None else y * gamma
    y = y if beta is None else y + beta
    inputs = [v for v in (x, gamma, beta) if v is not None and v.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return [next(found) if v is not None and v.requires_grad else None for v in (x, gamma, beta)]
