"""Which implementation normalizes a batch: our kernel, ATen or the definition; why; and how to force one."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from batchnorm.errors import KernelError, OptionError

__all__ = ["Choice", "Running", "choose", "force", "is_eager", "is_sound", "may_move", "obstacle"]

# running statistics that move, the number of batches so far (None: it is not counted), and the momentum; a tuple costs least
Running = tuple[Tensor, Tensor, Tensor | None, float]

NAMES = ("kernel", "aten", "definition")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# values below which a node of autograd in Python costs more than the kernel saves
FEW = 1 << 13

HAS_NUMBA = find_spec("numba") is not None
_NOT_INSTALLED = "" if HAS_NUMBA else "it needs numba, which is not installed: pip install numba"

_forced: ContextVar[str | None] = ContextVar("implementation", default=None)


class Choice(NamedTuple):
    """An implementation, ``"kernel"``, ``"aten"`` or ``"definition"``, and why it is taken."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@contextmanager
def force(name: str) -> Iterator[None]:
    """Take one implementation wherever batches are normalized inside of the context, in this thread.

    Args:
        name: ``"kernel"``, ``"aten"`` or ``"definition"``.

    Raises:
        OptionError: another name.
        KernelError: from a layer, where a forced kernel can't run; it says why.

    Example:
        >>> import torch
        >>> from batchnorm.torch import BatchNorm2d, explain
        >>> layer, x = BatchNorm2d(3), torch.zeros(2, 3, 4, 4)
        >>> with force("definition"):
        ...     print(explain(layer, x))
        definition: it is forced
    """
    if name not in NAMES:
        raise OptionError(f"an implementation must be one of {', '.join(NAMES)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def is_eager(x: Tensor) -> bool:
    """Say whether the values of ``x`` are at hand, and only they matter: not compiled, traced, watched, fake or on a device."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not is_compiling()
        and peek_interpreter_stack() is None
        and not is_legacy_batchedtensor(x)
        and _get_tracing_state() is None
        and _len_torch_dispatch_stack() == 0
    )


def choose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running | None,
    *,
    few: int = FEW,
    at_hand: bool = False,
) -> Choice:
    """Choose for a batch: the kernel from ``few`` values on, unless something forbids it.

    ``at_hand`` says that `is_eager` was asked.

    Raises:
        KernelError: the kernel is forced, and can't run.
    """
    forced = _forced.get()
    if forced is not None:
        against = obstacle(x, weight, bias, residual, running) if forced == "kernel" else ""
        if against:
            raise KernelError(f"the kernel is forced and can't run: {against}; take force('aten') or no force at all")
        return Choice(forced, "it is forced")
    if x.numel() < few:
        return _tiny(few)
    against = (obstacle if not at_hand else _beside)(x, weight, bias, residual, running)
    return Choice("aten", against) if against else _KERNEL


_KERNEL = Choice("kernel", "everything fits")


@lru_cache(maxsize=1024)
def _tiny(few: int) -> Choice:
    return Choice("aten", f"fewer than {few:,} values: a call costs more than the work")


def obstacle(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running: Running | None
) -> str:
    """Say why the kernel can't run, or nothing."""
    if not is_eager(x):
        return f"it needs values in the memory of the processor, outside of compilers and transforms, got {_kind(x)}"
    return _beside(x, weight, bias, residual, running)


def _beside(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running: Running | None
) -> str:
    if forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    if x.dtype not in DTYPES:
        return f"it needs one of {', '.join(map(_name, DTYPES))}, got {_name(x.dtype)}"
    if x.numel() == 0:
        return "there is no value"
    return _misfit(x, weight, bias, residual, running) or _NOT_INSTALLED


def _misfit(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running: Running | None
) -> str:
    wide, channels = x.dtype if x.dtype == torch.float64 else torch.float32, x.shape[1]
    for name, v in (("γ", weight), ("β", bias)):
        if v is not None and not is_sound(v, wide, channels) and not is_sound(v, x.dtype, channels):
            allowed = " or ".join(dict.fromkeys((_name(wide), _name(x.dtype))))
            return f"{name} must be {channels} values of {allowed}, got {_described(v)}"
    if running is not None and not may_move(running, wide, channels):
        got = " and ".join(_described(v) for v in running[:3] if v is not None)
        return f"the running statistics must be {channels} values of {_name(wide)}, and a count in int64, got {got}"
    if residual is None:
        return ""
    if residual.dtype != x.dtype or residual.shape != x.shape or not is_eager(residual):
        return f"the residual must be as the input, got {_name(residual.dtype)} {tuple(residual.shape)}"
    return ""


def is_sound(v: Tensor, dtype: torch.dtype, values: int) -> bool:
    """Say whether a kernel can read or write a tensor: so many values of a dtype, in the processor's memory, without gaps."""
    return v.dtype is dtype and v.is_cpu and v.is_contiguous() and v.numel() == values


def may_move(running: Running, dtype: torch.dtype, channels: int) -> bool:
    """Say whether a kernel can move running statistics."""
    mean, var, batches, _ = running
    counts = batches is None or is_sound(batches, torch.int64, 1)
    return counts and is_sound(mean, dtype, channels) and is_sound(var, dtype, channels)


def _described(v: Tensor) -> str:
    layout = "" if v.is_contiguous() else " with gaps"
    return f"{v.numel()} of {_name(v.dtype)} on {v.device}{layout}"


def _kind(x: Any) -> str:
    if is_compiling():
        return "a compiler's tensor"
    return f"a {type(x).__name__} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
