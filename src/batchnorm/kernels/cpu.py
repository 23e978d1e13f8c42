"""The fused kernels: chosen by dtype, layout and activation, compiled when they are first needed, and run.

::

    forward:   y = activation((x - mean) · γ / √(var + ε) + β + residual)      statistics of the batch, or given ones
    backward:  d = dy · activation'(…);   dx = γ / √(var + ε) · (d - mean(d) - x̂ · mean(d · x̂));   dγ = Σ d · x̂;   dβ = Σ d

Sums are of distances from an estimate of the mean, in float32 over short pieces and in float64 beyond. Results do not depend on
the number of threads.
"""

import logging
import threading
import time
from functools import lru_cache
from typing import Any, NamedTuple

from numba import cfunc, types

from batchnorm.kernels import planes, pool, row_gradients, rows
from batchnorm.kernels.activations import CODES
from batchnorm.kernels.arguments import Arguments, build_number

__all__ = ["KINDS", "Arguments", "Plan", "arguments", "backward", "compiled", "forward", "notes", "plan"]

KINDS = {"float32": types.float32, "float64": types.float64, "bfloat16": types.uint16, "float16": types.int16}
"""The dtypes, and the type that Numba sees."""
# bytes of a block of rows
BLOCK = 1 << 18
# columns of a strip, at most
WIDEST = 4096
# places up to which planes are treated as rows
SMALL_PLANE = 36
# values that are worth a thread
GRAIN = 1 << 15

_log = logging.getLogger("batchnorm.kernels")
_compiling = threading.RLock()
_kept: dict[str, str] = {}


class Plan(NamedTuple):
    """How a batch is divided into tasks."""

    layout: str
    samples: int
    channels: int
    places: int
    width: int
    height: int
    strips: int
    blocks: int
    threads: int


@lru_cache(maxsize=4096)
def plan(layout: str, samples: int, channels: int, places: int, itemsize: int, most: int) -> Plan:
    """Divide a batch: ``"planes"`` of ``(N, C, places)``, or ``samples`` ``"rows"`` of ``C`` channels."""
    threads = max(1, min(most, samples * channels * places // GRAIN))
    if layout == "planes" and places > SMALL_PLANE:
        return Plan(layout, samples, channels, places, 0, 0, 0, 0, min(threads, channels))
    width = min(channels, max(1, WIDEST // places))
    strips = -(-channels // width)
    height = min(samples, max(16, BLOCK // (width * places * itemsize)))
    blocks = -(-samples // height)
    return Plan("rows", samples, channels, places, width, height, strips, blocks, min(threads, strips * blocks))


@lru_cache(maxsize=4096)
def _template(how: Plan) -> bytes:
    sizes = {name: v for name, v in how._asdict().items() if name not in ("layout", "threads")}
    return bytes(Arguments(build=build_number(), **sizes))


def arguments(how: Plan) -> Arguments:
    """Return a block of arguments with the sizes filled in, all else being 0."""
    return Arguments.from_buffer_copy(_template(how))


_MAKERS: dict[tuple[str, str], Any] = {
    ("planes", "forward"): planes.forward,
    ("planes", "backward"): planes.backward,
    ("rows", "measure"): rows.measure,
    ("rows", "apply"): rows.apply,
    ("rows", "sums"): row_gradients.sums,
    ("rows", "derive"): row_gradients.derive,
}
Key = tuple[str, str, str, str | None, int]
_addresses: dict[Key, int] = {}
_alive: list[Any] = []
_notes: list[str] = []


def compiled(layout: str, part: str, kind: str, activation: str | None, adds: int) -> int:
    """Return the address of a kernel, compiled when it is first asked for, and kept on disk for later processes."""
    key = (layout, part, kind, activation, adds)
    return _addresses.get(key) or _compile(key)


def _compile(key: Key) -> int:
    layout, part, kind, *_ = key
    with _compiling:
        if key not in _addresses:
            make = _MAKERS[layout, part]
            kernel = _loaded(make(*_frozen(key)), KINDS[kind])
            _alive.append(kernel)
            _addresses[key] = kernel.address
        return _addresses[key]


def _frozen(key: Key) -> tuple[int, ...]:
    _, part, _, activation, adds = key
    return (build_number(),) if part == "measure" else (build_number(), CODES[activation], adds)


def _loaded(body: Any, element: Any) -> Any:
    signature, started = types.void(types.CPointer(element)), time.perf_counter()
    try:
        kernel = cfunc(signature, cache=True, error_model="numpy")(body)
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        _notes.append(f"kernels are compiled again in every process: {error}")
        kernel = cfunc(signature, error_model="numpy")(body)
    if kernel.cache_hits == 0:
        _log.info("compiled a kernel in %.1f s, which later processes load", time.perf_counter() - started)
    return kernel


def notes() -> tuple[str, ...]:
    """Say what is not as it should be on this machine, or nothing."""
    return tuple(note for note in (*dict.fromkeys(_notes), pool.reason()) if note)


def forward(how: Plan, kind: str, activation: str | None, adds: bool, given: Arguments) -> None:
    """Run the kernels of ``y``; what they find is where the arguments point."""
    of_rows = ["apply"] if given.fixed else ["measure", "apply"]
    parts = ["forward"] if how.layout == "planes" else of_rows
    _run(parts, how, kind, activation, int(adds), given)


def backward(how: Plan, kind: str, activation: str | None, adds: int, given: Arguments) -> None:
    """Run the kernels of the gradients; ``adds`` is 1 where ``residual`` was added, 2 where the output stands in its place."""
    of_rows = ["sums", "derive"] if given.derive else ["sums"]
    parts = ["backward"] if how.layout == "planes" else of_rows
    _run(parts, how, kind, activation, adds, given)


def _run(parts: list[str], how: Plan, kind: str, activation: str | None, adds: int, given: Arguments) -> None:
    for part in parts:
        key = (how.layout, part, kind, None, 0) if part == "measure" else (how.layout, part, kind, activation, adds)
        given.next = given.done = 0
        pool.run(compiled(*key), given, how.threads)
