"""How fast an optimizer turns the weights of linear layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.errors import OptionError
from batchnorm.states import Rate

__all__ = ["rates"]


def rates(model: nn.Module, optimizer: Any, layers: Sequence[str] = ()) -> list[Rate]:
    """Return learning rate, length and gradient of the weights of linear layers, where the optimizer holds them.

    Args:
        model: a module.
        optimizer: of torch.
        layers: dotted names; empty for all dense layers and convolutions.

    Raises:
        OptionError: no optimizer of torch, or one that holds none of the model's parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    steps = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"] if "lr" in group}
    if not any(p in steps for p in model.parameters()):
        raise OptionError("optimizer must hold parameters of the model, it holds none of them")
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _ConvNd) and (not layers or name in layers)
    }
    return [_rate(name, weight, steps[weight]) for name, weight in weights.items() if weight in steps]


def _rate(name: str, weight: Tensor, step: float) -> Rate:
    size = _length(weight)
    gradient = None if weight.grad is None or size == 0 else _length(weight.grad) / size
    return Rate(name, step, size, gradient)


def _length(v: Tensor) -> float:
    v = v.detach()
    v = v.to_dense() if v.layout is not torch.strided else v
    return float(torch.linalg.vector_norm(v.double() if v.device.type != "mps" else v))
