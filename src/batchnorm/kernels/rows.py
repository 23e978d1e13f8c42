"""Kernels for rows: blocks of them are measured, merged as Moments, and normalized in a second run.

A row of ``(N, C)`` or channels-last holds each channel once. A sample of ``(N, C, *spatial)`` is a row too, in which each
channel has as many columns as there are places: so are small planes treated, whose loops would be too short to be quick.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from batchnorm.kernels.activations import activate
from batchnorm.kernels.arguments import (
    BLOCKS,
    BUILD,
    CHANNELS,
    DONE,
    HEIGHT,
    NEXT,
    PARTS,
    PLACES,
    RESIDUAL,
    SAMPLES,
    STRIPS,
    WIDTH,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.planes import FAR, SUMS, centred
from batchnorm.kernels.scalars import (
    add_to,
    add_to_slot,
    coarse,
    fused,
    get,
    like,
    of,
    pointer,
    put,
    reals,
    slot,
    take,
)
from batchnorm.kernels.statistics import affine_of, keep, move_running

__all__ = ["TILE", "affines", "apply", "block", "flush", "measure", "spread"]

# rows that are added in float32 before their sum is added in float64
TILE = 128
# values, at least, whose mean is the first estimate
FIRST = 15


@njit(fastmath=SUMS, error_model="numpy")
def distances(x: Any, start: int, rows: int, stride: int, mean: Any, s: Any, q: Any) -> None:
    """Add the distances of some rows from a mean, and their squares, to s and q."""
    many = rows - rows % 4
    for i in range(start, start + many * stride, 4 * stride):
        for c in range(len(mean)):
            plain, squares = like(mean[0], 0), like(mean[0], 0)
            for k in range(4):
                t = centred(x, i + k * stride + c, of(mean, c))
                plain += t
                squares += t * t
            add_to(s, c, plain)
            add_to(q, c, squares)
    for i in range(start + many * stride, start + rows * stride, stride):
        for c in range(len(mean)):
            t = centred(x, i + c, of(mean, c))
            add_to(s, c, t)
            add_to(q, c, t * t)


@njit(fastmath=SUMS, error_model="numpy")
def flush(columns: Any, places: int, total: Any) -> None:
    """Add the sums of each channel's columns to those in float64, and begin anew."""
    for c in range(len(total)):
        found = like(columns[0], 0)
        for k in range(c * places, (c + 1) * places):
            found += columns[k]
        total[c] += found
    columns[:] = 0


@njit(error_model="numpy")
def spread(channels: Any, places: int, columns: Any) -> None:
    """Repeat what belongs to a channel for each of its columns."""
    for c in range(len(channels)):
        found = channels[c]
        for k in range(c * places, (c + 1) * places):
            columns[k] = found


@njit(error_model="numpy")
def around(x: Any, start: int, rows: int, stride: int, places: int, mean: Any, total: Any, squares: Any) -> None:
    """Turn into the sums of the distances of all rows from a mean, and of their squares, for each channel."""
    s, q = np.zeros_like(mean), np.zeros_like(mean)
    total[:] = 0
    squares[:] = 0
    for tile in range(0, rows, TILE):
        distances(x, start + tile * stride, min(TILE, rows - tile), stride, mean, s, q)
        flush(s, places, total)
        flush(q, places, squares)


@njit(error_model="numpy")
def measure_strip(x: Any, start: int, rows: int, stride: int, places: int, mean: Any, rest: Any, m2: Any) -> None:
    """Find the means of a strip's channels, as ``mean + rest``, and their m2."""
    columns = np.empty(len(mean) * places, mean.dtype)
    first = min(rows, 1 + FIRST // places)
    columns[:] = 0
    around(x, start, first, stride, places, columns, rest, m2)
    for c in range(len(mean)):
        mean[c] = coarse(x, like(mean[c], rest[c] / (first * places)))
    for attempt in range(2):
        spread(mean, places, columns)
        around(x, start, rows, stride, places, columns, rest, m2)
        far = False
        for c in range(len(mean)):
            found = rest[c]
            rest[c] = found / (rows * places)
            m2[c] -= found * rest[c]
            m2[c] = 0.0 if m2[c] < 0.0 else m2[c]
            far = far or rest[c] * found > FAR * FAR * m2[c]
        if attempt == 1 or not far:
            break
        for c in range(len(mean)):
            mean[c] = coarse(x, like(mean[c], mean[c] + rest[c]))


@njit(error_model="numpy")
def merge(p: Any, parts: Any) -> None:
    """Merge the Moments of the blocks, in their order: Chan's formula."""
    rows, height, blocks, places = slot(p, SAMPLES), slot(p, HEIGHT), slot(p, BLOCKS), slot(p, PLACES)
    for c in range(parts.shape[2]):
        count, mean, m2 = 0.0, 0.0, 0.0
        for b in range(blocks):
            part = float(places * min(height, rows - b * height))
            d = parts[b, 0, c] - mean
            mean += d * part / (count + part)
            m2 += parts[b, 1, c] + d * d * count * part / (count + part)
            count += part
        keep(p, c, rows * places, mean, m2)


@njit(error_model="numpy")
def affines(p: Any, zero: Any, first: int, width: int, places: int) -> Any:
    """Return mean, scale and shift of each column of a strip."""
    mean = np.empty(width * places, np.asarray(zero).dtype)
    scale, shift = np.empty_like(mean), np.empty_like(mean)
    for c in range(width):
        found = affine_of(p, zero, first + c)
        for k in range(c * places, (c + 1) * places):
            mean[k], scale[k], shift[k] = found
    return mean, scale, shift


@njit(forceinline=True, error_model="numpy")
def block(p: Any, task: int) -> Any:
    """Return what a task is about: its first channel and number of channels, its block, number of rows, and first element."""
    strips, places, height = slot(p, STRIPS), slot(p, PLACES), slot(p, HEIGHT)
    first, number = (task % strips) * slot(p, WIDTH), task // strips
    top = number * height
    width = min(slot(p, WIDTH), slot(p, CHANNELS) - first)
    start = (top * slot(p, CHANNELS) + first) * places
    return first, width, number, min(height, slot(p, SAMPLES) - top), start


def measure(build: int) -> Any:
    """Return the kernel of the statistics: those of each block, merged by the thread that ends last."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, channels, places = pointer(p, X), slot(p, CHANNELS), slot(p, PLACES)
        tasks = slot(p, STRIPS) * slot(p, BLOCKS)
        parts = carray(reals(p, PARTS), (slot(p, BLOCKS), 2, channels))
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, width, number, rows, start = block(p, task)
            mean = np.empty(width, np.asarray(zero).dtype)
            rest, m2 = parts[number, 0, first : first + width], parts[number, 1, first : first + width]
            measure_strip(x, start, rows, channels * places, places, mean, rest, m2)
            for c in range(width):
                rest[c] += mean[c]
            done += 1
        if done > 0 and add_to_slot(p, DONE, done) == tasks:
            merge(p, parts)
            move_running(p, slot(p, SAMPLES) * places)

    return kernel


def apply(build: int, act: int, adds: int) -> Any:
    """Return the kernel ``y = activation((x - mean) · scale + shift + residual)``."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, y, residual = pointer(p, X), pointer(p, Y), pointer(p, RESIDUAL)
        channels, places, tasks = slot(p, CHANNELS), slot(p, PLACES), slot(p, STRIPS) * slot(p, BLOCKS)
        stride = channels * places
        zero = like(get(x, 0), 0)
        while True:
            # what was read last is in the cache still
            task = tasks - 1 - take(p, NEXT)
            if task < 0:
                break
            first, width, _, rows, start = block(p, task)
            mean, scale, shift = affines(p, zero, first, width, places)
            for i in range(start, start + rows * stride, stride):
                for c in range(len(mean)):
                    z = fused(get(x, i + c) - of(mean, c), of(scale, c), of(shift, c))
                    if adds != 0:
                        z = z + get(residual, i + c)
                    put(y, i + c, activate(act, z))

    return kernel
