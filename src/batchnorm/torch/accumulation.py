"""Running statistics under gradient accumulation: one update for each optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.surgery import named_layers

__all__ = ["accumulate"]


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Update the running statistics once for all micro-batches, as the pooled batch would.

    The Moments of the micro-batches are merged and used at the end; an exception leaves the statistics as they were. Each
    micro-batch is still normalized by itself: nothing but one large batch can change that.

    Args:
        model: a module with layers of ours (see `convert`).

    Raises:
        OptionError: no such layer, or already accumulating.

    Example:
        >>> import torch
        >>> from batchnorm.torch import BatchNorm1d
        >>> layer = BatchNorm1d(1, momentum=1.0)
        >>> with accumulate(layer):
        ...     for micro_batch in torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]):
        ...         _ = layer(micro_batch)
        >>> layer.running_mean.item(), layer.num_batches_tracked.item()
        (4.0, 1)
    """
    layers = [layer for _, layer in named_layers(model)]
    if not layers:
        raise OptionError("accumulate works on layers of batchnorm.torch, this model has none: convert(model) first")
    if any(layer.is_collecting for layer in layers):
        raise OptionError("this model accumulates already: leave the inner accumulate(model) out")
    for layer in layers:
        layer.start_collecting()
    finished = False
    try:
        yield
        finished = True
    finally:
        for layer in layers:
            layer.stop_collecting(update=finished)
