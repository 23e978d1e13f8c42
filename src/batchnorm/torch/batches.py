"""How a torch model is called on a batch, whatever form the batch has."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from batchnorm.torch.evaluation import Inputs

__all__ = ["batches_of", "caller", "inputs_of", "moved", "samples_of"]

ROWS = 64


def batches_of(data: Any) -> Any:
    """Return a loader for a ``Dataset``, which yields single samples; anything else as it is."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=ROWS)
    return data


def caller(model: nn.Module, forward: Callable[..., Any] | None) -> Callable[[Any], Any]:
    """Return what runs a model on a batch.

    A user's ``forward`` gets the model and the batch. Without one a mapping, or a dataclass, gives the arguments that the
    model's own forward has names for; a tuple or list gives as many of its first items as that forward requires; anything else
    is the only argument.
    """
    if forward is not None:
        return lambda batch: forward(model, batch)
    parameters = list(inspect.signature(model.forward).parameters.values())

    def run(batch: Any) -> Any:
        args, kwargs = _arguments(parameters, batch)
        return model(*args, **kwargs)

    return run


def inputs_of(model: nn.Module, batch: Any) -> Inputs:
    """Return the arguments that `caller` calls a model with."""
    first = next((v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()), torch.empty(0))
    parameters = list(inspect.signature(model.forward).parameters.values())
    return _arguments(parameters, moved(batch, first.device, first.dtype))


def _arguments(parameters: list[inspect.Parameter], batch: Any) -> Inputs:
    named = _fields_of(batch) if _is_record(batch) else batch
    if isinstance(named, Mapping):
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        given = {name: value for name, value in named.items() if anything or name in known}
        return Inputs((), given) if given and _is_enough(parameters, given) else Inputs((batch,), {})
    if isinstance(batch, tuple | list):
        required = sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
        )
        return Inputs(tuple(batch[: max(1, required)]), {})
    return Inputs((batch,), {})


def _is_enough(parameters: list[inspect.Parameter], given: Mapping[str, Any]) -> bool:
    return all(p.name in given for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)


def _is_record(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _fields_of(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def moved(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a batch on a device; arrays of NumPy become tensors, real ones in the dtype of the model."""
    if _is_record(batch):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
        return dataclasses.replace(batch, **moved(fields, device, dtype))
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        return batch.to(device) if hasattr(batch, "to") else {k: moved(v, device, dtype) for k, v in batch.items()}
    return tree_map(lambda leaf: _moved(leaf, device, dtype), batch)


def _moved(leaf: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiub":
        tensor = torch.as_tensor(leaf)
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
    if _is_record(leaf):
        return moved(leaf, device, dtype)
    # packed sequences, encodings, graphs
    return leaf.to(device) if hasattr(leaf, "to") and not isinstance(leaf, nn.Module | type) else leaf


def samples_of(batch: Any) -> int:
    """Return the size of the first axis of the first tensor in a batch; 1 where there is none."""
    if isinstance(batch, Tensor | np.ndarray):
        return len(batch) if batch.ndim else 1
    if _is_record(batch):
        batch = _fields_of(batch)
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    sizes = [samples_of(item) for item in items if isinstance(item, Tensor | np.ndarray | Mapping | tuple | list)]
    return sizes[0] if sizes else 1
