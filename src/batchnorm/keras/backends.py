"""What must be asked of each backend of Keras in its own words: whether values are at hand, and sums over replicas."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.errors import BatchNormError

__all__ = ["Total", "at_hand", "in_own_words", "is_eager_torch", "total_over_replicas"]

# sums a list of tensors over all replicas
Total = Callable[[list[Any]], list[Any]]


def at_hand(x: Any) -> bool:
    """Say whether the values of ``x`` can be looked at now, at no cost: not traced, compiled, symbolic or on a device."""
    name = keras.backend.backend()
    if name == "torch":
        import torch
        from torch._C._functorch import peek_interpreter_stack

        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu
        return plain and not torch.compiler.is_compiling() and peek_interpreter_stack() is None
    if name == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer)
    if name == "tensorflow":
        import tensorflow as tf

        return not tf.is_symbolic_tensor(x)
    return isinstance(x, np.ndarray | np.generic)


def is_eager_torch(x: Any) -> bool:
    """Say whether ``x`` is a tensor of torch that nothing traces, compiles or transforms."""
    return keras.backend.backend() == "torch" and at_hand(x)


@contextmanager
def in_own_words() -> Iterator[None]:
    """Keep Keras from putting words and arguments of its own around an error of ours, where one leaves a call."""
    try:
        yield
    except BatchNormError as error:
        vars(error)["_keras_call_info_injected"] = True
        raise


def total_over_replicas() -> Total | None:
    """Return what sums over the replicas that this call is one of, gradients too; ``None`` where it is alone.

    TensorFlow's are those of ``tf.distribute``, torch's the default process group, JAX's the named axes of ``shard_map`` and
    ``pmap``. A batch that JAX has sharded under ``jit`` is one array: its sums run over all devices anyway.
    """
    found: dict[str, Callable[[], Total | None]] = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
    return found.get(keras.backend.backend(), lambda: None)()


def _tensorflow() -> Total | None:
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return None
    return lambda values: list(replica.all_reduce(tf.distribute.ReduceOp.SUM, values))


def _torch() -> Total | None:
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return _torch_total


def _torch_total(values: list[Any]) -> list[Any]:
    import torch
    from torch.distributed.nn.functional import all_reduce

    # one message; its gradient is the sum of all replicas' gradients
    flat = torch.cat([v.reshape(-1) for v in values])
    summed: Any = all_reduce(flat)  # type: ignore[no-untyped-call]
    parts = torch.split(summed, [v.numel() for v in values])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


def _jax() -> Total | None:
    import jax

    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    psum: Any = jax.lax.psum
    return (lambda values: list(psum(values, axes))) if axes else None
