"""Freeze batch normalization so that it stays frozen."""

from torch import nn

from batchnorm.torch.surgery import convert, named_layers

__all__ = ["freeze", "unfreeze"]


def freeze(model: nn.Module, statistics: bool = True, affine: bool = True) -> nn.Module:
    """Freeze the batch normalization of a model, in place, whatever ``.train()`` is called later.

    Frozen statistics: training normalizes with the running statistics, as evaluation does, and they no longer move. Frozen γ
    and β: they get no gradient. Survives ``.train()``, deepcopy, pickle, ``load_state_dict`` and DDP. Layers of torch's own
    are converted on the way.

    Args:
        model: any module, also a single layer.
        statistics: freeze running mean and variance.
        affine: freeze γ and β.

    Returns:
        The model itself.

    Example:
        >>> import torch
        >>> model = freeze(torch.nn.Sequential(torch.nn.BatchNorm1d(1, eps=0.0))).train()
        >>> model(torch.tensor([[1.0], [3.0]])).tolist(), model[0].running_mean.item()
        ([[1.0], [3.0]], 0.0)
    """
    convert(model)
    for _, layer in named_layers(model):
        if statistics and layer.track_running_stats:
            layer.frozen_statistics = True
            layer.settle()
        if affine and layer._frozen_affine is None:
            layer._frozen_affine = {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}
            layer.requires_grad_(False)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`, in place: statistics move again, γ and β need the gradients that they needed before.

    Args:
        model: any module, also a single layer.

    Returns:
        The model itself.

    Example:
        >>> import torch
        >>> unfreeze(freeze(torch.nn.BatchNorm2d(3))).weight.requires_grad
        True
    """
    for _, layer in named_layers(model):
        layer.frozen_statistics = False
        layer.settle()
        for name, needed in (layer._frozen_affine or {}).items():
            getattr(layer, name).requires_grad_(needed)
        layer._frozen_affine = None
    return model
