"""What recalibration gives back to small networks on digits, where running statistics are wrong; ten paired seeds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm.bench.situations import BRIGHTEST, Network, Recipe, fit, made
from batchnorm.lab.data import Split
from batchnorm.lab.train import score
from batchnorm.recalibrate import recalibrate

__all__ = ["CASES", "Repair"]

ROWS = 128


@dataclass(frozen=True)
class Repair:
    """A situation: how the network is trained, what is done to it then, and which rows it meets in the end."""

    name: str
    recipe: Recipe
    spoil: Callable[[Network, Recipe, Split, int], nn.Module]
    rows: Callable[[np.ndarray], np.ndarray] = lambda x: x
    options: tuple[tuple[str, Any], ...] = ()

    def measure(self, split: Split, seed: int, factor: int) -> dict[str, Any]:
        """Return log-loss and accuracy on test rows before and after, for one seed."""
        recipe = self.recipe.shortened(factor)
        network = made(recipe, seed)
        fit(network, recipe, split, seed)
        spoiled = self.spoil(network, recipe, split, seed)
        x_test = self.rows(split.x_test / BRIGHTEST).astype(np.float32)
        before = score(spoiled, x_test, split.y_test)
        x_train = torch.from_numpy(self.rows(split.x_train / BRIGHTEST).astype(np.float32))
        recalibrate(spoiled, torch.split(x_train, ROWS), progress=False, **dict(self.options))
        after = score(spoiled, x_test, split.y_test)
        return {"seed": seed, "before": _named(before), "after": _named(after)}


def _named(found: tuple[float, float]) -> dict[str, float]:
    return {"log_loss": found[0], "accuracy": found[1]}


def nothing(network: Network, *_: Any) -> nn.Module:
    """Leave the network as it is."""
    return network


def _moving_average() -> Any:
    return get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]


def averaged(
    network: Network, recipe: Recipe, split: Split, seed: int, rounds: int = 10, steps: int = 75, ema: bool = False
) -> nn.Module:
    """Train on in rounds at a larger rate, and average their weights: all alike (SWA), or as a moving average (EMA)."""
    average = AveragedModel(network, multi_avg_fn=_moving_average() if ema else None)
    rounds_recipe = replace(recipe, steps=min(steps, recipe.steps), learning_rate=5 * recipe.learning_rate)
    for number in range(rounds):
        fit(network, rounds_recipe, split, seed + 1000 * (number + 1))
        average.update_parameters(network)
    return average


def rounded(network: Network, *_: Any, bits: int = 8) -> nn.Module:
    """Round the weights of linear layers to integers of so many bits, one scale for each tensor."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                scale = module.weight.abs().max() / (2 ** (bits - 1) - 1)
                module.weight.copy_((module.weight / scale).round() * scale)
    return network


def pruned(network: Network, *_: Any, share: float) -> nn.Module:
    """Set this share of the weights of each linear layer to zero, the smallest ones."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight.abs().flatten().quantile(share)
                module.weight.masked_fill_(module.weight.abs() < bound, 0.0)
    return network


def dim(x: np.ndarray) -> np.ndarray:
    """Return rows of low contrast on a grey ground."""
    return 0.4 * x + 0.5


def noisy(x: np.ndarray) -> np.ndarray:
    """Return rows with noise on every pixel, the same noise for the same rows."""
    return x + 0.4 * np.random.default_rng(len(x)).standard_normal(x.shape)


CNN = Recipe()
MLP = replace(CNN, network="mlp", learning_rate=0.03)

CASES = [
    Repair("nothing wrong (batches of 64)", CNN, nothing),
    Repair("SWA of ten rounds", MLP, averaged),
    Repair("EMA over 60 short rounds", MLP, partial(averaged, rounds=60, steps=5, ema=True)),
    Repair("momentum 0.9, batches of 16", replace(MLP, batch_size=16, steps=300, layer={"momentum": 0.9}), nothing),
    Repair("momentum 0.001, 150 steps", replace(CNN, layer={"momentum": 0.001}), nothing),
    Repair("weights rounded to 8 bits", CNN, rounded),
    Repair("weights rounded to 3 bits", CNN, partial(rounded, bits=3)),
    Repair("70 % of the weights pruned", CNN, partial(pruned, share=0.7)),
    Repair("another domain: low contrast", CNN, nothing, dim),
    Repair("another domain: noise", CNN, nothing, noisy),
    Repair("another domain: noise, prior 1,000", CNN, nothing, noisy, (("prior", 1000),)),
]
