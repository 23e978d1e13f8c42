"""Run a user's model without leaving a trace."""

import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = [
    "Inputs",
    "call",
    "copied",
    "evaluating",
    "kept_generators",
    "positional_and_named",
    "silent",
    "tensors_of",
    "untraced",
]


class Inputs(NamedTuple):
    """An example with positional and named arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, example: Any) -> Any:
    """Call a model on an example: a tuple holds positional arguments, a dict named ones, anything else is the only one."""
    args, kwargs = positional_and_named(example)
    return model(*args, **kwargs)


def positional_and_named(example: Any) -> Inputs:
    """Return what an example calls a model with."""
    if isinstance(example, Inputs):
        return example
    if isinstance(example, dict):
        return Inputs((), example)
    return Inputs(example if isinstance(example, tuple) else (example,), {})


def copied(example: Any) -> Any:
    """Return an example that a model may write to."""
    return tree_map(_copied, example)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return copy.deepcopy(leaf)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation without gradients, and every module back into the mode it had, on any exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the random number generators of torch, NumPy and Python back, on any exit."""
    # to ask CUDA for its generators would start it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def silent() -> Iterator[None]:
    """Keep the warnings of a run that nobody has asked for to ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Evaluate as `evaluating` does, and put the random number generators of the process back too."""
    with kept_generators(), evaluating(model):
        yield


def tensors_of(tree: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Return the tensors of nested containers and objects, in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    if id(tree) in seen or isinstance(tree, nn.Module | type | str | bytes) or callable(tree):
        return []
    inner: list[Any] = []
    if isinstance(tree, Mapping):
        inner += tree.values()
    elif isinstance(tree, list | tuple | set | frozenset):
        inner += tree
    inner += getattr(tree, "__dict__", {}).values()
    for kind in type(tree).__mro__:
        names = vars(kind).get("__slots__", ())
        inner += [getattr(tree, name, None) for name in ([names] if isinstance(names, str) else names)]
    return [tensor for item in inner for tensor in tensors_of(item, seen | {id(tree)})]
