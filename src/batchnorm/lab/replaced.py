"""What folding has put in the place of modules, as JSON: so that a saved network is built again without unpickling."""

from typing import Any

import torch
from torch import nn

from batchnorm.torch.replacements import ChannelPad, ScaleShift

__all__ = ["as_json", "replace"]


def as_json(before: nn.Module, after: nn.Module) -> dict[str, dict[str, Any]] | None:
    """Return how the modules of a folded network differ from those before, by name; ``None`` where JSON can't say it."""
    old, found = dict(before.named_modules()), dict[str, dict[str, Any]]()
    for name, module in after.named_modules():
        same = type(module) is type(old.get(name))
        if isinstance(module, ScaleShift | nn.Identity) and not same:
            found[name] = {"kind": type(module).__name__}
        elif isinstance(module, ChannelPad):
            found[name] = {"kind": "ChannelPad", "padding": module.padding}
        elif not same:
            return None
        elif getattr(module, "padding", None) != getattr(old[name], "padding", None):
            found[name] = {"kind": "unpadded", "padding": module.padding}
    return found


def replace(network: nn.Module, replaced: dict[str, dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    """Make these changes in a network that is not folded yet; the values of its tensors are left to be loaded.

    Args:
        network: changed in place.
        replaced: what `as_json` has returned.
        tensors: of the folded network, by name.
    """
    for name, how in replaced.items():
        parent, _, key = name.rpartition(".")
        if how["kind"] == "unpadded":
            module: Any = network.get_submodule(name)
            module.padding = tuple(how["padding"])
            module._reversed_padding_repeated_twice = [0] * len(module._reversed_padding_repeated_twice)
        else:
            setattr(network.get_submodule(parent), key, _made(name, how, tensors))
    for name in tensors.keys() - network.state_dict().keys():
        # a bias that folding has added
        parent, _, key = name.rpartition(".")
        setattr(network.get_submodule(parent), key, nn.Parameter(torch.empty_like(tensors[name])))


def _made(name: str, how: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    if how["kind"] == "ScaleShift":
        return ScaleShift(*(torch.empty_like(tensors[f"{name}.{part}"]) for part in ("weight", "bias")))
    if how["kind"] == "ChannelPad":
        return ChannelPad(torch.empty_like(tensors[f"{name}.value"]), list(how["padding"]))
    return nn.Identity()
