"""Make the changes of a rewrite in a torch module."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.affine import Affine
from batchnorm.errors import OptionError
from batchnorm.graph import Norm
from batchnorm.portable import complement
from batchnorm.protocol import Border, Changes
from batchnorm.torch.graphs import add_bias, replace_norm
from batchnorm.torch.keys import Site
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.preparing import drop_biases, replace_modules
from batchnorm.torch.replacements import ChannelPad, Remainder, ScaleShift, tensor_like

__all__ = ["rewrite"]


_VECTORS = ("weight", "bias", "running_mean", "running_var")
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
    for weights in changes.biasless:
        model.get_submodule(weights.key.module).register_parameter("bias", None)
    for weights in changes.weights:
        _tell_sizes(model.get_submodule(weights.key.module), changes.groups.get(weights))
    _write_norms(model, changes)
    stand_ins = {}
    for norm, replacement in changes.norms.items():
        if norm.key.nodes:
            (node,) = norm.key.nodes
            replace_norm(model, node, replacement, _inner(replacement, _any_vector(model)))
        else:
            old = model.get_submodule(norm.key.module)
            stand_ins[old] = _stand_in(old, norm.key, replacement)
    return replace_modules(model, stand_ins)


def _write_norms(model: nn.Module, changes: Changes) -> None:
    for norm, mean in changes.means.items():
        _store_vector(model, norm, "running_mean", mean)
    for norm, gamma in changes.gammas.items():
        _store_vector(model, norm, "weight", gamma)
    for norm, taken in changes.numbers.items():
        _take_numbers(model, norm, taken)
    for norm, channels in changes.channels.items():
        _keep_channels(model.get_submodule(norm.key.module), channels)


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


def _tell_sizes(owner: Any, groups: int | None) -> None:
    """Make the attributes of a layer say what its weight holds."""
    weight = owner._parameters.get("weight")
    if type(owner) is nn.Linear:
        owner.out_features, owner.in_features = weight.shape
    elif isinstance(owner, nn.modules.conv._ConvNd) and weight is not None:
        owner.groups = owner.groups if groups is None else groups
        first, second = weight.shape[:2]
        sizes = (second * owner.groups, first) if not owner.transposed else (first, second * owner.groups)
        owner.in_channels, owner.out_channels = sizes


def _store_vector(model: nn.Module, norm: Norm, name: str, vector: np.ndarray) -> None:
    old = getattr(model.get_submodule(norm.key.module), name)
    if old is not None:
        with torch.no_grad():
            old.copy_(tensor_like(vector, old))


def _take_numbers(model: nn.Module, norm: Norm, taken: Norm) -> None:
    owner: Any = model.get_submodule(norm.holder or norm.key.module)
    if norm.computed and (not norm.holder or any(not hasattr(owner, name) for name in _VECTORS)):
        raise OptionError(
            f"layer {norm.name!r} must store its numbers as it uses them, to be given others: {norm.computed}"
        )
    if not isinstance(owner, _BatchNorm) and taken.eps != norm.eps:
        raise OptionError(
            f"layer {norm.name!r} has eps = {norm.eps:g} as a constant of its program, it must be {taken.eps:g}: export the "
            "model with that eps"
        )
    assert taken.mean is not None  # noqa: S101
    assert taken.variance is not None  # noqa: S101
    gamma = np.ones_like(taken.mean) if taken.gamma is None else taken.gamma
    beta = np.zeros_like(taken.mean) if taken.beta is None else taken.beta
    for name, values in zip(_VECTORS, (gamma, beta, taken.mean, taken.variance), strict=True):
        old = getattr(owner, name)
        if old is not None:
            with torch.no_grad():
                old.copy_(tensor_like(values, old))
    if isinstance(owner, _BatchNorm):
        _take_conventions(owner, taken)


def _take_conventions(owner: Any, taken: Norm) -> None:
    owner.eps = taken.eps
    if taken.decay is not None:
        owner.momentum = complement(taken.decay)
    if isinstance(owner, BatchNorm) and taken.unbiased is not None:
        owner.configure({"unbiased": taken.unbiased})
    if owner.num_batches_tracked is not None:
        # training goes on from here, not from the start
        owner.num_batches_tracked.clamp_(min=1)


def _keep_channels(owner: Any, channels: np.ndarray) -> None:
    index = torch.from_numpy(channels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        old = getattr(owner, name)
        if old is not None:
            old.data = old.data[index.to(old.device)]
            old.grad = None
    owner.num_features = len(channels)


def _store_bias(owner: nn.Module, name: str, bias: Tensor, weight: nn.Parameter) -> None:
    old = getattr(owner, name)
    if old is None:
        owner.register_parameter(name, nn.Parameter(bias.to(weight.device), weight.requires_grad))
    else:
        old.data = bias.to(old.device)


def _stand_in(old: Any, site: Site, replacement: Affine | Border | None) -> nn.Module:
    """Return what stands in the place of a normalization layer."""
    new = _inner(replacement, old.weight if getattr(old, "weight", None) is not None else old.running_mean)
    if isinstance(old, BatchNorm) and (old.options.activation is not None or site.arguments > 1):
        new = Remainder(new, old.options.activation)
    for name in _DESCRIPTION:
        # programs ask their layers for such things
        if hasattr(old, name) and not hasattr(new, name):
            setattr(new, name, getattr(old, name))
    return new.train(old.training)


def _vectors(affine: Affine, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift in the dtype of the layer, or in float32 where that can't hold them."""
    found = tensor_like(affine.scale, like), tensor_like(affine.shift, like)
    wide = like.to(torch.float32) if like.element_size() < 4 else like
    exact = tensor_like(affine.scale, wide), tensor_like(affine.shift, wide)
    held = all(bool((f.isfinite() & ((f == 0) == (e == 0))).all()) for f, e in zip(found, exact, strict=True))
    return found if held else exact


def _any_vector(model: nn.Module) -> Tensor:
    tensors = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return next(tensors, torch.zeros(0))


def _inner(replacement: Affine | Border | None, like: Tensor) -> nn.Module:
    if isinstance(replacement, Affine):
        return ScaleShift(*_vectors(replacement, like))
    if isinstance(replacement, Border):
        sizes = {axis: (before, after) for axis, before, after in replacement.padding}
        last = max(sizes)
        padding = [n for axis in range(last, min(sizes) - 1, -1) for n in sizes.get(axis, (0, 0))]
        return ChannelPad(tensor_like(replacement.value, like), padding)
    return nn.Identity()
