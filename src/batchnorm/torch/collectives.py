"""Talking to the other processes of a group: who they are, one vector from each, and sums over all of them.

Every collective of the library is here. What goes wrong in one is said with the layer's name: a rank that died, a rank that
never came, ranks that call different layers. A collective whose sizes differ can't be caught, gloo ends the process: so the
first forward of a layer compares headers of a fixed size, once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from batchnorm.errors import DistributedError, OptionError

__all__ = ["Agreement", "Group", "Total", "agree", "gather", "gather_objects", "joined", "total"]

# of the header, in bytes: enough for a long name, and the same on every rank
HEADER = 1024


class Group:
    """The processes that share statistics: the default group, whichever it is at the time, or one that was given."""

    def __init__(self, given: Any) -> None:
        self.given = None if given == "default" else _process_group(given)

    @classmethod
    def read(cls, given: Any) -> "Group | None":
        """Return what a user gave as ``process_group``.

        Raises:
            OptionError: something else than None, "default", a ProcessGroup or a DeviceMesh of one dimension.
            DistributedError: a group that this process is no member of.
        """
        return given if given is None or isinstance(given, Group) else cls(given)

    def resolve(self) -> Any:
        """Return the process group.

        Raises:
            DistributedError: there is none.
        """
        if self.given is not None:
            return self.given
        if not distributed.is_available():
            raise DistributedError(f"this build of PyTorch has no torch.distributed: {_ALONE}")
        if not distributed.is_initialized():
            raise DistributedError(
                "a synchronized layer in training needs a process group, and there is none: start the program with torchrun "
                f"and call torch.distributed.init_process_group() before the first forward, or {_ALONE}"
            )
        return distributed.group.WORLD

    def __repr__(self) -> str:
        if self.given is None:
            return "'default'"
        return f"<group of ranks {distributed.get_process_group_ranks(self.given)}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self.given is other.given

    def __hash__(self) -> int:
        return hash((Group, id(self.given)))

    def __deepcopy__(self, memo: Any) -> "Group":
        # connections to other processes can be shared, not copied
        return self

    def __reduce__(self) -> Any:
        if self.given is not None:
            raise DistributedError(
                f"a layer that is synchronized over {self!r} can't be pickled, another process does not know that group: "
                "save model.state_dict(), or unsync(model) first"
            )
        return Group, ("default",)


_ALONE = "unsync(model) to train in one process"


def _process_group(given: Any) -> Any:
    """Return the ProcessGroup that is meant, ``None`` for the default one."""
    if isinstance(given, int):
        raise DistributedError(
            "this process is no member of the group: sync the model on the ranks that are in it, those where "
            "torch.distributed.get_rank(group) >= 0"
        )
    if hasattr(given, "mesh_dim_names"):
        given = _of_mesh(given)
    if not distributed.is_available() or not isinstance(given, distributed.ProcessGroup):
        raise OptionError(
            f"process_group must be None, 'default', a ProcessGroup or a DeviceMesh of one dimension, got {given!r}"
        )
    return None if distributed.is_initialized() and given is distributed.group.WORLD else given


def _of_mesh(mesh: Any) -> Any:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or range(mesh.ndim)
        raise OptionError(
            f"a DeviceMesh must have one dimension, the one whose ranks hold parts of the same batch; this one has "
            f"{mesh.ndim}: give {' or '.join(f'mesh[{name!r}]' for name in names)}"
        )
    if mesh.get_coordinate() is None:
        raise DistributedError("this process is no member of the mesh: sync the model on the ranks that are in it")
    return mesh.get_group()


class Agreement:
    """What a layer and its group have found out about each other, at its first forward."""

    def __init__(self, group: Any = None, name: str = "layer", ghosts: int = 1) -> None:
        self.group, self.name, self.ghosts = group, name, ghosts

    def __deepcopy__(self, memo: Any) -> "Agreement":
        return Agreement(self.group, self.name, self.ghosts)

    def __reduce__(self) -> Any:
        return Agreement, ()


def agree(group: Any, path: str | None, layer: str, ghosts: int, device: torch.device) -> Agreement:
    """Compare this rank's layer with the others', and return the largest number of ghost batches among them.

    Raises:
        DistributedError: on every rank, if the layers differ.
    """
    name = layer if path is None else f"layer {path!r}, {layer}"
    text = f"{ghosts}\n{path or ''}\n{layer}".encode()[:HEADER].ljust(HEADER)
    headers = gather(torch.tensor(list(text), dtype=torch.uint8, device=device), Agreement(group, name))
    parts = [bytes(header.tolist()).decode(errors="ignore").rstrip().split("\n") for header in headers]
    if any(len(part) != 3 for part in parts):
        # a rank that has agreed before sends numbers
        parts = [part if len(part) == 3 else ["0", "?", "another layer"] for part in parts]
    paths = [part[1] for part in parts]
    if len({part[2] for part in parts}) > 1 or not all(_is_same(paths[0], other) for other in paths):
        seen = "; ".join(f"rank {rank} has layer {path!r}, {layer}" for rank, (_, path, layer) in enumerate(parts))
        raise DistributedError(
            f"the ranks of a group must synchronize the same layer, but {seen}: build the same model on every rank, cast "
            "it alike, and call its layers in the same order"
        )
    return Agreement(group, name, max(int(part[0]) for part in parts))


def _is_same(one: str, other: str) -> bool:
    """Say whether names are those of one layer; a wrapper such as DistributedDataParallel puts something in front."""
    one, other = sorted((one, other), key=len)
    return not one or other == one or other.endswith(f".{one}")


def gather(v: Tensor, agreement: Agreement) -> Tensor:
    """Return what every rank gives, ``(ranks, *shape)``; all must give the same shape and dtype."""
    ranks = agreement.group.size()
    everything = v.new_empty((ranks * v.numel(),))
    if torch.compiler.is_compiling():
        distributed.all_gather_single(everything, v.reshape(-1), agreement.group)
    else:
        with _explaining(agreement, v.device):
            distributed.all_gather_single(everything, v.reshape(-1), agreement.group)
    return everything.view(ranks, *v.shape)


def total(v: Tensor, agreement: Agreement) -> Tensor:
    """Return the sum over all ranks."""
    v = v.clone()
    if torch.compiler.is_compiling():
        distributed.all_reduce(v, group=agreement.group)
        return v
    with _explaining(agreement, v.device):
        distributed.all_reduce(v, group=agreement.group)
    return v


def gather_objects(part: Any) -> list[Any]:
    """Return the objects of all ranks of the default group, in order; of this process alone, where there is none.

    Raises:
        DistributedError: another rank did not come within the timeout of the group.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [part]
    parts: list[Any] = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(parts, part)
    except RuntimeError as error:
        raise DistributedError(
            f"all ranks must take part, rank {distributed.get_rank()} of {len(parts)} waited in vain: is another one dead, "
            f"or does it not call this? {error}"
        ) from error
    return parts


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the job that the environment describes, over gloo, and leave it at the end; yield rank and number of ranks.

    Raises:
        DistributedError: the others do not come.
    """
    try:
        distributed.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"the processes of torchrun must find each other, this one did not: {error}") from error
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


class Total(torch.autograd.Function):
    """`total` with a derivative, which is a `total` again: to any order."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, agreement: Agreement) -> Tensor:
        """Sum over all ranks."""
        ctx.agreement = agreement
        return total(v, agreement)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        """Sum the gradients of all ranks."""
        return Total.apply(dv, ctx.agreement), None  # type: ignore[no-untyped-call]


@contextmanager
def _explaining(agreement: Agreement, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        _fail(agreement, device, error)


def _fail(agreement: Agreement, device: torch.device, error: RuntimeError) -> NoReturn:
    # a forward says the layer's name by itself
    name = f"{agreement.name}: " if torch._C._current_graph_task_id() != -1 else ""
    raise DistributedError(
        f"{name}the ranks of a group must all take part in each forward in training and in its backward, also "
        f"with an empty batch, but a rank has died or did not come{_patience(agreement.group, device)}: look at the output of "
        f"the rank that failed first, and start all of them again. What PyTorch says: {error}"
    ) from error


def _patience(group: Any, device: torch.device) -> str:
    """Say how long this group waits, where its backend tells."""
    try:
        seconds = group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return ""
    return f" (the timeout of the group is {seconds:g} s, an argument of init_process_group and new_group)"
