"""A network of one's own in a comparison: a factory says how the arms build it."""

import math

import torch
from torch import nn

import batchnorm as bn
from batchnorm.lab import Arm, hidden


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """Return a layer that draws its weights and nothing else, so that equal seeds give equal weights in every arm."""
    layer = nn.Linear(inputs, outputs, bias=False)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


def bottleneck(shape: tuple[int, ...], classes: int, arm: Arm) -> nn.Module:
    """Two hidden layers, the second one narrow; `hidden` puts in the normalization and the activation of the arm."""
    inputs = math.prod(shape)
    return nn.Sequential(
        nn.Flatten(),
        *hidden(arm, linear(inputs, 64, arm.linear_bias), 64),
        *hidden(arm, linear(64, 16, arm.linear_bias), 16),
        linear(16, classes, bias=True),
    )


def main() -> None:
    found = bn.compare(
        "digits",
        model="own_network:bottleneck",
        arms=["none", "before", "tanh: norm=batch, activation=tanh"],
        learning_rates=[0.1, 0.3],
        seeds=3,
        steps=60,
        jobs=2,
    )
    print(found.best.summary)
    print()
    print(found)


# Workers import this file to find the factory: without the guard each of them would start a comparison.
if __name__ == "__main__":
    main()
