"""Parameter groups for an optimizer: no weight decay on γ, β and biases."""

from typing import Any

from torch import nn

__all__ = ["param_groups"]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: what is decayed, and γ, β, biases and all other vectors and scalars, which are not.

    Decay pulls γ towards zero without making the function simpler: the next layer's weights undo it. Every parameter of the
    model is in one of the groups, once, also where modules share it.

    Args:
        model: any module.
        weight_decay: of the first group, per step and unit of weight, as the optimizer takes it.

    Returns:
        ``[{"params": …, "weight_decay": weight_decay}, {"params": …, "weight_decay": 0.0}]``

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> [len(group["params"]) for group in param_groups(model, 1e-4)]
        [1, 3]

    Reference:
        van Laarhoven: L2 regularization versus batch and weight normalization, 2017 (arXiv:1706.05350).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2].endswith("bias")
        (plain if is_bias or parameter.ndim <= 1 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
