"""The gradients of a fused node by operations of torch's: where they are derived again, or many are taken at once."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.functional import (
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    batch_norm_train,
)
from batchnorm.torch.options import ACTIVATIONS
from batchnorm.torch.rows import over_channels

__all__ = ["again", "at_once"]


def again(ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients by the definition, which can be derived to any order."""
    step, fixed = ctx.step, None
    if step.fixed is not None:
        mean, rstd = step.fixed
        fixed = mean, rstd**-2 - step.eps
    with torch.enable_grad():
        d = _before_activation(ctx, dy, x, weight, bias, beside, fixed)
        if fixed is None:
            g = batch_norm_backward(d, x, weight, eps=step.eps)
        else:
            g = batch_norm_inference_backward(d, x, *fixed, weight, eps=step.eps)
    return g.dx, as_parameter(g.dgamma, weight), as_parameter(g.dbeta, bias), d if ctx.adds else None


def _before_activation(
    ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None, fixed: tuple[Tensor, Tensor] | None
) -> Tensor:
    step = ctx.step
    if step.activation is None:
        return dy
    if ctx.gated:
        # straight pieces: the slope at the output is that at the input, and has no slope itself
        return dy * _slope(step.activation, beside)
    if fixed is None:
        z = batch_norm_train(x, weight, bias, eps=step.eps).y
    else:
        z = batch_norm_inference(x, *fixed, weight, bias, eps=step.eps)
    z = z if beside is None else z + beside
    z = z if z.requires_grad else z.requires_grad_()
    d: Tensor
    (d,) = torch.autograd.grad(ACTIVATIONS[step.activation](z), z, dy, create_graph=True)
    return d


def _slope(activation: str, z: Any) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        slope: Tensor
        (slope,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, torch.ones_like(z))
    return slope


def at_once(ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients for a batch of upstream gradients, by sums and products that know such batches."""
    step, axes = ctx.step, [0, *range(2, x.ndim)]
    mean, rstd = (over_channels(v, x) for v in (ctx.found.mean, ctx.found.rstd))
    gain = rstd if weight is None else rstd * over_channels(weight.double(), x)
    x_hat, d = (x.double() - mean) * rstd, dy.double()
    if step.activation is not None:
        d = d * _slope(step.activation, beside if ctx.gated else _sum(x_hat * (gain / rstd), bias, beside)).double()
    plain, hatted = d.sum(axes), (d * x_hat).sum(axes)
    dx = d
    if step.fixed is None:
        count = x.numel() // x.shape[1]
        dx = d - (over_channels(plain, x) + x_hat * over_channels(hatted, x)) / count
    dx = (dx * gain).to(x.dtype)
    return dx, as_parameter(hatted, weight), as_parameter(plain, bias), d.to(x.dtype) if ctx.adds else None


def _sum(z: Tensor, bias: Tensor | None, beside: Tensor | None) -> Tensor:
    z = z if bias is None else z + over_channels(bias.double(), z)
    return z if beside is None else z + beside


def as_parameter(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of its parameter, and none where there is none."""
    if parameter is None or parameter.dtype == gradient.dtype:
        return None if parameter is None else gradient
    return gradient.to(parameter.dtype)
