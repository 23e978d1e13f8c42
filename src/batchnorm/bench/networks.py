"""Networks that are trained beside each other: how they are built, converted, stepped, and held to the same answers."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.bench.contest import Errors
from batchnorm.bench.zoo import open_torchvision
from batchnorm.errors import MissingDependencyError
from batchnorm.torch import convert

__all__ = ["Batch", "allowed_errors", "answers", "batch_of", "built", "errors_of", "fused", "trainer"]

RATE, MOMENTUM, CLASSES = 1e-3, 0.9, 1000
UNITS, DRAWS = 8.0, 3
# draws of the same network differ by three times; what is wrong is at 1e-7 or more, which float64 shows beside 1e-10
TIMES = {torch.float32: 2.0, torch.float64: 10.0}

Batch = tuple[Tensor, Tensor]
Answers = dict[str, Tensor]
Context = Callable[[], AbstractContextManager[Any]]


def built(name: str) -> nn.Module:
    """Return a network of torchvision with random weights, the same on every call, in training.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    try:
        open_torchvision()
    except ImportError as error:
        raise MissingDependencyError(
            "networks come from torchvision, which is not installed: pip install 'batchnorm[zoo]'"
        ) from error
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: nn.Module = import_module("torchvision.models").get_model(name, weights=None, **options)
    return model.train()


def batch_of(samples: int, side: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Return random images and labels, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, side, side, generator=generator).to(dtype)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    """Convert a copy of a network, with its activations where `convert` can do that."""
    return convert(copy.deepcopy(model), fuse=True, example=x)


def trainer(model: nn.Module, batch: Batch, context: Context = nullcontext) -> Callable[[], None]:
    """Return a whole step of training: forward within ``context``, loss, backward, SGD with momentum."""
    x, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        with context():
            loss = cross_entropy(model(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


# -- the same answers ----------------------------------------------------------------------------------------------------


def answers(model: nn.Module, batch: Batch, context: Context = nullcontext) -> Answers:
    """Return the loss, all gradients and all running statistics after one forward and backward of a copy of a network."""
    model, (x, labels) = copy.deepcopy(model), batch
    with torch.random.fork_rng(devices=()):
        # dropout
        torch.manual_seed(0)
        with context():
            loss = cross_entropy(model(x), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: v for name, v in model.named_buffers() if v.is_floating_point()}
    return {
        "loss": loss.detach(),
        "gradients": torch.cat([v.flatten() for _, v in sorted(gradients.items())]),
        "statistics": torch.cat([v.flatten() for _, v in sorted(statistics.items())]),
    }


def allowed_errors(model: nn.Module, batch: Batch, right: Answers) -> dict[str, float]:
    """Return how far from ``right`` a network may be: `TIMES` as far as rounding takes it from itself, and a few ULP.

    It is the same network on torch's kernels in channels-last, where sums have another order, with parameters that are
    rounded once more. What rounding does to this network, from layer to layer, is in the difference: a bound from outside
    would not know. Few directions make up most of it, so that one draw is not enough.
    """
    x, labels = batch
    there = x.contiguous(memory_format=torch.channels_last), labels
    draws = [_distances(answers(_rounded_again(model, seed), there), right) for seed in range(DRAWS)]
    eps = torch.finfo(x.dtype).eps
    return {what: TIMES[x.dtype] * max(draw[what] for draw in draws) + UNITS * eps for what in right}


def _rounded_again(model: nn.Module, seed: int) -> nn.Module:
    """Return a network in channels-last with every parameter moved by up to one unit in the last place."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            moved = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 0.5
            parameter.mul_(1 + 2 * torch.finfo(parameter.dtype).eps * moved)
    return model


def errors_of(found: Answers, right: Answers, allowed: dict[str, float], of: str = "") -> Errors:
    """Return relative errors of loss, gradients and statistics with what is allowed."""
    return {f"{what}{of}": (far, allowed[what]) for what, far in _distances(found, right).items()}


def _distances(found: Answers, right: Answers) -> dict[str, float]:
    """Return the length of each difference relative to that of what is right."""
    return {
        what: float((found[what] - v).double().norm() / v.double().norm())
        if found[what].shape == v.shape
        else float("inf")
        for what, v in right.items()
    }
