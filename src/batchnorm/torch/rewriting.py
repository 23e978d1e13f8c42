"""Make the changes of a rewrite in a torch module."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.affine import Affine
from batchnorm.graph import Border, Changes
from batchnorm.torch.graphs import add_bias, replace_norm
from batchnorm.torch.keys import Site
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.preparing import drop_biases, replace_module
from batchnorm.torch.replacements import ChannelPad, Remainder, ScaleShift, tensor_like

__all__ = ["rewrite"]


_DESCRIPTION = ("num_features", "eps", "momentum", "affine", "track_running_stats")


def rewrite(model: nn.Module, changes: Changes, biases: tuple[str, ...] = ()) -> nn.Module:
    """Make all changes in a module and return it: the module itself, or what stands in its place if it is a norm.

    Args:
        model: the module.
        changes: what to do.
        biases: modules that were given a bias in case they need one; where they do not, it is taken away.
    """
    drop_biases(model, set(biases) - {weights.key.module for weights in changes.weights})
    for weights, (weight, bias) in changes.weights.items():
        _store(model, weights.key, weight, bias)
    for weights in changes.unpadded:
        convolution: Any = model.get_submodule(weights.key.module)
        convolution.padding = (0,) * len(convolution.kernel_size)
        convolution._reversed_padding_repeated_twice = [0] * (2 * len(convolution.kernel_size))
    for norm, replacement in changes.norms.items():
        if norm.key.nodes:
            (node,) = norm.key.nodes
            stand_in = _inner(replacement, _any_vector(model))
            replace_norm(model, node, replacement, stand_in)
        else:
            model = _replace(model, norm.key, replacement)
    return model


def _store(model: nn.Module, site: Any, weight: Tensor, bias: Tensor | None) -> None:
    owner = model.get_submodule(site.module)
    parameter = getattr(owner, site.attribute)
    with torch.no_grad():
        parameter.data = weight.to(parameter.device)
        if site.bias and bias is not None:
            path, _, name = site.bias.rpartition(".")
            _store_bias(model.get_submodule(path), name, bias, parameter)
        elif bias is not None and site.nodes:
            add_bias(model, site.nodes, site.module, nn.Parameter(bias.to(parameter.device), parameter.requires_grad))
        elif bias is not None:
            owner.register_parameter("bias", nn.Parameter(bias.to(parameter.device), parameter.requires_grad))


def _store_bias(owner: nn.Module, name: str, bias: Tensor, weight: nn.Parameter) -> None:
    old = getattr(owner, name)
    if old is None:
        owner.register_parameter(name, nn.Parameter(bias.to(weight.device), weight.requires_grad))
    else:
        old.data = bias.to(old.device)


def _replace(model: nn.Module, site: Site, replacement: Affine | Border | None) -> nn.Module:
    old: Any = model.get_submodule(site.module)
    new = _inner(replacement, old.weight if getattr(old, "weight", None) is not None else old.running_mean)
    if isinstance(old, BatchNorm) and (old.options.activation is not None or site.arguments > 1):
        new = Remainder(new, old.options.activation)
    for name in _DESCRIPTION:
        # programs ask their layers for such things
        if hasattr(old, name) and not hasattr(new, name):
            setattr(new, name, getattr(old, name))
    return replace_module(model, site.module, new.train(old.training))


def _any_vector(model: nn.Module) -> Tensor:
    tensors = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return next(tensors, torch.zeros(0))


def _inner(replacement: Affine | Border | None, like: Tensor) -> nn.Module:
    if isinstance(replacement, Affine):
        return ScaleShift(tensor_like(replacement.scale, like), tensor_like(replacement.shift, like))
    if isinstance(replacement, Border):
        sizes = {axis: (before, after) for axis, before, after in replacement.padding}
        last = max(sizes)
        padding = [n for axis in range(last, min(sizes) - 1, -1) for n in sizes.get(axis, (0, 0))]
        return ChannelPad(tensor_like(replacement.value, like), padding)
    return nn.Identity()
