"""Train a small network on digits, in the situation that an option of the layers is for."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as ours
from batchnorm.errors import BatchNormWarning
from batchnorm.lab.data import Split
from batchnorm.lab.train import score

__all__ = ["BRIGHTEST", "Network", "Recipe", "fit", "made", "outcome"]

BRIGHTEST = 16
MOST_PADDING = 8


class At(NamedTuple):
    """Where a training is: its seed, the step, of how many, and the rows of the batch."""

    seed: int
    step: int
    steps: int
    rows: Tensor


class Network(nn.Module):
    """Two times linear, batch normalization, ReLU; then a linear layer. A CNN halves its map in between."""

    def __init__(self, kind: str, norms: list[nn.Module]) -> None:
        super().__init__()
        self.is_cnn = kind == "cnn"
        if self.is_cnn:
            self.linears = nn.ModuleList([_conv(1, 8), _conv(8, 16)])
        else:
            self.linears = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)])
        self.head = nn.Linear(16 * 4 * 4 if self.is_cnn else 32, 10)
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Tensor, valid: Tensor | None = None, tell: bool = False, **given: Any) -> Tensor:
        """Return logits; what is not ``valid`` is 0 behind each layer, which is told of it or not."""
        return self.head(self.features(x, valid, tell, **given))  # type: ignore[no-any-return]

    def features(self, x: Tensor, valid: Tensor | None = None, tell: bool = False, **given: Any) -> Tensor:
        """Return what the last layer gets."""
        x = x if self.is_cnn else x.flatten(1)
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            if i and self.is_cnn:
                x = F.max_pool2d(x, 2)
                valid = None if valid is None else valid[:, ::2, ::2]
            x = torch.relu(norm(linear(x), **(given | {"mask": valid} if tell else given)))
            x = x if valid is None else x * valid[:, None]
        return x[..., :4, :4].flatten(1) if self.is_cnn else x


def _conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


# ways to cut the training rows into batches


def shuffled(y: Tensor, size: int, rng: np.random.Generator, last: bool = False) -> Iterator[Tensor]:
    """Yield batches for ever, each epoch in an order of its own; the smaller last one only where it is asked for."""
    while True:
        order = torch.from_numpy(rng.permutation(len(y)))
        yield from (order[i : i + size] for i in range(0, len(y) if last else len(y) - size + 1, size))


def two_classes(y: Tensor, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield batches for ever that hold two classes each."""
    while True:
        chosen = rng.choice(10, 2, replace=False)
        rows = np.flatnonzero(np.isin(y.numpy(), chosen))
        yield torch.from_numpy(rng.choice(rows, size, replace=False))


# ways to take one step: each goes backward and returns the loss


def step(network: nn.Module, x: Tensor, y: Tensor, _: At) -> Tensor:
    """Take the whole batch at once."""
    return _backward(F.cross_entropy(network(x), y))


def padded_step(network: nn.Module, x: Tensor, y: Tensor, at: At, tell: bool) -> Tensor:
    """Pad the batch with zeros by a number of places drawn for each step; tell the layers which are valid, or not."""
    more = 2 * int(np.random.default_rng((at.seed, at.step)).integers(MOST_PADDING // 2 + 1))
    valid = F.pad(torch.ones_like(x[:, 0], dtype=torch.bool), (0, more, 0, more))
    return _backward(F.cross_entropy(network(F.pad(x, (0, more, 0, more)), valid, tell), y))


def weighted_step(network: nn.Module, x: Tensor, y: Tensor, at: At, copies: bool) -> Tensor:
    """Count three rows in ten twice: as weights, or as copies in the batch."""
    weight = 1 + (at.rows % 10 < 3).long()
    if copies:
        x, y = x.repeat_interleave(weight, 0), y.repeat_interleave(weight)
        return _backward(F.cross_entropy(network(x), y))
    losses = F.cross_entropy(network(x, sample_weight=weight.float()), y, reduction="none")
    return _backward((losses * weight).sum() / weight.sum())


def micro_step(network: nn.Module, x: Tensor, y: Tensor, _: At, once: bool) -> Tensor:
    """Take micro-batches of eight, and add their gradients up."""
    total = torch.zeros(())
    with ours.accumulate(network) if once else nullcontext():
        for i in range(0, len(y), 8):
            rows = slice(i, i + 8)
            total += _backward(F.cross_entropy(network(x[rows]), y[rows], reduction="sum") / len(y))
    return total


def checkpointed_step(network: Network, x: Tensor, y: Tensor, _: At) -> Tensor:
    """Run the forward a second time in the backward, to keep less in memory."""
    return _backward(F.cross_entropy(network.head(checkpoint(network.features, x, use_reentrant=False)), y))


def inf_step(network: nn.Module, x: Tensor, y: Tensor, at: At) -> Tensor:
    """Put one infinite value into the batch half way through; its loss is not finite, so no step is taken on it."""
    if at.step == at.steps // 2:
        x = x.clone()
        x[0, 0, 0, 0] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        return step(network, x, y, at)


def domain_step(network: nn.Module, x: Tensor, y: Tensor, at: At, separate: bool) -> Tensor:
    """Take digits and inverted digits in turn."""
    if at.step % 2 == 0:
        return step(network, x, y, at)
    with ours.domain(network, "inverted") if separate else nullcontext():
        return step(network, 1 - x, y, at)


def _backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


# what happens before and after the training


def nothing(*_: Any) -> None:
    """Leave the network as it is."""


def add_inverted(network: nn.Module, *_: Any) -> None:
    """Give the inverted digits statistics of their own."""
    ours.add_domains(network, ["inverted"])


def pretrain(network: Network, split: Split, seed: int, steps: int, frozen: bool) -> None:
    """Train on digits as they are; then freeze the statistics, or do it by ``eval()``, which the next ``train()`` undoes."""
    fit(network, Recipe(steps=steps), split, seed)
    if frozen:
        ours.freeze(network, affine=False)
    else:
        network.norms.eval()


def choose_example_weight(network: Network, split: Split) -> None:
    """Take the weight that gives the lowest log-loss on the validation part."""

    def loss_with(weight: float) -> float:
        ours.convert(network, example_weight=weight)
        return score(network, split.x_val / BRIGHTEST, split.y_val)[0]

    ours.convert(network, example_weight=min((0.1, 0.2, 0.3), key=loss_with))


def take_statistics_anew(network: Network, split: Split) -> None:
    """Forget the running statistics, and average those of one epoch's batches."""
    layers: Any = network.norms
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    network.train()
    with torch.no_grad():
        for i in range(0, len(split.x_train), 64):
            network(torch.from_numpy(split.x_train[i : i + 64] / BRIGHTEST))


# ways to look at a trained network


def test(network: nn.Module, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return log-loss and accuracy."""
    return score(network, x, y)


def test_domains(network: nn.Module, x: np.ndarray, y: np.ndarray, separate: bool) -> tuple[float, float]:
    """Return log-loss and accuracy, means over digits and inverted digits."""
    plain = score(network, x, y)
    with ours.domain(network, "inverted") if separate else nullcontext():
        inverted = score(network, 1 - x, y)
    return (plain[0] + inverted[0]) / 2, (plain[1] + inverted[1]) / 2


@dataclass(frozen=True)
class Recipe:
    """All that a training is made of; two arms of a case differ in what the option is about."""

    network: str = "cnn"
    # options of our layers; None takes torch's own
    layer: dict[str, Any] | None = field(default_factory=dict)
    batch_size: int = 64
    steps: int = 150
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    grouped: bool = False
    rows: int | None = None
    mirrored: bool = False
    batches: Callable[..., Iterator[Tensor]] = shuffled
    step: Callable[..., Tensor] = step
    start: Callable[..., None] = nothing
    finish: Callable[..., None] = nothing
    test: Callable[..., tuple[float, float]] = test

    def shortened(self, factor: int) -> "Recipe":
        """Return the same with a part of the steps."""
        return replace(self, steps=max(2, self.steps // factor))


def outcome(recipe: Recipe, split: Split, seed: int) -> dict[str, Any]:
    """Train, and return test log-loss and accuracy, or in which way the training ``failed``."""
    network = made(recipe, seed)
    try:
        recipe.start(network, split, seed, recipe.steps)
        fit(network, recipe, split, seed)
    except ValueError as error:
        return {"seed": seed, "failed": f"{type(error).__name__}: {error}"}
    recipe.finish(network, split)
    x = split.x_test / BRIGHTEST
    loss, accuracy = recipe.test(network, x[..., ::-1].copy() if recipe.mirrored else x, split.y_test)
    if not math.isfinite(loss):
        return {"seed": seed, "failed": f"the test log-loss is {loss}"}
    return {"seed": seed, "log_loss": loss, "accuracy": accuracy}


def fit(network: Network, recipe: Recipe, split: Split, seed: int) -> None:
    """Train by stochastic gradient descent, with a rate that falls to zero; a step whose loss is not finite is not taken."""
    x = torch.from_numpy(split.x_train[: recipe.rows] / BRIGHTEST)
    x, y = x.flip(-1) if recipe.mirrored else x, torch.from_numpy(split.y_train[: recipe.rows])
    decay = recipe.weight_decay
    groups = ours.param_groups(network, decay) if recipe.grouped else network.parameters()
    optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, weight_decay=decay)
    batches = recipe.batches(y, recipe.batch_size, np.random.default_rng(seed))
    network.train()
    for number, rows in enumerate(islice(batches, recipe.steps)):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = recipe.learning_rate * (
            1 - number / recipe.steps
        )
        optimizer.zero_grad()
        loss = recipe.step(network, x[rows], y[rows], At(seed, number, recipe.steps, rows))
        if torch.isfinite(loss):
            optimizer.step()


def made(recipe: Recipe, seed: int) -> Network:
    """Make the network; the weights are the same for equal seeds, whatever the layers are."""
    space, options = (ours, recipe.layer) if recipe.layer is not None else (nn, {})
    layer: Any = partial(getattr(space, "BatchNorm2d" if recipe.network == "cnn" else "BatchNorm1d"), **options)
    widths = (8, 16) if recipe.network == "cnn" else (64, 32)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Network(recipe.network, [layer(width) for width in widths])
