"""Outputs that the backward makes again from what their layer has saved, so that nothing else saves them.

PyTorch lets a pair of hooks stand between an operation and what it saves. These hooks know the outputs that were made beside
them, by their storage: instead of such an output they save how it is made.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, UntypedStorage, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import saved_tensors_hooks

from batchnorm.errors import RecomputeError
from batchnorm.torch.buffers import once_more, turn_of

__all__ = ["active", "recompute"]

M = TypeVar("M", bound=nn.Module)
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


@overload
def recompute(model: None = None, *, enabled: bool = True) -> AbstractContextManager[None]: ...
@overload
def recompute(model: M, *, enabled: bool = True) -> M: ...
def recompute(model: M | None = None, *, enabled: bool = True) -> Any:
    """Save no outputs of batch normalization: the backward makes them again from what the layers save anyway.

    ::

        saved without:    x by the layer, y = activation(γ · (x - μ) / √(σ² + ε) + β) by what uses y
        saved with:       x by the layer; y again from x, μ, 1/√(σ² + ε), γ and β when its user asks for it

    The gradients are the same, bit for bit. Without a model it is a context around the forward; with one, every forward of
    that model runs in the context, until ``recompute(model, enabled=False)``. It is for layers of ours on our kernels (see
    `explain`) whose activation is their own, given by ``activation`` or by `convert` with ``fuse``; everything else is saved as
    ever, and so is an output with a residual. The indices of a pooling are saved in 32 bits instead of 64.

    Args:
        model: a module, changed in place.
        enabled: False does nothing, and takes the context from a model.

    Returns:
        The model itself, or a context manager.

    Raises:
        RecomputeError: from the backward, where something that it needs was changed in place since the forward (a
            ``RuntimeError``, as in torch).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm.torch import BatchNorm2d
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3))
        >>> with recompute():
        ...     loss = model(torch.randn(8, 3, 32, 32)).square().mean()
        >>> loss.backward()
        >>> recompute(model) is model
        True

    Reference:
        Rota Bulò, Porzi, Kontschieder: In-Place Activated BatchNorm, 2018 (arXiv:1712.02616), has the same aim by another way.
        Chen, Xu, Zhang, Guestrin: Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv:1604.06174), section 3.
    """
    if model is None:
        return _recomputing() if enabled else nullcontext()
    _release(model)
    if enabled:
        model.register_forward_pre_hook(_enter, prepend=True)
        model.register_forward_hook(_leave, always_call=True)
    return model


def active() -> "Memory | None":
    """Return what remembers outputs at the moment, in this thread."""
    hooks = _top_saved_tensors_default_hooks(False)
    memory = None if hooks is None else getattr(hooks[0], "__self__", None)
    return memory if isinstance(memory, Memory) else None


@contextmanager
def _recomputing() -> Iterator[None]:
    if not _can_hook() or active() is not None:
        yield
        return
    memory = Memory(_top_saved_tensors_default_hooks(False))
    try:
        with saved_tensors_hooks(memory.pack, memory.unpack):
            yield
    finally:
        memory.outputs.clear()


def _can_hook() -> bool:
    """Whether hooks see what is saved: compilers decide for themselves, and transforms of ``torch.func`` forbid hooks."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


class _Open(threading.local):
    """The forwards that run in the context, in this thread."""

    def __init__(self) -> None:
        self.contexts: list[tuple[nn.Module, ExitStack]] = []


_OPEN = _Open()


def _enter(module: nn.Module, _: Any) -> None:
    if not torch.compiler.is_compiling():
        context = ExitStack()
        context.enter_context(_recomputing())
        _OPEN.contexts.append((module, context))


def _leave(module: nn.Module, *_: Any) -> None:
    # called also where an earlier hook has failed, and nothing was entered
    if not torch.compiler.is_compiling() and _OPEN.contexts and _OPEN.contexts[-1][0] is module:
        _OPEN.contexts.pop()[1].close()


def _release(model: nn.Module) -> None:
    for hooks, ours in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


class _Kept(NamedTuple):
    """A tensor as it is saved."""

    # it, or what hooks that stood there before have made of it
    value: Any
    # what counts its changes, and how far it had come; nothing where others keep it
    counter: Tensor | None = None
    version: int = 0
    narrowed: bool = False


class _Output:
    """How an output is made, and what tells that it was changed; it holds none of its values."""

    def __init__(self, y: Tensor, make: Callable[..., Tensor]) -> None:
        self.make, self.shape, self.stride = make, y.shape, y.stride()
        self.counter, self.version = _counter_of(y), y._version
        # what was made last, and which turn of its memory that was
        self.built: weakref.ref[UntypedStorage] | None = None
        self.turn = 0

    def is_same(self, t: Tensor) -> bool:
        """Whether a tensor in the output's storage reads what was written there."""
        return t.dtype == self.counter.dtype and t._version == self.version == self.counter._version and not t.is_neg()

    def again(self, inputs: Callable[[], list[Tensor | None]]) -> Tensor:
        """Return a tensor with the same values in the same places; the one that was made last, if somebody holds it."""
        _check(self.counter, self.version, self.shape)
        storage = None if self.built is None else self.built()
        if storage is not None:
            same = once_more(storage, self.turn, self.counter.dtype, self.shape, self.stride)
            if same is not None:
                return same
        y = self.make(*inputs())
        if y.stride() != self.stride:
            # other hooks have given the input in another layout
            y = torch.empty_strided(self.shape, self.stride, dtype=y.dtype).copy_(y)
        storage = y.untyped_storage()
        self.built, self.turn = weakref.ref(storage), turn_of(storage)
        return y


class _Recipe(NamedTuple):
    """What is saved for a tensor in the storage of an output."""

    output: _Output
    inputs: tuple[_Kept | None, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any


class _Remembered(NamedTuple):
    # a storage outlives its tensors where its memory is lent again: see `buffers`
    alive: "weakref.ref[Tensor]"
    output: _Output
    inputs: tuple[_Kept | None, ...]


class Memory:
    """The outputs that can be made again, while they live, and the hooks that save recipes for them."""

    def __init__(self, outer: Hooks | None) -> None:
        # hooks that stand there already get what is saved after all
        self.outer = outer
        # by the address of their storage
        self.outputs: dict[int, _Remembered] = {}

    def remember(self, y: Tensor, inputs: tuple[Tensor | None, ...], make: Callable[..., Tensor]) -> None:
        """Remember that an output, alone in its storage, is ``make(*inputs)``, and that all inputs are saved anyway.

        An output of an output is not remembered: the input of its recipe would be saved for nothing else.
        """
        if any(v is not None and self._find(v) is not None for v in inputs):
            return
        kept = tuple([None if v is None else _plain(v) for v in inputs])
        place = y.untyped_storage()._cdata
        self.outputs[place] = _Remembered(weakref.ref(y, partial(self._forget, place)), _Output(y, make), kept)

    def _forget(self, place: int, output: "weakref.ref[Tensor]") -> None:
        found = self.outputs.get(place)
        if found is not None and found.alive is output:
            del self.outputs[place]

    def pack(self, t: Tensor) -> _Recipe | _Kept:
        """Return what is saved for a tensor."""
        found = self._find(t)
        if found is None:
            return self._keep(t)
        kept = tuple([None if v is None else self._keep(v.value) for v in found.inputs])
        return _Recipe(found.output, kept, t.shape, t.stride(), t.storage_offset())

    def unpack(self, saved: _Recipe | _Kept) -> Tensor:
        """Return the tensor that something was saved for.

        Raises:
            RecomputeError: it was changed in place since then, or what it is made of.
        """
        if isinstance(saved, _Kept):
            return self._give(saved)
        y = saved.output.again(lambda: [None if v is None else self._give(v) for v in saved.inputs])
        return y.as_strided(saved.shape, saved.stride, saved.offset)

    def _find(self, t: Tensor) -> _Remembered | None:
        if type(t) is not Tensor or not t.is_cpu or t.layout is not torch.strided:
            return None
        found = self.outputs.get(t.untyped_storage()._cdata)
        if found is None or not found.output.is_same(t):
            return None
        intact = all(v is None or v.value._version == v.version for v in found.inputs)
        return found if intact else None

    def _keep(self, t: Tensor) -> _Kept:
        narrowed = _is_index(t)
        if self.outer is not None:
            return _Kept(self.outer[0](t.int() if narrowed else t), narrowed=narrowed)
        return _Kept(t.int(), _counter_of(t), t._version, narrowed=True) if narrowed else _plain(t)

    def _give(self, kept: _Kept) -> Tensor:
        value: Tensor = kept.value if self.outer is None else self.outer[1](kept.value)
        if kept.counter is not None:
            _check(kept.counter, kept.version, value.shape)
        return value.long() if kept.narrowed else value


def _plain(t: Tensor) -> _Kept:
    t = t.detach()
    return _Kept(t, t, t._version)


def _counter_of(t: Tensor) -> Tensor:
    """Return an empty tensor that counts the changes of another."""
    counter = t.detach()
    counter.data = t.new_empty(0)
    return counter


def _is_index(t: Tensor) -> bool:
    """Whether a tensor holds what a pooling saves beside its input, places in planes, in twice the bits that they need."""
    if t.dtype is not torch.int64 or t.ndim < 4 or type(t) is not Tensor or t.numel() == 0 or not t.is_cpu:
        return False
    low, high = t.aminmax()
    return int(low) >= 0 and int(high) < 1 << 31


def _check(counter: Tensor, version: int, shape: torch.Size) -> None:
    """Do what torch does where no hooks stand between."""
    if counter._version != version:
        # torch's own words first: programs look for them
        raise RecomputeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{counter.type()} {list(shape)}] is at version {counter._version}; expected version {version} instead: "
            "change a copy of it, or change it after the backward"
        )
