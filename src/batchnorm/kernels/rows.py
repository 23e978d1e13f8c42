"""Kernels for ``(N, C)`` and channels-last: blocks of rows are measured, merged as Moments, and normalized in a second run."""

from typing import Any

import numpy as np
from numba import carray, njit

from batchnorm.kernels.activations import activate
from batchnorm.kernels.arguments import (
    AFFINE,
    BLOCKS,
    BUILD,
    CHANNELS,
    DONE,
    DRESIDUAL,
    DX,
    DY,
    HEIGHT,
    NEXT,
    PARTS,
    RESIDUAL,
    SAMPLES,
    STRIPS,
    WIDTH,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.planes import FAR, SUMS, centred, gradient
from batchnorm.kernels.scalars import (
    add_to,
    add_to_slot,
    coarse,
    fused,
    get,
    like,
    of,
    parameters,
    pointer,
    put,
    reals,
    slot,
    take,
)
from batchnorm.kernels.statistics import affine_of, backward_affine, keep, move_running

__all__ = ["apply", "derive", "measure", "sums"]

# rows that are added in float32 before their sum is added in float64
TILE = 128
# rows whose mean is the first estimate
FIRST = 4


@njit(fastmath=SUMS)
def distances(x: Any, start: int, rows: int, channels: int, mean: Any, s: Any, q: Any) -> None:
    """Add the distances of some rows from a mean, and their squares, to s and q."""
    many = rows - rows % 4
    for i in range(start, start + many * channels, 4 * channels):
        for c in range(len(mean)):
            plain, squares = like(mean[0], 0), like(mean[0], 0)
            for k in range(4):
                t = centred(x, i + k * channels + c, of(mean, c))
                plain += t
                squares += t * t
            add_to(s, c, plain)
            add_to(q, c, squares)
    for i in range(start + many * channels, start + rows * channels, channels):
        for c in range(len(mean)):
            t = centred(x, i + c, of(mean, c))
            add_to(s, c, t)
            add_to(q, c, t * t)


@njit
def flush(s: Any, q: Any, total: Any, squares: Any) -> None:
    """Add sums of float32 to those of float64, and begin anew."""
    for c in range(len(s)):
        total[c] += s[c]
        squares[c] += q[c]
        s[c] = 0
        q[c] = 0


@njit
def around(x: Any, start: int, rows: int, channels: int, mean: Any, total: Any, squares: Any) -> None:
    """Turn into the sums of the distances of all rows from a mean, and of their squares."""
    s, q = np.zeros_like(mean), np.zeros_like(mean)
    total[:] = 0
    squares[:] = 0
    for tile in range(0, rows, TILE):
        distances(x, start + tile * channels, min(TILE, rows - tile), channels, mean, s, q)
        flush(s, q, total, squares)


@njit
def measure_strip(x: Any, start: int, rows: int, channels: int, mean: Any, total: Any, m2: Any) -> None:
    """Find the means of a strip, as ``mean + total``, and its m2."""
    width, first = len(mean), min(rows, FIRST)
    mean[:] = 0
    around(x, start, first, channels, mean, total, m2)
    for c in range(width):
        mean[c] = coarse(x, like(mean[c], total[c] / first))
    for attempt in range(2):
        around(x, start, rows, channels, mean, total, m2)
        far = False
        for c in range(width):
            rest = total[c] / rows
            m2[c] -= total[c] * rest
            m2[c] = 0.0 if m2[c] < 0.0 else m2[c]
            far = far or rest * rest * rows > FAR * FAR * m2[c]
            total[c] = rest
        if attempt == 1 or not far:
            break
        for c in range(width):
            mean[c] = coarse(x, like(mean[c], mean[c] + total[c]))


@njit
def merge(p: Any, parts: Any) -> None:
    """Merge the Moments of the blocks, in their order: Chan's formula."""
    rows, height, blocks = slot(p, SAMPLES), slot(p, HEIGHT), slot(p, BLOCKS)
    for c in range(parts.shape[2]):
        count, mean, m2 = 0.0, 0.0, 0.0
        for b in range(blocks):
            part = float(min(height, rows - b * height))
            d = parts[b, 0, c] - mean
            mean += d * part / (count + part)
            m2 += parts[b, 1, c] + d * d * count * part / (count + part)
            count += part
        keep(p, c, rows, mean, m2)


@njit
def affines(p: Any, zero: Any, first: int, width: int) -> Any:
    """Return mean, scale and shift of a strip's channels."""
    mean = np.empty(width, np.asarray(zero).dtype)
    scale, shift = np.empty_like(mean), np.empty_like(mean)
    for c in range(width):
        mean[c], scale[c], shift[c] = affine_of(p, zero, first + c)
    return mean, scale, shift


@njit(forceinline=True)
def block(p: Any, task: int) -> Any:
    """Return what a task is about: its first channel and number of channels, its block, number of rows, and first element."""
    strips, channels, height = slot(p, STRIPS), slot(p, CHANNELS), slot(p, HEIGHT)
    first, number = (task % strips) * slot(p, WIDTH), task // strips
    top = number * height
    width = min(slot(p, WIDTH), channels - first)
    return first, width, number, min(height, slot(p, SAMPLES) - top), top * channels + first


def measure(build: int) -> Any:
    """Return the kernel of the statistics: those of each block, merged by the thread that ends last."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, channels, tasks = pointer(p, X), slot(p, CHANNELS), slot(p, STRIPS) * slot(p, BLOCKS)
        parts = carray(reals(p, PARTS), (slot(p, BLOCKS), 2, channels))
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, width, number, rows, start = block(p, task)
            mean = np.empty(width, np.asarray(zero).dtype)
            total, m2 = np.empty(width), np.empty(width)
            measure_strip(x, start, rows, channels, mean, total, m2)
            for c in range(width):
                parts[number, 0, first + c] = mean[c] + total[c]
                parts[number, 1, first + c] = m2[c]
            done += 1
        if done > 0 and add_to_slot(p, DONE, done) == tasks:
            merge(p, parts)
            move_running(p, slot(p, SAMPLES))

    return kernel


def apply(build: int, act: int, adds: int) -> Any:
    """Return the kernel ``y = activation((x - mean) · scale + shift + residual)``."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, y, residual = pointer(p, X), pointer(p, Y), pointer(p, RESIDUAL)
        channels, tasks = slot(p, CHANNELS), slot(p, STRIPS) * slot(p, BLOCKS)
        zero = like(get(x, 0), 0)
        while True:
            # what was read last is in the cache still
            task = tasks - 1 - take(p, NEXT)
            if task < 0:
                break
            first, width, _, rows, start = block(p, task)
            mean, scale, shift = affines(p, zero, first, width)
            for i in range(start, start + rows * channels, channels):
                for c in range(width):
                    z = fused(get(x, i + c) - of(mean, c), of(scale, c), of(shift, c))
                    if adds != 0:
                        z = z + get(residual, i + c)
                    put(y, i + c, activate(act, z))

    return kernel


@njit(forceinline=True, fastmath=SUMS)
def gradient_sums(
    act: int,
    adds: int,
    x: Any,
    dy: Any,
    residual: Any,
    start: int,
    rows: int,
    channels: int,
    affine: Any,
    s: Any,
    q: Any,
) -> None:
    """Add the sums of d and of d · (x - mean) of some rows to s and q."""
    mean, scale, shift = affine
    many = rows - rows % 4
    for i in range(start, start + many * channels, 4 * channels):
        for c in range(len(s)):
            plain, distant = like(mean[0], 0), like(mean[0], 0)
            for k in range(4):
                j = i + k * channels + c
                t = centred(x, j, of(mean, c))
                d = gradient(act, adds, x, dy, residual, j, t, of(scale, c), of(shift, c))
                plain += d
                distant += d * t
            add_to(s, c, plain)
            add_to(q, c, distant)
    for i in range(start + many * channels, start + rows * channels, channels):
        for c in range(len(s)):
            t = centred(x, i + c, of(mean, c))
            d = gradient(act, adds, x, dy, residual, i + c, t, of(scale, c), of(shift, c))
            add_to(s, c, d)
            add_to(q, c, d * t)


@njit
def merge_sums(p: Any, zero: Any, parts: Any, channels: int) -> None:
    """Add the sums of the blocks, in their order, and write a, b and c of every channel."""
    affine = parameters(p, AFFINE)
    for c in range(channels):
        plain, distant = 0.0, 0.0
        for b in range(parts.shape[0]):
            plain += parts[b, 0, c]
            distant += parts[b, 1, c]
        found = backward_affine(p, zero, c, slot(p, SAMPLES), plain, distant)
        affine[c], affine[channels + c], affine[2 * channels + c] = found


def sums(build: int, act: int, adds: int) -> Any:
    """Return the kernel of dγ and dβ: the sums of each block, added by the thread that ends last."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, residual = pointer(p, X), pointer(p, DY), pointer(p, RESIDUAL)
        channels, tasks = slot(p, CHANNELS), slot(p, STRIPS) * slot(p, BLOCKS)
        parts = carray(reals(p, PARTS), (slot(p, BLOCKS), 2, channels))
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, width, number, rows, start = block(p, task)
            affine = affines(p, zero, first, width)
            total, distant = np.zeros(width), np.zeros(width)
            s, q = np.zeros_like(affine[0]), np.zeros_like(affine[0])
            for tile in range(0, rows, TILE):
                here, many = start + tile * channels, min(TILE, rows - tile)
                gradient_sums(act, adds, x, dy, residual, here, many, channels, affine, s, q)
                flush(s, q, total, distant)
            for c in range(width):
                parts[number, 0, first + c] = total[c]
                parts[number, 1, first + c] = distant[c]
            done += 1
        if done > 0 and add_to_slot(p, DONE, done) == tasks:
            merge_sums(p, zero, parts, channels)

    return kernel


def derive(build: int, act: int, adds: int) -> Any:
    """Return the kernel of dx, and of the residual's gradient where it is asked for."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, dx = pointer(p, X), pointer(p, DY), pointer(p, DX)
        residual, dresidual, keeps = pointer(p, RESIDUAL), pointer(p, DRESIDUAL), slot(p, DRESIDUAL)
        channels, tasks = slot(p, CHANNELS), slot(p, STRIPS) * slot(p, BLOCKS)
        coefficients = carray(parameters(p, AFFINE), (3, channels))
        zero = like(get(x, 0), 0)
        while True:
            task = tasks - 1 - take(p, NEXT)
            if task < 0:
                break
            first, width, _, rows, start = block(p, task)
            mean, scale, shift = affines(p, zero, first, width)
            gains, slopes, offsets = coefficients[0, first:], coefficients[1, first:], coefficients[2, first:]
            if adds != 0 and keeps != 0:
                for i in range(start, start + rows * channels, channels):
                    for c in range(width):
                        t = get(x, i + c) - of(mean, c)
                        d = gradient(act, adds, x, dy, residual, i + c, t, of(scale, c), of(shift, c))
                        put(dresidual, i + c, d)
                        put(dx, i + c, fused(of(gains, c), d, fused(of(slopes, c), t, of(offsets, c))))
            else:
                many = rows - rows % 2
                for i in range(start, start + many * channels, 2 * channels):
                    for c in range(width):
                        for k in range(2):
                            j = i + k * channels + c
                            t = get(x, j) - of(mean, c)
                            d = gradient(act, adds, x, dy, residual, j, t, of(scale, c), of(shift, c))
                            put(dx, j, fused(of(gains, c), d, fused(of(slopes, c), t, of(offsets, c))))
                for i in range(start + many * channels, start + rows * channels, channels):
                    for c in range(width):
                        t = get(x, i + c) - of(mean, c)
                        d = gradient(act, adds, x, dy, residual, i + c, t, of(scale, c), of(shift, c))
                        put(dx, i + c, fused(of(gains, c), d, fused(of(slopes, c), t, of(offsets, c))))

    return kernel
