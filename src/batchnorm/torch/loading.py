"""Load a torch model that a command line names; nothing in a file is executed or unpickled into code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchnorm.errors import DataError, OptionError
from batchnorm.rooms import made

__all__ = ["checked", "load_model"]


def load_model(spec: str, weights: Path | None = None) -> nn.Module:
    """Return the module that ``package.module:factory`` makes, with weights from a file.

    Args:
        spec: ``package.module:factory``; the factory is called without arguments. Modules in the current folder are found.
        weights: a ``.safetensors`` file, or a ``.pt`` file of tensors (read with ``weights_only=True``).

    Raises:
        OptionError: no such factory, or one that fails or returns something else.
        DataError: weights that can't be read or do not fit the model.

    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    return checked(spec, made(spec), weights)


def checked(spec: str, model: Any, weights: Path | None) -> nn.Module:
    """Return what a factory has made, with weights from a file.

    Raises:
        OptionError: it is no module.
        DataError: weights that can't be read or do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"{spec} must return a torch.nn.Module, it returned a {type(model).__name__}")
    if weights is not None:
        _load_weights(model, weights)
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(tensors)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"the weights in {path} must be tensors that fit the model: {error}") from error
    except Exception as error:
        # safetensors' own error derives from Exception alone
        raise DataError(f"{path} can't be read, it may be damaged or cut off: {error}") from error
