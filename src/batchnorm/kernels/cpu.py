"""The fused kernels: chosen by dtype, layout and activation, compiled when they are first needed, and run.

::

    forward:   y = activation((x - mean) · γ / √(var + ε) + β + residual)      statistics of the batch, or given ones
    backward:  d = dy · activation'(…);   dx = γ / √(var + ε) · (d - mean(d) - x̂ · mean(d · x̂));   dγ = Σ d · x̂;   dβ = Σ d

Sums are of distances from an estimate of the mean, in float32 over short pieces and in float64 beyond. Results do not depend on
the number of threads.
"""

import ctypes
import logging
import threading
import time
from array import array
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from numba import cfunc, types

from batchnorm.kernels import planes, pool, rows, running
from batchnorm.kernels.activations import CODES
from batchnorm.kernels.arguments import DRESIDUAL, DX, PAST_CACHE, Y, block, build_number
from batchnorm.kernels.runs import LINE

__all__ = ["KINDS", "Plan", "mover", "notes", "plan", "run"]

KINDS = {"float32": types.float32, "float64": types.float64, "bfloat16": types.uint16, "float16": types.int16}
"""The dtypes, and the type that Numba sees."""
# values of a task over rows: an eighth of all, and not more nor less than
LEAST, MOST = 1 << 13, 1 << 17
# bytes that lie side by side, and bytes of all samples, up to which channels are treated together
RUN, SLAB = 1 << 15, 1 << 22
# columns of a strip, at least, where there are as many
NARROW = 64
# places up to which planes are treated as rows
SMALL_PLANE = 36
# bytes of outputs that no cache would hold until they are read, and of a piece that it is worth to write past it
LARGE, PIECE = 3 << 23, 1 << 13
# values that are worth a thread
GRAIN = 1 << 15

_log = logging.getLogger("batchnorm.kernels")
_compiling = threading.RLock()


class Plan(NamedTuple):
    """How a batch is divided into tasks, and a block of arguments that says so."""

    layout: str
    channels: int
    blocks: int
    threads: int
    past_cache: bool
    words: "array[int]"


def plan(layout: str, samples: int, channels: int, places: int, itemsize: int, most: int) -> Plan:
    """Divide a batch: ``"planes"`` of ``(N, C, places)``, or ``samples`` ``"rows"`` of ``C`` channels."""
    threads = max(1, min(most, samples * channels * places // GRAIN))
    divide = _planes if layout == "planes" and places > SMALL_PLANE else _rows
    return divide(samples, channels, places, itemsize, threads)


def _planes(samples: int, channels: int, places: int, itemsize: int, threads: int) -> Plan:
    plane = places * itemsize
    width = max(1, min(planes.MOST, RUN // plane, SLAB // (samples * plane), channels // (4 * max(2, threads))))
    strips = -(-channels // width)
    # only whole lines go past it
    past_cache = samples * channels * plane >= LARGE and plane >= PIECE and plane % LINE == 0
    words = block(samples=samples, channels=channels, places=places, width=width, strips=strips)
    return Plan("planes", channels, 0, min(threads, strips), past_cache, words)


def _rows(samples: int, channels: int, places: int, itemsize: int, threads: int) -> Plan:
    size, widest = samples * channels * places, min(channels, max(1, rows.WIDEST // places))
    task = min(max(size // 8, LEAST), MOST)
    height = min(samples, max(2 * rows.TILE, task // (widest * places)))
    width = widest if height < samples else min(widest, max(NARROW, task // samples) // (16 * places) * 16 or 16)
    strips, blocks = -(-channels // width), -(-samples // height)
    # rows that do not follow each other are read together, and would write parts of lines
    past_cache = size * itemsize >= LARGE and width == channels and channels * places * itemsize % LINE == 0
    words = block(
        samples=samples, channels=channels, places=places, width=width, height=height, strips=strips, blocks=blocks
    )
    return Plan("rows", channels, blocks, min(threads, strips * blocks), past_cache, words)


_MAKERS: dict[tuple[str, str], Any] = {
    ("planes", "forward"): planes.forward,
    ("planes", "backward"): planes.backward,
    ("rows", "forward"): rows.forward,
    ("rows", "backward"): rows.backward,
}
Key = tuple[str, str, str, str | None, int]
_addresses: dict[Key, int] = {}
_alive: list[Any] = []
_notes: list[str] = []
# seconds of what was compiled in this process
_said: list[float] = []


def _compile(key: Key) -> int:
    layout, part, kind, activation, adds = key
    with _compiling:
        if key not in _addresses:
            make = _MAKERS[layout, part]
            signature = types.void(types.CPointer(KINDS[kind]))
            kernel = _loaded(make(build_number(), CODES[activation], adds), signature)
            _alive.append(kernel)
            _addresses[key] = kernel.address
        return _addresses[key]


def _loaded(body: Any, signature: Any) -> Any:
    started = time.perf_counter()
    try:
        kernel = cfunc(signature, cache=True, error_model="numpy")(body)
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        _notes.append(f"kernels are compiled again in every process: {error}")
        kernel = cfunc(signature, error_model="numpy")(body)
    if kernel.cache_hits == 0:
        _say(time.perf_counter() - started)
    return kernel


def _say(seconds: float) -> None:
    first = not _said
    _said.append(seconds)
    _log.log(
        logging.WARNING if first else logging.INFO,
        "compiled a kernel in %.1f s, which later processes load%s",
        seconds,
        "; there is one for each dtype, layout, direction and activation" if first else "",
    )


@lru_cache(maxsize=1)
def mover() -> Callable[..., int]:
    """Return `running.move`, compiled: ``(build, batch, rstd, gamma, mean, var, batches, channels, bound, momentum)``."""
    numbers, whole, real = types.CPointer(types.float32), types.int64, types.float64
    signature = whole(whole, *[numbers] * 5, types.CPointer(whole), whole, real, real)
    with _compiling:
        kernel = _loaded(running.move(build_number()), signature)
    _alive.append(kernel)
    words = [ctypes.c_int64, *[ctypes.c_void_p] * 6, ctypes.c_int64, ctypes.c_double, ctypes.c_double]
    # so short that it keeps the interpreter
    called = ctypes.PYFUNCTYPE(ctypes.c_int64, *words)(kernel.address)
    return partial(called, build_number())


def notes() -> tuple[str, ...]:
    """Say what is not as it should be on this machine, or nothing."""
    return tuple(note for note in (*dict.fromkeys(_notes), pool.reason()) if note)


def run(key: Key, how: Plan, words: "array[int]") -> None:
    """Run a kernel, compiled when it is first asked for; what it finds is where the arguments point.

    ``key`` is the layout, ``"forward"`` or ``"backward"``, the dtype, the activation, and 1 where ``residual`` is added; in a
    backward 2 where the output stands in its place.
    """
    # outputs of the other direction have no address
    words[PAST_CACHE] = how.past_cache and (words[Y] | words[DX] | words[DRESIDUAL]) % LINE == 0
    pool.run(_addresses.get(key) or _compile(key), words, how.threads)
