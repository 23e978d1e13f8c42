"""Say which layer of which model speaks, without asking anybody to name layers beforehand."""

import inspect

from torch import nn

__all__ = ["describe", "path_of"]


def describe(layer: nn.Module) -> str:
    """Return ``layer 'features.1', BatchNorm2d(64)``, with the dotted name where a model is calling the layer."""
    kind = f"{type(layer).__name__}({getattr(layer, 'num_features', '')})"
    name = path_of(layer)
    return f"layer {kind}" if name is None else f"layer {name!r}, {kind}"


def path_of(layer: nn.Module) -> str | None:
    """Return the dotted name of a layer in the model that is calling it.

    The name is looked for when something has gone wrong: the outermost caller on the stack that is a module and holds the
    layer knows it.
    """
    name = None
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not layer:
            name = next((path for path, module in owner.named_modules() if module is layer), name)
        frame = frame.f_back
    return name
