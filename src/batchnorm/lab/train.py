"""Train one network: one arm, one learning rate, one seed. The same task gives the same numbers everywhere."""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from torch import nn

from batchnorm.errors import BatchNormWarning, NonFiniteError
from batchnorm.lab.data import Dataset, Split
from batchnorm.lab.networks import ACTIVATIONS, GLOBAL_RNG, build
from batchnorm.lab.tasks import (
    CURVE_POINTS,
    CURVE_ROWS,
    PERCENTILE_POINTS,
    PERCENTILES,
    PROBE_ROWS,
    PROBE_UNITS,
    Recipe,
    Task,
    batches,
    row_of,
    units_of,
)
from batchnorm.torch.evaluation import evaluating

__all__ = ["Recipe", "Task", "one_thread", "score", "train", "train_network"]


def train(task: Task, recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """Train one network and return its row; a network whose loss is no longer finite stops and is marked diverged."""
    with one_thread():
        return train_network(task, recipe, data)[1]


def train_network(task: Task, recipe: Recipe, data: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """Train one network and return it with its row."""
    started = time.perf_counter()
    split = data.split(task.seed)
    x, y = torch.from_numpy(split.x_train), torch.from_numpy(split.y_train)
    network = build(recipe.model, data.shape, len(data.classes), task.arm, task.seed, x)
    watch = _Watch(network, split, recipe.steps)
    parameters = [p for p in network.parameters() if p.requires_grad]
    diverged, step = False, 0
    stream = batches(len(y), task.arm.batch_size or recipe.batch_size, task.seed)
    with _own_rng(task.seed), _expecting_divergence():
        network.train()
        try:
            for step in range(1, recipe.steps + 1):
                rows = torch.from_numpy(next(stream))
                loss = F.cross_entropy(network(x[rows]), y[rows])
                diverged = not math.isfinite(loss.item())
                if diverged:
                    break
                _descend(parameters, loss, task.learning_rate)
                watch.look(step, loss.item())
        except NonFiniteError:
            diverged = True
    row = row_of(
        task,
        diverged=diverged,
        steps=step,
        val=score(network, split.x_val, split.y_val),
        test=score(network, split.x_test, split.y_test),
        curve=watch.curve,
        units=watch.units(),
        seconds=time.perf_counter() - started,
        threads=torch.get_num_threads(),
    )
    return network, row


def _descend(parameters: list[nn.Parameter], loss: torch.Tensor, learning_rate: float) -> None:
    """Take one step of stochastic gradient descent, as ``torch.optim.SGD`` does.

    Its constructor would import torch's compiler, which costs every worker two seconds.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.add_(gradient, alpha=-learning_rate)


def score(network: nn.Module, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return mean log-loss in nats and accuracy in evaluation mode."""
    total, right = 0.0, 0
    with evaluating(network):
        for i in range(0, len(y), 4096):
            # copies: rows that processes share can't be written to, which torch's tensors could
            logits, labels = network(torch.tensor(x[i : i + 4096])), torch.tensor(y[i : i + 4096])
            total += F.cross_entropy(logits.double(), labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
    return total / len(y), right / len(y)


@contextmanager
def one_thread() -> Iterator[None]:
    """Give each run one thread: parallel runs share the cores without fighting for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _expecting_divergence() -> Iterator[None]:
    """Say nothing of batches that are not finite: the row says that the run diverged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        yield


@contextmanager
def _own_rng(seed: int) -> Iterator[None]:
    """Let dropout and the like in a user's network draw from the seed, and leave the global generator as it was."""
    with GLOBAL_RNG:
        before = torch.get_rng_state()
        torch.manual_seed(seed)
    try:
        yield
    finally:
        with GLOBAL_RNG:
            torch.set_rng_state(before)


class _Watch:
    """Records the learning curve, and what flows into the activations, without moving any running statistic."""

    def __init__(self, network: nn.Module, split: Split, steps: int) -> None:
        self.network, self.split = network, split
        self.curve: list[list[float | None]] = []
        self.curve_every = max(1, steps // CURVE_POINTS)
        self.probe_every = max(1, steps // PERCENTILE_POINTS)
        self.probe = torch.from_numpy(split.x_val[:PROBE_ROWS])
        self.probed: list[tuple[int, list[torch.Tensor]]] = []

    def look(self, step: int, loss: float) -> None:
        if step % self.curve_every == 0:
            val = score(self.network, self.split.x_val[:CURVE_ROWS], self.split.y_val[:CURVE_ROWS])
            self.curve.append([step, *(v if math.isfinite(v) else None for v in (loss, *val))])
        if step % self.probe_every == 0 or step == 1:
            self.probed.append((step, self._percentiles()))

    def _percentiles(self) -> list[torch.Tensor]:
        """Return the percentiles of what the first units of each activation layer receive in training, ``(3, units)``."""
        found: list[torch.Tensor] = []

        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].detach().double()
            units = values.transpose(0, 1).flatten(1)[:PROBE_UNITS, :4096]
            found.append(torch.quantile(units, torch.tensor(PERCENTILES).double(), dim=1))

        kinds = tuple(ACTIVATIONS.values())
        layers = [module for module in self.network.modules() if isinstance(module, kinds)]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        # the copies take the updates of the running statistics
        copies = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        try:
            with torch.no_grad():
                torch.func.functional_call(self.network, copies, (self.probe,))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def units(self) -> list[dict[str, Any]]:
        """Return what the probes have seen, for each activation layer."""
        return units_of([(step, [values.numpy() for values in found]) for step, found in self.probed])
