"""What the processes of a ``torch.distributed`` job tell each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from batchnorm.errors import WorkerError

__all__ = ["gather", "joined"]


def gather(part: Any) -> list[Any]:
    """Return the parts of all ranks of the default group, in order; of this process alone, where there is none.

    Raises:
        WorkerError: another rank did not come within the timeout of the group.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [part]
    parts: list[Any] = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(parts, part)
    except RuntimeError as error:
        raise WorkerError(
            f"all ranks must take part, rank {distributed.get_rank()} of {len(parts)} waited in vain: is another one dead, "
            f"or does it not call this? {error}"
        ) from error
    return parts


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the job that the environment describes, over gloo, and leave it at the end; yield rank and number of ranks.

    Raises:
        WorkerError: the others do not come.
    """
    try:
        distributed.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise WorkerError(f"the processes of torchrun must find each other, this one did not: {error}") from error
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()
