"""Recalibrate and fold chains of modules: ``nn.Sequential``, nested or not, which the laboratory's networks are made of."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.affine import Affine
from batchnorm.lab.networks import Standardize
from batchnorm.moments import Moments
from batchnorm.torch.evaluation import evaluating

__all__ = ["Folding", "fold_chains", "recalibrate_chains"]


def recalibrate_chains(network: nn.Module, x: np.ndarray) -> None:
    """Set the running statistics of every batch norm to those of its evaluation-time inputs over all rows.

    One layer after the other, in the order of their calls: each is measured behind layers that have their new statistics
    already, so that in evaluation every layer's input has exactly the moments that the layer holds.
    """
    for norm in _norms_in_order(network, torch.from_numpy(x[:2])):
        measured = _input_moments(network, norm, x)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(measured.mean)
            norm.running_var.copy_(measured.unbiased_variance)


def _norms_in_order(network: nn.Module, x: torch.Tensor) -> list[_BatchNorm]:
    order: dict[_BatchNorm, None] = {}
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda module, _: order.setdefault(module)) for norm in norms]
    _run_hooked(network, [x], hooks)
    return list(order)


def _input_moments(network: nn.Module, norm: _BatchNorm, x: np.ndarray) -> Moments:
    parts: list[Moments] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: parts.append(Moments.of(inputs[0])))
    _run_hooked(network, [torch.from_numpy(x[i : i + 1024]) for i in range(0, len(x), 1024)], [hook])
    return Moments.empty().merge(*parts)


def _run_hooked(network: nn.Module, batches: list[torch.Tensor], hooks: list[Any]) -> None:
    try:
        with evaluating(network):
            for batch in batches:
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Link:
    """A module in a chain, and the place where it can be replaced."""

    parent: nn.Module
    key: str
    name: str
    module: nn.Module

    def remove(self) -> None:
        setattr(self.parent, self.key, nn.Identity())
        self.module = getattr(self.parent, self.key)


class _Place(NamedTuple):
    target: _Link
    direction: str


class Folding(NamedTuple):
    """What was folded and what was kept, a sentence each, and the names of the modules that became ``nn.Identity``."""

    folded: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]


def fold_chains(network: nn.Module) -> Folding:
    """Fold every batch norm and standardization into a linear neighbour, in place.

    ``linear -> norm`` folds backward: ``W' = scale · W`` per output channel, ``b' = scale · b + shift``.
    ``norm -> linear`` (also through flatten, and through max pooling where every scale is positive) folds forward:
    ``W' = W · scale`` per input channel, ``b' = b + W · shift``; into a convolution only where it pads nothing, since a zero
    after the norm is not a zero before it.
    """
    folded, removed = [], []
    kept: dict[str, str] = {}
    bound = _bound(network)
    for chain in _chains(network):
        for i, link in enumerate(chain):
            affine = _affine_of(link.module)
            if affine is None:
                continue
            place = _backward(chain, i) or _forward(chain, i, affine)
            what = f"{link.name} ({type(link.module).__name__})"
            if isinstance(place, str):
                kept[link.name] = f"{what}: {place}"
            elif tied := next((end for end in (link, place.target) if end.module in bound), None):
                kept[link.name] = f"{what}: {tied.name} {bound[tied.module]}"
            else:
                _absorb(place.target.module, affine, place.direction)
                folded.append(f"{what} {place.direction} into {place.target.name}")
                removed.append(link.name)
                link.remove()
    for name, module in network.named_modules():
        if reason := _why(module):
            kept.setdefault(name, f"{name} ({type(module).__name__}): {reason}")
    return Folding(tuple(folded), tuple(kept.values()), tuple(removed))


def _why(module: nn.Module) -> str:
    """Return why a normalization that is still there could not be folded; empty for other modules."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return "its statistics are those of each row, so it is no fixed map"
    if isinstance(module, _BatchNorm):
        return "it stands in no chain" if _affine_of(module) else "it has no running statistics"
    return ""


def _bound(network: nn.Module) -> dict[nn.Module, str]:
    """Return the modules whose weights are not theirs alone to change, with the reason."""
    places = Counter(module for _, module in network.named_modules(remove_duplicate=False))
    owners = Counter(parameter for module in places for parameter in module.parameters(recurse=False))
    bound = {}
    for module, n in places.items():
        if n > 1:
            bound[module] = "stands in several places"
        elif any(owners[parameter] > 1 for parameter in module.parameters(recurse=False)):
            bound[module] = "shares its weights with another layer"
        elif module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
            bound[module] = "has hooks or parametrizations"
    return bound


def _chains(network: nn.Module, name: str = "") -> Iterator[list[_Link]]:
    """Yield every maximal chain of modules that are called one after the other, nested ``nn.Sequential`` taken apart."""
    if type(network) is nn.Sequential:
        chain = list(_links(network, name))
        yield chain
        inner = [(link.module, link.name) for link in chain]
    else:
        inner = [(child, f"{name}.{key}".strip(".")) for key, child in network.named_children()]
    for module, path in inner:
        yield from _chains(module, path)


def _links(sequence: nn.Sequential, name: str) -> Iterator[_Link]:
    for key, module in sequence.named_children():
        path = f"{name}.{key}".strip(".")
        if type(module) is nn.Sequential:
            yield from _links(module, path)
        else:
            yield _Link(sequence, key, path, module)


def _affine_of(module: nn.Module) -> Affine | None:
    """Return what a module does to each channel, in float64; ``None`` where it is not an Affine."""
    if isinstance(module, Standardize):
        scale = 1 / module.std.double().flatten()
        return Affine(scale, -module.mean.double().flatten() * scale)
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return None
    gamma = torch.ones_like(module.running_var) if module.weight is None else module.weight
    beta = torch.zeros_like(module.running_mean) if module.bias is None else module.bias
    mean, var, scale, shift = (v.detach().double() for v in (module.running_mean, module.running_var, gamma, beta))
    return Affine.from_statistics(mean, var, scale, shift, module.eps)


def _backward(chain: list[_Link], i: int) -> _Place | None:
    before = [link for link in chain[:i] if not isinstance(link.module, nn.Identity | nn.Dropout)]
    if before and isinstance(before[-1].module, nn.Linear | nn.Conv2d):
        return _Place(before[-1], "backward")
    return None


def _forward(chain: list[_Link], i: int, affine: Affine) -> _Place | str:
    for link in chain[i + 1 :]:
        module = link.module
        if isinstance(module, nn.Linear):
            return _Place(link, "forward")
        if isinstance(module, nn.Conv2d):
            if any(module.padding) or module.groups > 1:
                return f"the convolution {link.name} that follows pads with zeros, which are not zeros before the norm"
            return _Place(link, "forward")
        if isinstance(module, nn.MaxPool2d) and bool((affine.scale <= 0).any()):
            return f"the max pooling {link.name} that follows passes positive scales only"
        if not isinstance(module, nn.Identity | nn.Dropout | nn.Flatten | nn.MaxPool2d):
            return f"neither neighbour is linear, {link.name} ({type(module).__name__}) follows"
    return "no linear layer follows in its chain"


def _absorb(module: nn.Module, affine: Affine, direction: str) -> None:
    """Multiply an Affine into the weights of a linear layer, in float64."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise TypeError(f"only linear layers absorb, got {type(module).__name__}")
    weight = module.weight.detach().double()
    bias = torch.zeros(weight.shape[0]).double() if module.bias is None else module.bias.detach().double()
    if direction == "backward":
        weight = weight * affine.scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = affine(bias)
    else:
        # a flatten between channels and features repeats each channel for all its places
        places = weight.shape[1] // len(affine.scale)
        shape = (1, -1, *[1] * (weight.ndim - 2))
        scale, shift = (v.repeat_interleave(places).reshape(shape) for v in (affine.scale, affine.shift))
        bias = bias + (weight * shift).flatten(1).sum(1)
        weight = weight * scale
    dtype = module.weight.dtype
    module.weight = nn.Parameter(weight.to(dtype), requires_grad=module.weight.requires_grad)
    module.bias = nn.Parameter(bias.to(dtype), requires_grad=module.weight.requires_grad)
