"""Make the changes of a rewrite in a torch module."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.affine import Affine
from batchnorm.graph import Border, Changes
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.replacements import ChannelPad, Remainder, ScaleShift, tensor_like

__all__ = ["rewrite"]


def rewrite(model: nn.Module, changes: Changes) -> nn.Module:
    """Make all changes in a module and return it: the module itself, or what stands in its place if it is a norm."""
    for weights, (weight, bias) in changes.weights.items():
        _store(model, weights.key, weight, bias)
    for weights in changes.unpadded:
        convolution: Any = model.get_submodule(weights.key.module)
        convolution.padding = (0,) * len(convolution.kernel_size)
        convolution._reversed_padding_repeated_twice = [0] * (2 * len(convolution.kernel_size))
    for norm, replacement in changes.norms.items():
        model = _replace(model, norm.key.module, replacement)
    return model


def _store(model: nn.Module, site: Any, weight: Tensor, bias: Tensor | None) -> None:
    owner = model.get_submodule(site.module)
    parameter = getattr(owner, site.attribute)
    with torch.no_grad():
        parameter.data = weight.to(parameter.device)
        if site.bias:
            assert bias is not None  # noqa: S101
            path, _, name = site.bias.rpartition(".")
            getattr(model.get_submodule(path), name).data = bias.to(parameter.device)
        elif bias is not None:
            owner.register_parameter("bias", nn.Parameter(bias.to(parameter.device), parameter.requires_grad))


def _replace(model: nn.Module, name: str, replacement: Affine | Border | None) -> nn.Module:
    old = model.get_submodule(name)
    new = _stand_in(old, replacement)
    new.train(old.training)
    if old is model:
        return new
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return model


def _stand_in(old: nn.Module, replacement: Affine | Border | None) -> nn.Module:
    inner: nn.Module = nn.Identity()
    like = _vector_of(old)
    if isinstance(replacement, Affine):
        inner = ScaleShift(tensor_like(replacement.scale, like), tensor_like(replacement.shift, like))
    elif isinstance(replacement, Border):
        sizes = {axis: (before, after) for axis, before, after in replacement.padding}
        last = max(sizes)
        padding = [n for axis in range(last, min(sizes) - 1, -1) for n in sizes.get(axis, (0, 0))]
        inner = ChannelPad(tensor_like(replacement.value, like), padding)
    if isinstance(old, BatchNorm):
        inner = Remainder(inner, old.options.activation)
    return inner


def _vector_of(norm: Any) -> Tensor:
    """Return a tensor of a norm whose dtype and device its stand-in shall have."""
    return next(v for v in (norm.weight, norm.running_mean) if v is not None)  # type: ignore[no-any-return]
