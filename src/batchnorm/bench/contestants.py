"""Who takes part in the contests of one layer: torch, torch.compile, JAX, ours, and copies of the same bytes."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.contest import Absent, Contestant, Errors, Maker
from batchnorm.bench.oracle import Case, Results, filled, run_layer, torchs
from batchnorm.torch import BatchNorm1d, BatchNorm2d, explain

__all__ = ["COMPILED", "COPIES", "JAX", "NEW", "OURS", "TORCH", "contestants", "facts_of"]

TORCH, COMPILED, JAX, OURS, COPIES, NEW = "torch", "torch.compile", "JAX", "ours", "copies", "copies, new memory"
EPS, MOMENTUM = 1e-5, 0.1


def contestants(case: Case, *, slow: bool = False) -> dict[str, Maker]:
    """Return who takes part, torch first; ``slow`` ones compile first: torch.compile and JAX."""
    compiled = {COMPILED: lambda: _compiled(case), JAX: lambda: _jax(case)} if slow else {}
    return {
        TORCH: lambda: _layer(case, torchs, case.errors_of_torch),
        **compiled,
        OURS: lambda: _layer(case, _ours, case.errors),
        COPIES: lambda: _copies(case, new=False),
        NEW: lambda: _copies(case, new=True),
    }


def facts_of(case: Case) -> dict[str, Any]:
    """Return what a row says of its case, and which implementation our layer takes for it."""
    shape = tuple(case.x.shape)
    layer: Any = _ours(case)
    return {
        "shape": shape,
        "elements": case.x.numel(),
        "bytes": case.x.nbytes,
        "activation": case.activation,
        "ours_by": str(explain(layer, case.x)),
    }


def _ours(case: Case) -> nn.Module:
    cls = BatchNorm1d if case.x.ndim == 2 else BatchNorm2d
    return filled(cls(case.x.shape[1], activation=case.activation), case)  # type: ignore[no-any-return]


def _layer(case: Case, make: Callable[[Case], nn.Module], judge: Callable[[Results], Errors]) -> Contestant:
    layer, x = make(case), case.x.detach().requires_grad_(case.training)
    parameters = list(layer.parameters())

    def train() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        layer(x).backward(case.dy)

    def evaluate() -> None:
        with torch.no_grad():
            layer(x)

    return Contestant(train if case.training else evaluate, lambda: judge(run_layer(case, layer)))


def _compiled(case: Case) -> Contestant:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise Absent(f"torch.compile needs a C++ compiler, and there is no {compiler}")

    def make(case: Case) -> nn.Module:
        return torch.compile(torchs(case), dynamic=False)  # type: ignore[return-value]

    return _layer(case, make, case.errors)


# -- JAX ---------------------------------------------------------------------------------------------------------------


def _jax(case: Case) -> Contestant:
    """One jitted function for the whole step. XLA takes a thread for each core, and can only be told to take one."""
    if find_spec("jax") is None:
        raise Absent("jax is not installed")
    import jax

    given = [jax.numpy.asarray(v.numpy()) for v in (case.x, case.gamma, case.beta, *case.running, case.dy)]
    step = _jax_step(case)
    names = ("y", "dx", "dγ", "dβ", "running mean", "running variance")

    def errors() -> Errors:
        found = (torch.from_numpy(jax.device_get(v).copy()) for v in step(*given))
        return case.errors(dict(zip(names, found, strict=True)))

    return Contestant(lambda: jax.block_until_ready(step(*given)), errors)  # type: ignore[no-untyped-call]


def _jax_step(case: Case) -> Callable[..., Any]:
    import jax

    axes = (0, *range(2, case.x.ndim))
    shape = (1, -1, *(1 for _ in axes[1:]))
    unbiased = (case.x.numel() // case.x.shape[1]) / (case.x.numel() // case.x.shape[1] - 1)
    activation = (lambda y: y) if case.activation is None else getattr(jax.nn, case.activation)

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        mean, var = x.mean(axes), x.var(axes)
        scale = gamma * jax.lax.rsqrt(var + EPS)
        y = (x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)
        return activation(y), (mean, var)

    def step(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, dy: Any) -> Any:
        y, backward, (mean, var) = jax.vjp(forward, x, gamma, beta, has_aux=True)
        new_mean = running_mean + MOMENTUM * (mean - running_mean)
        new_var = running_var + MOMENTUM * (unbiased * var - running_var)
        return (y, *backward(dy), new_mean, new_var)

    jitted: Callable[..., Any] = jax.jit(step)
    return jitted


# -- the floor -----------------------------------------------------------------------------------------------------------


def _copies(case: Case, *, new: bool) -> Contestant:
    """Copy as many bytes as must be moved: forward reads one tensor and writes one, backward reads two and writes one.

    Args:
        case: whose tensors are copied.
        new: into memory that is asked for in every round, as layers ask for that of their outputs.
    """
    x, dy = case.x.detach(), case.dy
    y, dx = torch.empty_like(x), torch.empty_like(x)
    half = len(x) // 2

    def step() -> tuple[Tensor, Tensor]:
        there, back = (torch.empty_like(x), torch.empty_like(x)) if new else (y, dx)
        there.copy_(x)
        if case.training:
            back.copy_(dy)
            # what is read twice in a backward pass
            y[:half].copy_(x[:half])
        return there, back

    def errors() -> Errors:
        there, back = step()
        copied = {"y": (there, x)}
        if case.training:
            copied |= {"dx": (back, dy), "half": (y[:half], x[:half])}
        return {what: (float(not torch.equal(a, b)), 0.0) for what, (a, b) in copied.items()}

    return Contestant(step, errors)
