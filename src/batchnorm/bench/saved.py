"""What a forward pass leaves in memory for the backward pass."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from batchnorm.bench.networks import Batch, Context
from batchnorm.torch import keep_memory

__all__ = ["asked_bytes", "peak_bytes", "saved_bytes"]


def saved_bytes(model: nn.Module, batch: Batch, context: Context = nullcontext) -> int:
    """Return the bytes that are alive after a forward pass and were not before it: what is kept for the backward.

    ::

        saved = Σ allocated - Σ freed        from before the forward to after the loss, by torch's own allocator

    Hooks on saved tensors would not do: of nested ones autograd asks the innermost alone, so that ours inside of another's
    take its place, and outside of it see nothing. The allocator sees what is alive, whoever holds it, and in whatever form.
    The input counts where it is kept, because a fresh copy of it is handed in; parameters were there before.

    Args:
        model: in training.
        batch: input and labels.
        context: entered for the forward pass.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2))
        >>> saved_bytes(net, (torch.zeros(10, 6), torch.zeros(10, dtype=torch.long))) // 10   # 6 + 4 + 2 floats a row
        48
    """
    x, labels = batch
    with _watched() as watched, context():
        loss = cross_entropy(model(x.clone()), labels)
    return sum(_changes(watched)) - loss.nbytes


def peak_bytes(model: nn.Module, batch: Batch, context: Context = nullcontext) -> int:
    """Return the most bytes that forward and backward have alive at once, beyond what was before; gradients among them."""
    x, labels = batch
    model.zero_grad()
    with _watched() as watched:
        with context():
            loss = cross_entropy(model(x.clone()), labels)
        loss.backward()  # type: ignore[no-untyped-call]
    alive = most = 0
    for change in _changes(watched):
        alive += change
        most = max(most, alive)
    return most


def asked_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes of the distinct storages that autograd is asked to save, and that were not there before.

    The second way to count, for networks without hooks of their own: it must agree with `saved_bytes`.
    """
    before = {v.untyped_storage().data_ptr() for v in (batch[1], *model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, labels = batch
    with saved_tensors_hooks(pack, _as_it_is):
        loss = cross_entropy(model(x.clone()), labels)
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in before)
    del loss
    return found


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _watched() -> Iterator[Any]:
    """Record what torch's allocator gives out and takes back; what outputs of the kernels are lent again, it would not see."""
    kept = keep_memory(0)
    before = os.environ.get("KINETO_LOG_LEVEL")
    # else it says on the error stream that it starts and ends
    os.environ["KINETO_LOG_LEVEL"] = "9"
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            yield watched
    finally:
        keep_memory(kept)
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def _changes(watched: Any) -> list[int]:
    """Return how many bytes were given out (or, negative, taken back), in the order of time."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=_when)]


def _when(event: Any) -> int:
    when: int = event.start_ns()
    return when
