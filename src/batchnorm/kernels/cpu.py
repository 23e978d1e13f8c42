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

from batchnorm.kernels import planes, pool, rows
from batchnorm.kernels.activations import CODES, GATED
from batchnorm.kernels.arguments import Arguments

__all__ = ["GATED", "KINDS", "Arguments", "Plan", "compiled", "plan", "run"]

KINDS = {"float32": types.float32, "float64": types.float64, "bfloat16": types.uint16, "float16": types.int16}
"""The dtypes, and the type that Numba sees."""
# bytes of a batch that one thread keeps in its cache, and of a block of rows
RESIDENT, BLOCK = 1 << 18, 1 << 18
# channels of a strip, at most
WIDEST = 4096
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
    phases: tuple[int, ...]
    tasks: int
    threads: int


@lru_cache(maxsize=4096)
def plan(layout: str, samples: int, channels: int, places: int, itemsize: int, most: int) -> Plan:
    """Divide a batch: ``"planes"`` of ``(N, C, places)``, or ``samples`` ``"rows"`` of ``C`` channels."""
    threads = max(1, min(most, samples * channels * places // GRAIN))
    if layout == "planes":
        return Plan(layout, samples, channels, places, 0, 0, 0, 0, (rows.ALL,), channels, min(threads, channels))
    width = min(channels, WIDEST)
    strips = -(-channels // width)
    if samples * width * itemsize <= RESIDENT:
        return Plan(layout, samples, channels, 1, width, samples, strips, 1, (rows.ALL,), strips, min(threads, strips))
    height = min(samples, max(16, BLOCK // (width * itemsize)))
    blocks = -(-samples // height)
    tasks = strips * blocks
    return Plan(
        layout, samples, channels, 1, width, height, strips, blocks, (rows.SUM, rows.APPLY), tasks, min(threads, tasks)
    )


def compiled(direction: str, layout: str, kind: str, activation: str | None, adds: int) -> int:
    """Return the address of a kernel, compiled when it is first asked for, and kept on disk for later processes."""
    key = (direction, layout, kind, activation, adds)
    return _addresses.get(key) or _compile(key)


_addresses: dict[tuple[str, str, str, str | None, int], int] = {}
_alive: list[Any] = []


def _compile(key: tuple[str, str, str, str | None, int]) -> int:
    direction, layout, kind, activation, adds = key
    with _compiling:
        if key in _addresses:
            return _addresses[key]
        body = getattr({"planes": planes, "rows": rows}[layout], direction)(CODES[activation], adds)
        signature = types.void(types.CPointer(KINDS[kind]))
        started = time.perf_counter()
        try:
            kernel = cfunc(signature, cache=True)(body)
        except RuntimeError as error:
            if "cache" not in str(error):
                raise
            _kept["cache"] = f"kernels are compiled again in every process: {error}"
            kernel = cfunc(signature)(body)
        if kernel.cache_hits == 0:
            took = time.perf_counter() - started
            name = f"{activation or 'no activation'}, {kind}, {layout}, {direction}"
            _log.info("compiled the kernel for %s in %.1f s; later processes load it", name, took)
        _alive.append(kernel)
        _addresses[key] = kernel.address
        return int(kernel.address)


def notes() -> tuple[str, ...]:
    """Say what is not as it should be on this machine, or nothing."""
    return tuple(note for note in (*_kept.values(), pool.reason()) if note)


def run(direction: str, how: Plan, kind: str, activation: str | None, adds: int, arguments: Arguments) -> None:
    """Run a kernel, in all its phases; what it finds is where the arguments point."""
    address = compiled(direction, how.layout, kind, activation, adds)
    for phase in how.phases if not arguments.fixed or direction == "backward" else (rows.APPLY,):
        arguments.phase, arguments.next, arguments.done = phase, 0, 0
        pool.run(address, arguments, how.threads)
