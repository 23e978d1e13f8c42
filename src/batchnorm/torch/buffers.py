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

__all__ = ["empty_like", "keep_memory"]

# bytes from which memory is kept, and what they are rounded up to
LEAST, STEP = 1 << 19, 1 << 16
# bytes of a large page, and what asks for them
PAGE, MADV_HUGEPAGE = 1 << 21, 14
# references to a storage in Python that nobody else has: the list, the loop and the question
ALONE = 3
_holders: Any = getattr(torch._C, "_storage_Use_Count", None)


class _Piece(NamedTuple):
    storage: UntypedStorage
    handle: int
    address: int


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
        self.bytes, self.limit = 0, _usual()

    def take(self, size: int) -> UntypedStorage | None:
        """Return a storage that nobody else gets, or ``None`` where the limit is reached."""
        pieces = self.pieces.setdefault(size, [])
        for k, (storage, handle, address) in enumerate(pieces):
            # held by this list alone, in Python too, and neither resized nor moved into memory that another process sees
            if _holders(handle) == 1 and getrefcount(storage) == ALONE and storage.data_ptr() == address:
                if k + 1 < len(pieces):
                    # what is lent last comes back first
                    pieces.append(pieces.pop(k))
                return storage
        self.pieces[size] = self.pieces.pop(size)
        self.shrink(self.limit - size)
        if self.bytes + size > self.limit:
            return None
        storage = UntypedStorage(size)  # type: ignore[no-untyped-call]
        _ask_for_large_pages(storage)
        self.pieces.setdefault(size, []).append(_Piece(storage, storage._cdata, storage.data_ptr()))
        self.bytes += size
        return storage

    def shrink(self, limit: int) -> None:
        """Forget pieces that are not lent, of the sizes that were not asked for longest."""
        for size in [*self.pieces]:
            if self.bytes <= limit:
                return
            kept = [piece for piece in self.pieces[size] if _holders(piece.handle) > 1]
            self.bytes -= size * (len(self.pieces[size]) - len(kept))
            if kept:
                self.pieces[size] = kept
            else:
                del self.pieces[size]

    def forget(self) -> None:
        """Forget all pieces; what is lent is freed by those who hold it."""
        self.pieces, self.bytes = {}, 0


_STORE = _Store()


def _begin_anew() -> None:
    # another thread of the parent may have held it
    _STORE.lock = threading.Lock()
    _STORE.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def empty_like(x: Tensor) -> Tensor:
    """Return a tensor of the shape, strides and dtype of ``x``, which is dense; its values are anything."""
    size = x.nbytes
    if size < LEAST or _STORE.limit == 0:
        return torch.empty_like(x)
    with _STORE.lock:
        storage = _STORE.take(-(-size // STEP) * STEP)
        if storage is not None:
            return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())
    return torch.empty_like(x)


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
