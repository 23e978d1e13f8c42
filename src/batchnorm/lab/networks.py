"""The networks that are compared: the same for every arm but for what the arm declares."""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.lab import factories
from batchnorm.lab.arms import Arm
from batchnorm.lab.factories import Factory
from batchnorm.moments import Moments
from batchnorm.torch import BatchNorm1d, BatchNorm2d

__all__ = ["ACTIVATIONS", "NETWORKS", "Standardize", "build", "factory_of", "hidden"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

VALUES_AT_ONCE = 2**14

# A cluster's workers may run several tasks as threads of one process, which share torch's global generator.
GLOBAL_RNG = threading.Lock()


class Standardize(nn.Module):
    """Subtract the mean and divide by the deviation of the training rows: ``y = (x - mean) / std``, both constants.

    Args:
        mean: shape of one row, with size 1 where places share a statistic.
        std: like ``mean``; channels that never vary have 1.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @classmethod
    def of(cls, x: torch.Tensor) -> "Standardize":
        """Measure ``x``: each feature of ``(N, features)``, each channel of ``(N, C, H, W)``."""
        # in small parts: a large data set in float64 would be the largest thing in memory
        rows = max(1, VALUES_AT_ONCE // x[0].numel())
        measured = Moments.empty().merge(*(Moments.of(part) for part in torch.split(x, rows)))
        std = measured.variance.sqrt()
        shape = (-1, *[1] * (x.ndim - 2))
        return cls(measured.mean.float().reshape(shape), torch.where(std == 0, 1.0, std).float().reshape(shape))

    @property
    def running_mean(self) -> torch.Tensor:
        """What is subtracted, ``(C,)``: folding takes the layer for a frozen batch normalization."""
        return self.mean.flatten()

    @property
    def running_var(self) -> torch.Tensor:
        """The square of what is divided by, ``(C,)``."""
        return self.std.flatten().square()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the standardized rows."""
        return torch.div(x - self.mean, self.std)


class Residual(nn.Module):
    """``x + branch(x)``."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of the input and the branch."""
        change: torch.Tensor = self.branch(x)
        return x + change


def hidden(arm: Arm, linear: nn.Module, features: int) -> list[nn.Module]:
    """Return a linear layer with the normalization and activation of an arm, in the arm's order.

    Example:
        >>> from batchnorm.lab import ARMS
        >>> [type(layer).__name__ for layer in hidden(ARMS["after"], nn.Linear(4, 3), 3)]
        ['Linear', 'ReLU', 'BatchNorm1d']
    """
    activation = ACTIVATIONS[arm.activation]()
    norm = _norm(arm, features, images=isinstance(linear, nn.Conv2d))
    if norm is None:
        return [linear, activation]
    return [linear, norm, activation] if arm.place == "before" else [linear, activation, norm]


def mlp(shape: tuple[int, ...], classes: int, arm: Arm, width: int = 100, depth: int = 3) -> nn.Module:
    """The paper's fully connected network: three hidden layers of a hundred units."""
    layers: list[nn.Module] = []
    features = math.prod(shape)
    for _ in range(depth):
        layers += hidden(arm, _linear(features, width, arm.linear_bias), width)
        features = width
    return nn.Sequential(*layers, _linear(features, classes))


def cnn(shape: tuple[int, ...], classes: int, arm: Arm) -> nn.Module:
    """Two 3×3 convolutions, each halving the image, and a dense layer."""
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise OptionError(f"the model cnn needs images of at least 4×4 pixels, the data has rows of shape {shape}")
    side = [n // 4 for n in shape[1:]]
    return nn.Sequential(
        *hidden(arm, _conv(shape[0], 16, arm.linear_bias), 16),
        nn.MaxPool2d(2),
        *hidden(arm, _conv(16, 32, arm.linear_bias), 32),
        nn.MaxPool2d(2),
        nn.Flatten(),
        _linear(32 * side[0] * side[1], classes),
    )


def resmlp(shape: tuple[int, ...], classes: int, arm: Arm, width: int = 64, depth: int = 8) -> nn.Module:
    """A residual network: eight blocks ``x + linear(hidden(x))`` of width 64."""
    blocks = (
        Residual(*hidden(arm, _linear(width, width, arm.linear_bias), width), _linear(width, width))
        for _ in range(depth)
    )
    return nn.Sequential(_linear(math.prod(shape), width), *blocks, _linear(width, classes))


NETWORKS: dict[str, Factory] = {"mlp": mlp, "cnn": cnn, "resmlp": resmlp}
"""The networks that have a name."""

_FLAT = ("mlp", "resmlp")


def build(model: str, shape: tuple[int, ...], classes: int, arm: Arm, seed: int, x_train: torch.Tensor) -> nn.Module:
    """Build the network of an arm, from raw rows to logits; equal seeds give equal linear weights in every arm.

    Raises:
        OptionError: an unknown model, or a factory that fails.
    """
    factory = factory_of(model)
    with GLOBAL_RNG, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = factories.called(factory, model, shape, classes, arm, "a torch module")
    if not isinstance(network, nn.Module):
        raise OptionError(f"{model} must return a torch.nn.Module, it returned a {type(network).__name__}")
    flat = [nn.Flatten()] if model in _FLAT and len(shape) > 1 else []
    rows = x_train.flatten(1) if flat else x_train
    return nn.Sequential(*flat, *_input(arm, rows), network)


def factory_of(model: str) -> Factory:
    """Return the factory ``(shape, classes, arm) -> module`` of a named network or of ``package.module:factory``.

    Raises:
        OptionError: no such network, module or factory, or one that does not take these arguments.
    """
    return factories.factory_of(model, NETWORKS)


def _input(arm: Arm, rows: torch.Tensor) -> list[nn.Module]:
    if arm.input == "standardized":
        return [Standardize.of(rows)]
    if arm.input == "norm":
        return [BatchNorm1d(rows.shape[1]) if rows.ndim == 2 else BatchNorm2d(rows.shape[1])]
    return []


def _norm(arm: Arm, features: int, images: bool) -> nn.Module | None:
    if arm.norm == "batch":
        return BatchNorm2d(features) if images else BatchNorm1d(features)
    if arm.norm == "group":
        return nn.GroupNorm(8 if features % 8 == 0 else math.gcd(features, 10), features)
    if arm.norm == "layer":
        return nn.GroupNorm(1, features) if images else nn.LayerNorm(features)
    return None


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    return _initialized(nn.Linear, inputs, outputs, bias=bias)


def _conv(inputs: int, outputs: int, bias: bool) -> nn.Module:
    return _initialized(nn.Conv2d, inputs, outputs, 3, padding=1, bias=bias)


def _initialized(kind: Callable[..., Any], *sizes: int, **options: Any) -> nn.Module:
    """Draw He's normal weights, and nothing else: a bias that drew would shift the weights of all later layers."""
    linear = nn.utils.skip_init(kind, *sizes, **options)  # type: ignore[no-untyped-call]
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear  # type: ignore[no-any-return]
