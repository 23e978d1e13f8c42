"""Run a kernel in several threads: in the OpenMP pool that the framework uses already, so that no second one stands beside it.

A kernel takes tasks from a counter until none is left, so that it is right in any number of threads, one included.
"""

import ctypes
import os
from array import array
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

__all__ = ["attach", "reason", "run"]


class _Pool:
    # GOMP_parallel(function, argument, threads, flags), which LLVM's and Intel's runtimes offer too
    parallel: Callable[..., None] | None = None
    reason: str = "no OpenMP runtime was looked for"
    forked: bool = False


def attach(library: Path) -> None:
    """Find the OpenMP runtime that a library is linked to."""
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError) as error:
        _Pool.parallel, _Pool.reason = None, f"kernels run in one thread: no OpenMP runtime was found ({error})"
        return
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    _Pool.parallel, _Pool.reason = found, ""


def _leave_pool() -> None:
    # the threads of a pool do not survive a fork
    _Pool.forked = True
    _Pool.reason = "kernels run in one thread: the process was forked, and the threads of its OpenMP pool were not"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_pool)


def reason() -> str:
    """Say why kernels run in one thread, or nothing."""
    return _Pool.reason


@lru_cache(maxsize=4096)
def _alone(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def run(address: int, arguments: "array[int]", wanted: int) -> None:
    """Run a kernel; the interpreter is free for other threads meanwhile."""
    place, _ = arguments.buffer_info()
    if wanted > 1 and not _Pool.forked and _Pool.parallel is not None:
        _Pool.parallel(address, place, wanted, 0)
    else:
        _alone(address)(place)
