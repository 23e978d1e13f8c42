"""The kernels as operators that ``torch.compile`` keeps whole."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.torch.choice import DTYPES, FEW, HAS_NUMBA
from batchnorm.torch.fused import Found, Step, forward, gradients, is_gated
from batchnorm.torch.rows import in_rows, memory_format

__all__ = ["is_kept", "normalize"]


def is_kept(x: Tensor, *others: Tensor | None) -> bool:
    """Say whether a compiler that is running now shall keep the operator: where the kernel would be chosen."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        HAS_NUMBA
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.numel() >= FEW
        and all(v is None or v.dtype in (wide, x.dtype) for v in others)
    )


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, activation: str | None
) -> tuple[Tensor, Moments]:
    """Return ``activation(normalize(x) + residual)`` and the Moments of the batch, as one operator."""
    y, found = torch.ops.batchnorm.normalize(x, weight, bias, residual, activation or "", eps)
    return y, Moments(x.numel() // x.shape[1], found[0], found[1])


@torch.library.custom_op("batchnorm::normalize", mutates_args=(), device_types="cpu")
def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor]:
    found: list[Found] = []
    y = forward(_laid(x), weight, bias, _laid(residual, x), Step(activation or None, eps), found)
    return y, found[0].rows[:3].clone()


@_normalize.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=_format(x)), x.new_empty((3, x.shape[1]), dtype=torch.float64)


@torch.library.custom_op("batchnorm::normalize_backward", mutates_args=(), device_types="cpu")
def _derive(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, found: Tensor,
    activation: str, eps: float, adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kept = SimpleNamespace(
        step=Step(activation or None, eps), found=Found(found, finite=True), adds=adds,
        gated=adds and is_gated(activation or None), needs_input_grad=(True, True, True, adds),
    )  # fmt: skip
    x = _laid(x)
    dx, dgamma, dbeta, dresidual = gradients(kept, dy, x, weight, bias, _laid(beside, x))
    none = dy.new_empty(0)
    # what an operator returns may not be one of its inputs
    own = none if dresidual is None else dresidual.clone() if dresidual is dy or not activation else dresidual
    return dx, none if dgamma is None else dgamma, none if dbeta is None else dbeta, own


@_derive.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, found: Tensor,
    activation: str, eps: float, adds: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like_x = torch.empty_like(x, memory_format=_format(x))
    none = dy.new_empty(0)
    return (
        like_x,
        none if weight is None else torch.empty_like(weight),
        none if bias is None else torch.empty_like(bias),
        torch.empty_like(like_x) if adds else none,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, residual, activation, eps = inputs
    y, found = output
    beside = y if residual is not None and is_gated(activation or None) and activation else residual
    ctx.save_for_backward(x, weight, bias, beside if activation else None, found)
    ctx.activation, ctx.eps, ctx.adds = activation, eps, residual is not None


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, bias, beside, found = ctx.saved_tensors
    dx, dgamma, dbeta, dresidual = torch.ops.batchnorm.normalize_backward(
        dy, x, weight, bias, beside, found, ctx.activation, ctx.eps, ctx.adds
    )
    return (
        dx, None if weight is None else dgamma, None if bias is None else dbeta, dresidual if ctx.adds else None, None, None,
    )  # fmt: skip


_normalize.register_autograd(_differentiate, setup_context=_keep)


def _format(x: Tensor) -> torch.memory_format:
    return memory_format(x) if in_rows(x) else torch.contiguous_format


def _laid(v: Any, x: Tensor | None = None) -> Any:
    """Return a tensor in a layout of the kernels, that of ``x`` where it is given."""
    return v if v is None else v.contiguous(memory_format=_format(v if x is None else x))
