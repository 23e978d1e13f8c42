"""Normalization, residual and activation in one node of autograd, by the kernels."""

import ctypes
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.functional import (
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    batch_norm_train,
)
from batchnorm.torch.choice import is_eager
from batchnorm.torch.options import ACTIVATIONS
from batchnorm.torch.rows import full, in_rows, memory_format

__all__ = ["FEW", "Found", "Step", "forward", "gradients", "is_gated", "normalize"]

KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# values below which an evaluation is left to ATen
FEW = 1 << 12
# from this size on, memory comes from the system anew each time, in small pages unless larger ones are asked for
HUGE = 1 << 25
PAGE = 1 << 21
MADV_HUGEPAGE = 14


# activations whose slope can be told from their output
GATED = (None, "relu", "relu6", "leaky_relu")


def is_gated(activation: str | None) -> bool:
    """Say whether the slope of an activation can be told from its output."""
    return activation in GATED


@lru_cache(maxsize=1)
def kernels() -> Any:
    """Load the kernels, which takes half a second, and show them torch's pool of threads."""
    found = import_module("batchnorm.kernels.cpu")
    library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"
    import_module("batchnorm.kernels.pool").attach(library)
    return found


class Step(NamedTuple):
    """What a forward is told beside its tensors, and leaves for others."""

    activation: str | None
    eps: float
    # mean and rstd of given statistics, or None
    fixed: tuple[Tensor, Tensor] | None = None
    # running mean and variance that move, and how fast
    running: tuple[Tensor, Tensor] | None = None
    momentum: float = 0.0


class Found(NamedTuple):
    """Mean, m2 and 1/√(var + ε) of each channel, in float64, and whether everything is finite."""

    mean: Tensor
    m2: Tensor
    rstd: Tensor
    finite: bool


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, step: Step
) -> tuple[Tensor, Found]:
    """Return ``activation(normalize(x) + residual)`` and what was found; ``x`` is dense, everything fits."""
    found: list[Found] = []
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, weight, bias, residual)):
        y: Tensor = _Fused.apply(x, weight, bias, residual, step, found)  # type: ignore[no-untyped-call]
    else:
        y = forward(x, weight, bias, residual, step, found)
    return y, found[0]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        step: Step,
        found: list[Found],
    ) -> Tensor:
        y = forward(x, weight, bias, residual, step, found)
        # the output tells the slope, and the next layer keeps it anyway
        gated = residual is not None and is_gated(step.activation)
        beside = None if step.activation is None else y if gated else residual
        ctx.save_for_backward(x, weight, bias, beside)
        ctx.step, ctx.found, ctx.gated, ctx.adds = step, found[0], gated, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, beside = ctx.saved_tensors
        return (*gradients(ctx, dy, x, weight, bias, beside), None, None)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, step: Step, found: list[Found]
) -> Tensor:
    cpu = kernels()
    y, how = empty_like(x), plan_of(x)
    channels = how.channels
    weight, bias = full(weight, x), full(bias, x)
    if step.fixed is None:
        scratch = torch.empty(3 + 2 * how.blocks, channels, dtype=torch.float64)
        mean, m2, rstd = scratch[:3]
    else:
        scratch, (mean, rstd) = None, step.fixed
        m2 = mean
    given = cpu.Arguments(
        x=x.data_ptr(), y=y.data_ptr(), residual=0 if residual is None else residual.data_ptr(),
        samples=how.samples, channels=channels, places=how.places, width=how.width, height=how.height,
        strips=how.strips, blocks=how.blocks, gamma=_address(weight), beta=_address(bias),
        mean=mean.data_ptr(), m2=m2.data_ptr(), rstd=rstd.data_ptr(),
        parts=0 if scratch is None else scratch.data_ptr() + 24 * channels,
        fixed=scratch is None, eps=step.eps, momentum=step.momentum,
    )  # fmt: skip
    if step.running is not None:
        given.running_mean, given.running_var = (v.data_ptr() for v in step.running)
    cpu.forward(how, KINDS[x.dtype], step.activation, residual is not None, given)
    found.append(Found(mean, m2, rstd, bool(given.finite)))
    return y


def gradients(ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None) -> tuple[Any, ...]:
    step, found = ctx.step, ctx.found
    if torch.is_grad_enabled() or not is_eager(dy):
        return _derive_again(ctx, dy, x, weight, bias, beside)
    cpu, how = kernels(), plan_of(x)
    dy = dy.contiguous(memory_format=memory_format(x)) if in_rows(x) else dy.contiguous()
    channels = how.channels
    wide, wide_bias = full(weight, x), full(bias, x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dgamma, dbeta = torch.empty(channels, dtype=dtype), torch.empty(channels, dtype=dtype)
    dx = empty_like(x) if ctx.needs_input_grad[0] or (ctx.adds and step.activation is not None) else None
    dresidual = empty_like(x) if ctx.adds and ctx.needs_input_grad[3] and step.activation is not None else None
    parts = torch.empty(2 * how.blocks + 3, channels, dtype=torch.float64)
    given = cpu.Arguments(
        x=x.data_ptr(), dy=dy.data_ptr(), dx=_address(dx), residual=_address(beside), dresidual=_address(dresidual),
        samples=how.samples, channels=channels, places=how.places, width=how.width, height=how.height,
        strips=how.strips, blocks=how.blocks, gamma=_address(wide), beta=_address(wide_bias),
        mean=found.mean.data_ptr(), m2=found.m2.data_ptr(), rstd=found.rstd.data_ptr(),
        dgamma=dgamma.data_ptr(), dbeta=dbeta.data_ptr(),
        affine=parts.data_ptr(), parts=parts.data_ptr() + 24 * channels,
        fixed=step.fixed is not None, derive=dx is not None, eps=step.eps,
    )  # fmt: skip
    adds = 0 if beside is None else 2 if ctx.gated else 1
    cpu.backward(how, KINDS[x.dtype], step.activation, adds, given)
    if ctx.adds and step.activation is None:
        dresidual = dy
    return dx, _as(dgamma, weight), _as(dbeta, bias), dresidual


def _derive_again(ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None) -> tuple[Any, ...]:
    """Return the same gradients by the definition, which can be differentiated again."""
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
    return g.dx, _as(g.dgamma, weight), _as(g.dbeta, bias), d if ctx.adds else None


def _before_activation(
    ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None, fixed: tuple[Tensor, Tensor] | None
) -> Tensor:
    step = ctx.step
    if step.activation is None:
        return dy
    if ctx.gated:
        # straight pieces: the slope at the output is that at the input, and has no slope itself
        y: Any = beside
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(ACTIVATIONS[step.activation](y), y, torch.ones_like(y))
        gated: Tensor = dy * slope
        return gated
    if fixed is None:
        z = batch_norm_train(x, weight, bias, eps=step.eps).y
    else:
        z = batch_norm_inference(x, *fixed, weight, bias, eps=step.eps)
    z = z if beside is None else z + beside
    z = z if z.requires_grad else z.requires_grad_()
    d: Tensor
    (d,) = torch.autograd.grad(ACTIVATIONS[step.activation](z), z, dy, create_graph=True)
    return d


def _as(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def plan_of(x: Tensor) -> Any:
    """Divide a dense batch into tasks."""
    samples, channels = x.shape[:2]
    places = x.numel() // (samples * channels)
    if places == 1 or not x.is_contiguous():
        return kernels().plan("rows", samples * places, channels, 1, x.element_size(), torch.get_num_threads())
    return kernels().plan("planes", samples, channels, places, x.element_size(), torch.get_num_threads())


def empty_like(x: Tensor) -> Tensor:
    """Return a tensor like ``x``, in large pages where it is large: to get small ones costs more than the work."""
    y = torch.empty_like(x)
    size = y.numel() * y.element_size()
    if size >= HUGE and sys.platform == "linux":
        start = -(-y.data_ptr() // PAGE) * PAGE
        _libc().madvise(start, (y.data_ptr() + size) // PAGE * PAGE - start, MADV_HUGEPAGE)
    return y


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes, libc.madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return libc
