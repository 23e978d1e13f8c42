"""Normalization, residual and activation in one node of autograd, by the kernels."""

import sys
import threading
from array import array
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty, get_num_threads, is_grad_enabled

from batchnorm.kernels.arguments import (
    AFFINE,
    BATCHES,
    BETA,
    DBETA,
    DERIVE,
    DGAMMA,
    DRESIDUAL,
    DX,
    DY,
    EPS,
    FINITE,
    FIXED,
    GAMMA,
    M2,
    MEAN,
    MOMENTUM,
    PARTS,
    RESIDUAL,
    RSTD,
    RUNNING_MEAN,
    RUNNING_VAR,
    X,
    Y,
    word_of,
)
from batchnorm.torch.buffers import empty_like
from batchnorm.torch.choice import Running, is_eager
from batchnorm.torch.derivatives import again, as_parameter, at_once
from batchnorm.torch.recompute import active
from batchnorm.torch.rows import full, in_rows, memory_format

__all__ = ["FEW", "Found", "Step", "forward", "gradients", "is_gated", "normalize"]

KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# values below which an evaluation is left to ATen
FEW = 1 << 12


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
    running: Running | None = None


class Found:
    """What the kernels have found: three rows of float64 for the channels, and whether everything is finite."""

    __slots__ = ("finite", "rows")

    def __init__(self, rows: Tensor, finite: bool) -> None:
        self.rows, self.finite = rows, finite

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.rows[0]

    @property
    def m2(self) -> Tensor:
        """The sum of squared distances from the mean."""
        return self.rows[1]

    @property
    def rstd(self) -> Tensor:
        """``1 / √(variance + ε)``."""
        return self.rows[2]


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, step: Step
) -> tuple[Tensor, Found]:
    """Return ``activation(normalize(x) + residual)`` and what was found; ``x`` is dense, everything fits."""
    found: list[Found] = []
    if is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y: Tensor = _applied(x, weight, bias, residual, step, found)
        memory = active()
        if memory is not None and residual is None:
            known = step._replace(fixed=(found[0].mean, found[0].rstd), running=None)
            memory.remember(y, (x, weight, bias), lambda x, weight, bias: forward(x, weight, bias, None, known, []))
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


# without torch's look at transforms and defaults, of which there are none here
_applied: Any = super(torch.autograd.Function, _Fused).apply


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, step: Step, found: list[Found]
) -> Tensor:
    """Run the kernels, and append what they find."""
    how, y = plan_of(x), empty_like(x)
    rows = empty(3, how.channels, dtype=torch.float64, device="cpu")
    if step.fixed is not None:
        torch.stack((step.fixed[0], step.fixed[0], step.fixed[1]), out=rows)
    # copies in full precision, which must live as long as the arguments
    gamma, beta = full(weight, x), full(bias, x)
    parts = _PARTS.room(how)
    words = _begun(how, step, x, gamma, beta, rows, parts)
    words[Y], words[RESIDUAL] = y.data_ptr(), _address(residual)
    if step.running is not None:
        mean, var, batches, momentum = step.running
        words[RUNNING_MEAN], words[RUNNING_VAR] = mean.data_ptr(), var.data_ptr()
        words[BATCHES], words[MOMENTUM] = _address(batches), word_of(momentum)
    kernels().run((how.layout, "forward", KINDS[x.dtype], step.activation, int(residual is not None)), how, words)
    found.append(Found(rows, bool(words[FINITE])))
    return y


def gradients(ctx: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any, beside: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of x, γ, β and the residual."""
    if is_grad_enabled():
        return again(ctx, dy, x, weight, bias, beside)
    if not is_eager(dy):
        return at_once(ctx, dy, x, weight, bias, beside)
    step, how = ctx.step, plan_of(x)
    dy = dy if dy.stride() == x.stride() else dy.contiguous(memory_format=layout_of(x))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dgamma = empty(how.channels, dtype=dtype, device="cpu")
    dbeta = empty_like(dgamma)
    # with an activation, the gradient of what was added is another than dy
    own = ctx.adds and step.activation is not None
    dx = empty_like(x) if own or ctx.needs_input_grad[0] else None
    dresidual = empty_like(x) if own else dy if ctx.adds else None
    gamma, beta = full(weight, x), full(bias, x)
    parts = _PARTS.room(how)
    words = _begun(how, step, x, gamma, beta, ctx.found.rows, parts)
    words[DY], words[DX], words[DERIVE] = dy.data_ptr(), _address(dx), dx is not None
    words[RESIDUAL], words[DRESIDUAL] = _address(beside), _address(dresidual) if own else 0
    words[DGAMMA], words[DBETA] = dgamma.data_ptr(), dbeta.data_ptr()
    adds = 0 if beside is None else 2 if ctx.gated else 1
    kernels().run((how.layout, "backward", KINDS[x.dtype], step.activation, adds), how, words)
    return dx, as_parameter(dgamma, weight), as_parameter(dbeta, bias), dresidual


def _begun(
    how: Any, step: Step, x: Tensor, gamma: Tensor | None, beta: Tensor | None, rows: Tensor, parts: "array[float]"
) -> "array[int]":
    """Return the arguments that both directions have in common."""
    words: array[int] = how.words[:]
    mean, row = rows.data_ptr(), 8 * how.channels
    words[X], words[EPS], words[FIXED] = x.data_ptr(), word_of(step.eps), step.fixed is not None
    words[GAMMA], words[BETA] = _address(gamma), _address(beta)
    words[MEAN], words[M2], words[RSTD] = mean, mean + row, mean + 2 * row
    words[AFFINE], _ = parts.buffer_info()
    words[PARTS] = words[AFFINE] + 3 * row
    return words


class _Parts(threading.local):
    """What kernels write down between their phases, in this thread; whoever runs one must hold the array."""

    kept: "array[float]" = array("d")

    def room(self, how: Any) -> "array[float]":
        """Return room for three rows, and two for each block."""
        numbers = (2 * how.blocks + 3) * how.channels if how.blocks else 0
        if len(self.kept) < numbers:
            self.kept = array("d", bytes(8 * numbers))
        return self.kept


_PARTS = _Parts()


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the layout of a dense batch."""
    return memory_format(x) if in_rows(x) else torch.contiguous_format


def plan_of(x: Tensor) -> Any:
    """Divide a dense batch into tasks."""
    return _planned(x.shape, x.is_contiguous(), x.element_size(), get_num_threads())


@lru_cache(maxsize=4096)
def _planned(shape: torch.Size, contiguous: bool, itemsize: int, threads: int) -> Any:
    samples, channels = shape[:2]
    places = shape.numel() // (samples * channels)
    if places == 1 or not contiguous:
        return kernels().plan("rows", samples * places, channels, 1, itemsize, threads)
    return kernels().plan("planes", samples, channels, places, itemsize, threads)
