"""Find the wing that knows a model, by the model's type, and load it on demand."""

import sys
from importlib import import_module
from typing import Any

from batchnorm.errors import OptionError
from batchnorm.graph import Model

__all__ = ["adapt"]

# framework -> (class that its models have, room that knows them)
_WINGS = {"torch": ("nn.Module", "batchnorm.torch.model:TorchModel")}


def adapt(model: Any) -> Model:
    """Return the `Model` view of a network.

    Only frameworks that are loaded already are asked: who holds a torch module has imported torch.

    Raises:
        OptionError: no wing knows the type of ``model``.
    """
    for framework, (base, room) in _WINGS.items():
        known: Any = sys.modules.get(framework)
        for part in base.split("."):
            known = getattr(known, part, None)
        if known is not None and isinstance(model, known):
            module, name = room.split(":")
            return getattr(import_module(module), name)(model)  # type: ignore[no-any-return]
    raise OptionError(f"a model must be a torch.nn.Module, got {type(model).__module__}.{type(model).__name__}")
