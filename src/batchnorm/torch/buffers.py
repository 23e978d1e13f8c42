"""Memory for outputs, kept when they are gone and lent again.

A page that the system hands out costs more than a kernel needs to fill it, and the C library gives large pieces back to the
system each time. Here they wait for the next output of their size. A piece is free again when nothing but the list holds it.
"""

import ctypes
import os
import sys
import threading
from functools import lru_cache
from sys import getrefcount
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from batchnorm.errors import OptionError

__all__ = ["empty_like", "keep_memory", "once_more", "turn_of"]

# bytes from which memory is kept, and what they are rounded up to
LEAST, STEP = 1 << 19, 1 << 16
# bytes of a large page, and what asks for them
PAGE, MADV_HUGEPAGE = 1 << 21, 14
_holders: Any = getattr(torch._C, "_storage_Use_Count", None)


class _Piece(NamedTuple):
    """Memory, and a tensor on it that nobody sees, of the form that was asked for last."""

    tensor: Tensor
    storage: UntypedStorage
    handle: int
    address: int

    def holders(self) -> tuple[int, int]:
        """Return how many hold the memory, and how many in Python."""
        return _holders(self.handle), getrefcount(self.storage)

    def is_free(self) -> bool:
        """Whether nothing else holds the memory, which was neither resized nor moved to where another process sees it."""
        return self.holders() == _nobody() and self.tensor.data_ptr() == self.address

    def fits(self, x: Tensor) -> bool:
        """Whether the tensor has the form of another."""
        mine = self.tensor
        return mine.shape == x.shape and mine.dtype is x.dtype and mine.stride() == x.stride()


# a tensor of inference could not be saved for a backward
@torch.inference_mode(mode=False)
def _formed(storage: UntypedStorage, x: Tensor) -> _Piece:
    return _Piece(_tensor_on(storage, x.dtype, x.shape, x.stride()), storage, storage._cdata, storage.data_ptr())


def _tensor_on(storage: UntypedStorage, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)


@lru_cache(maxsize=1)
def _nobody() -> tuple[int, int]:
    """Return what a piece is held by that is not lent."""
    return _formed(UntypedStorage(4), torch.empty(1, device="cpu")).holders()  # type: ignore[no-untyped-call]


def _usual() -> int:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    return min(1 << 30, memory // 16) if _holders is not None else 0


class _Store:
    """Pieces of memory, lent or not, by their size; the size that was asked for last comes last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pieces: dict[int, list[_Piece]] = {}
        # how often each piece was lent, by its handle
        self.turns: dict[int, int] = {}
        self.bytes, self.limit = 0, _usual()

    def take(self, x: Tensor, size: int) -> Tensor | None:
        """Return a tensor of the form of ``x`` in memory that nobody else gets, or ``None`` where the limit is reached."""
        pieces = self.pieces.get(size, [])
        for k, piece in enumerate(pieces):
            if piece.is_free():
                # what was lent longest ago is looked at first
                del pieces[k]
                pieces.append(piece if piece.fits(x) else _formed(piece.storage, x))
                return self._lent(pieces[-1])
        return self._new(x, size)

    def _new(self, x: Tensor, size: int) -> Tensor | None:
        self.shrink(self.limit - size)
        if self.bytes + size > self.limit:
            return None
        storage = UntypedStorage(size)  # type: ignore[no-untyped-call]
        _ask_for_large_pages(storage)
        piece = _formed(storage, x)
        self.pieces[size] = [*self.pieces.pop(size, []), piece]
        self.bytes += size
        return self._lent(piece)

    def _lent(self, piece: _Piece) -> Tensor:
        self.turns[piece.handle] = self.turns.get(piece.handle, 0) + 1
        # a tensor of its own, on the same memory
        return piece.tensor.data

    def shrink(self, limit: int) -> None:
        """Forget pieces that are not lent, of the sizes that were not asked for longest."""
        for size in [*self.pieces]:
            if self.bytes <= limit:
                return
            kept = []
            for piece in self.pieces.pop(size):
                if piece.holders() == _nobody():
                    self.bytes -= size
                    del self.turns[piece.handle]
                else:
                    kept.append(piece)
            if kept:
                self.pieces[size] = kept

    def forget(self) -> None:
        """Forget all pieces; what is lent is freed by those who hold it."""
        self.pieces, self.turns, self.bytes = {}, {}, 0


_STORE = _Store()


def _begin_anew() -> None:
    # another thread of the parent may have held it
    _STORE.lock = threading.Lock()
    _STORE.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def empty_like(x: Tensor) -> Tensor:
    """Return a tensor of the shape, strides and dtype of ``x``, which is dense; its values are anything."""
    size, y = x.nbytes, None
    # who holds it is another thread, or this one: a finalizer may run anywhere
    if size >= LEAST and _STORE.limit > 0 and _STORE.lock.acquire(blocking=False):
        try:
            y = _STORE.take(x, -(-size // STEP) * STEP)
        finally:
            _STORE.lock.release()
    return torch.empty_like(x) if y is None else y


def once_more(
    storage: UntypedStorage, turn: int, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...]
) -> Tensor | None:
    """Return another tensor on memory that holds what it held in some turn; ``None`` where it was lent since."""
    if not _STORE.lock.acquire(blocking=False):
        return None
    try:
        # it can't be lent before this tensor holds it
        return _tensor_on(storage, dtype, shape, stride) if turn_of(storage) == turn else None
    finally:
        _STORE.lock.release()


def turn_of(storage: UntypedStorage) -> int:
    """Return how often this memory was lent: if it was not since, what stands there is what was written then."""
    return _STORE.turns.get(storage._cdata, 0)


def keep_memory(most: int) -> int:
    """Say how many bytes of outputs' memory may wait for the next ones when they are gone; return what held before.

    Outputs of the kernels from 512 KiB on lie in memory that is lent again when they are freed, so that the next output of the
    size costs no new pages. Without this call that is up to a sixteenth of the machine's memory, and 1 GiB at most.

    Args:
        most: bytes; 0 keeps none, and what is free now is given back.

    Raises:
        OptionError: less than 0.

    Example:
        >>> before = keep_memory(0)
        >>> keep_memory(before)
        0
    """
    if most < 0:
        raise OptionError(f"the memory that is kept must be a number of bytes, 0 or more, got {most!r}")
    with _STORE.lock:
        before, _STORE.limit = _STORE.limit, most if _holders is not None else 0
        if most == 0:
            _STORE.forget()
        else:
            _STORE.shrink(most)
    return before


def _ask_for_large_pages(storage: UntypedStorage) -> None:
    start = -(-storage.data_ptr() // PAGE) * PAGE
    size = (storage.data_ptr() + storage.nbytes()) // PAGE * PAGE - start
    if size > 0 and sys.platform == "linux":
        _libc().madvise(start, size, MADV_HUGEPAGE)


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes, libc.madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return libc
