"""One batch for a normalization, and what `batchnorm.functional` computes of it in float64: the judge of contestants."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.bench.contest import Errors
from batchnorm.functional import batch_norm_backward, batch_norm_inference, batch_norm_train

__all__ = ["ACTIVATIONS", "LAYOUTS", "Case", "filled", "run_layer", "torchs"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
# where the slope of an activation jumps, and how near rounding may decide which slope is taken
_KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
_NEAR = 1e-3
# twice the error of torch's layer, and some units in the last place
_TIMES, _UNITS = 2.0, 8.0
_EPS, _BLOCK = 1e-5, 1 << 22

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A batch, an upstream gradient, and the results that are right.

    Args:
        x: ``(N, C, *spatial)``.
        dy: the gradient of the output; 0 where the slope of the activation jumps, so that rounding does not decide.
        gamma: of C numbers, as those that follow.
        beta: the shift.
        running: mean and variance, before.
        activation: a name of `ACTIVATIONS`, or ``None``.
        training: forward, backward and statistics; else the forward pass of evaluation alone.
        expected: in float64.
        peer: the errors of torch's layer in the same dtype, contiguous.
    """

    x: Tensor
    dy: Tensor
    gamma: Tensor
    beta: Tensor
    running: tuple[Tensor, Tensor]
    activation: str | None
    training: bool
    expected: Results
    peer: dict[str, float]

    @classmethod
    def drawn(
        cls, shape: tuple[int, ...], dtype: torch.dtype, activation: str | None = None, *, training: bool = True
    ) -> "Case":
        """Draw a batch, and compute what is right."""
        x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
        channels = shape[1]
        gamma, beta = torch.rand(channels) + 0.5, 0.2 * torch.randn(channels)
        running = (0.2 * torch.randn(channels), torch.rand(channels) + 0.5)
        case = cls(x, dy, gamma, beta, running, activation, training, {}, {})
        case.expected.update(_expected(case))
        results = run_layer(case, torchs(case))
        case.peer.update({what: _distance(results[what], right) for what, right in case.expected.items()})
        return case

    def laid_out(self, layout: str) -> "Case":
        """Return the same batch in another layout."""
        there = {name: getattr(self, name).contiguous(memory_format=LAYOUTS[layout]) for name in ("x", "dy")}
        return replace(self, **there)

    def errors(self, results: Results) -> Errors:
        """Return the largest error of each result, and what is allowed: twice that of torch's layer, and a few ULP."""
        return self._judged(results, lambda what, eps: _TIMES * self.peer[what] + _UNITS * eps * self._largest(what))

    def errors_of_torch(self, results: Results) -> Errors:
        """Return the same for torch's own layer: half of the digits of a batch's dtype must be right, in every layout."""
        return self._judged(results, lambda what, _: torch.finfo(self.x.dtype).eps ** 0.5 * self._largest(what))

    def _judged(self, results: Results, allowed: Callable[[str, float], float]) -> Errors:
        return {
            what: (_distance(results[what], right), allowed(what, torch.finfo(results[what].dtype).eps))
            for what, right in self.expected.items()
        }

    def _largest(self, what: str) -> float:
        return float(self.expected[what].abs().max())


def filled(layer: Any, case: Case) -> Any:
    """Give a layer the parameters and statistics of a case."""
    with torch.no_grad():
        values = (case.gamma, case.beta, *case.running)
        for there, value in zip((layer.weight, layer.bias, layer.running_mean, layer.running_var), values, strict=True):
            there.copy_(value)
    return layer.train(case.training)


def torchs(case: Case) -> nn.Module:
    """Return torch's own layer for a case, followed by its activation."""
    cls: Any = nn.BatchNorm1d if case.x.ndim == 2 else nn.BatchNorm2d
    layer: nn.Module = filled(cls(case.x.shape[1]), case)
    return layer if case.activation is None else nn.Sequential(layer, ACTIVATIONS[case.activation]())


def run_layer(case: Case, layer: nn.Module) -> Results:
    """Return what a fresh layer makes of a case: output, gradients, statistics; in evaluation the output."""
    x = case.x.detach().requires_grad_()
    y = layer(x)
    results = {"y": y.detach()}
    if not case.training:
        return results
    y.backward(case.dy)
    norm: Any = next(m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    gradients = {"dx": x.grad, "dγ": norm.weight.grad, "dβ": norm.bias.grad}
    return (
        results | gradients | {"running mean": norm.running_mean.clone(), "running variance": norm.running_var.clone()}
    )


# -- the definition, a few channels at a time -----------------------------------------------------------------------


def _expected(case: Case) -> Results:
    """Compute what is right, and take the upstream gradient out where rounding would decide."""
    channels = case.x.shape[1]
    wide = {"y": torch.empty(case.x.shape, dtype=torch.float64)}
    if case.training:
        wide["dx"] = torch.empty_like(wide["y"])
        wide |= {
            name: torch.empty(channels, dtype=torch.float64)
            for name in ("dγ", "dβ", "running mean", "running variance")
        }
    some = max(1, _BLOCK * channels // case.x.numel())
    for start in range(0, channels, some):
        block = slice(start, start + some)
        for name, value in _block(case, block).items():
            there = wide[name][:, block] if name in ("y", "dx") else wide[name][block]
            there.copy_(torch.from_numpy(value))
    return wide


def _block(case: Case, block: slice) -> dict[str, np.ndarray]:
    x = case.x[:, block].double().numpy()
    gamma, beta, mean, var = (v[block].double().numpy() for v in (case.gamma, case.beta, *case.running))
    if not case.training:
        return {"y": _activated(case, batch_norm_inference(x, mean, var, gamma, beta, eps=_EPS))[0]}
    step = batch_norm_train(x, gamma, beta, mean, var, eps=_EPS)
    for kink in _KINKS.get(case.activation or "", ()):
        # a module of its own gets what was rounded
        near = max(_NEAR, 2 * torch.finfo(case.x.dtype).eps * abs(kink))
        case.dy[:, block][torch.from_numpy(np.abs(step.y - kink) < near)] = 0
    y, dz = _activated(case, step.y, case.dy[:, block].double())
    dx, dgamma, dbeta = batch_norm_backward(dz, x, gamma, eps=_EPS)
    statistics = {"running mean": step.running_mean, "running variance": step.running_var}
    return {"y": y, "dx": dx, "dγ": dgamma, "dβ": dbeta, **statistics}


def _activated(case: Case, z: np.ndarray, dy: Tensor | None = None) -> tuple[np.ndarray, Any]:
    """Return the activation of ``z``, and the gradient that reaches ``z``."""
    if case.activation is None:
        return z, None if dy is None else dy.numpy()
    wide = torch.from_numpy(z).requires_grad_()
    y = ACTIVATIONS[case.activation]()(wide)
    if dy is not None:
        y.backward(dy)
    return y.detach().numpy(), None if dy is None else wide.grad.numpy()  # type: ignore[union-attr]


def _distance(got: Tensor, right: Tensor) -> float:
    """Return the largest error, infinite where something is not a number."""
    if got.shape != right.shape:
        return float("inf")
    samples = max(1, _BLOCK * len(right) // right.numel())
    return max(
        float((one.double() - other).abs().nan_to_num(nan=float("inf")).max())
        for one, other in zip(torch.split(got, samples), torch.split(right, samples), strict=True)
    )
