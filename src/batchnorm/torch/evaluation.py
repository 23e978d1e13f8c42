"""Run a user's model without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["call", "evaluating", "untraced"]


def call(model: nn.Module, example: Any) -> Any:
    """Call a model on an example: a tuple holds positional arguments, a dict named ones, anything else is the only one."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, dict):
        return model(**example)
    return model(example)


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
def untraced(model: nn.Module) -> Iterator[None]:
    """Evaluate as `evaluating` does, and put the random number generators of the process back too."""
    # to ask CUDA for its generators would start it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), evaluating(model):
        yield
