"""Kernels for ``(N, C)`` and channels-last: rows of channels, in strips that stay in the cache, or in blocks that are merged.

Where a strip of channels fits into the cache with all its rows, one task does everything for it. Otherwise blocks of rows are
measured by themselves, whoever ends last merges them, and a second run over the blocks normalizes.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from batchnorm.kernels.activations import activate
from batchnorm.kernels.arguments import (
    AFFINE, BLOCKS, CHANNELS, DERIVE, DONE, DRESIDUAL, DX, DY, FIXED, HEIGHT, NEXT, PARTS, PHASE, RESIDUAL, SAMPLES, STRIPS, WIDTH,
    X, Y,
)  # fmt: skip
from batchnorm.kernels.planes import FAR, SUMS, centred, gradient
from batchnorm.kernels.scalars import add_to_slot, fused, get, like, parameters, pointer, put, reals, slot, take
from batchnorm.kernels.statistics import affine_of, backward_affine, keep, move_running

__all__ = ["ALL", "APPLY", "SUM", "backward", "forward"]

# what a run does: everything for each strip, the sums of each block, or what follows from them
ALL, SUM, APPLY = 0, 1, 2
# rows that are added in float32 before their sum is added in float64
TILE = 128
# rows whose mean is the first estimate
FIRST = 16


@njit(fastmath=SUMS)
def distances(x: Any, start: int, rows: int, channels: int, width: int, mean: Any, s: Any, q: Any) -> None:
    """Add the distances of some rows from a mean, and their squares, to s and q."""
    i, end = start, start + rows * channels
    while i + 3 * channels < end:
        j, k, m = i + channels, i + 2 * channels, i + 3 * channels
        for c in range(width):
            t0, t1 = centred(x, i + c, mean[c]), centred(x, j + c, mean[c])
            t2, t3 = centred(x, k + c, mean[c]), centred(x, m + c, mean[c])
            s[c] += (t0 + t1) + (t2 + t3)
            q[c] += (t0 * t0 + t1 * t1) + (t2 * t2 + t3 * t3)
        i += 4 * channels
    while i < end:
        for c in range(width):
            t = centred(x, i + c, mean[c])
            s[c] += t
            q[c] += t * t
        i += channels


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
    width = len(mean)
    s, q = np.zeros_like(mean), np.zeros_like(mean)
    total[:] = 0
    squares[:] = 0
    for tile in range(0, rows, TILE):
        distances(x, start + tile * channels, min(TILE, rows - tile), channels, width, mean, s, q)
        flush(s, q, total, squares)


@njit
def measure(x: Any, start: int, rows: int, channels: int, mean: Any, total: Any, m2: Any) -> None:
    """Find the means of a strip, as ``mean + total``, and its m2."""
    width, first = len(mean), min(rows, FIRST)
    mean[:] = 0
    around(x, start, first, channels, mean, total, m2)
    for c in range(width):
        mean[c] = total[c] / first
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
            mean[c] += total[c]


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


def forward(act: int, adds: int) -> Any:
    """Return the kernel ``y = activation(normalize(x) + residual)``."""

    def kernel(p: Any) -> None:
        x, y, residual = pointer(p, X), pointer(p, Y), pointer(p, RESIDUAL)
        rows, channels, height, strips = slot(p, SAMPLES), slot(p, CHANNELS), slot(p, HEIGHT), slot(p, STRIPS)
        phase, tasks = slot(p, PHASE), strips * slot(p, BLOCKS)
        parts = carray(reals(p, PARTS), (slot(p, BLOCKS), 2, channels))
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, top = (task % strips) * slot(p, WIDTH), (task // strips) * height
            width, here = min(slot(p, WIDTH), channels - first), min(height, rows - top)
            start = top * channels + first
            if phase != APPLY:
                mean = np.empty(width, np.asarray(zero).dtype)
                total, m2 = np.empty(width), np.empty(width)
                measure(x, start, here, channels, mean, total, m2)
                for c in range(width):
                    if phase == ALL:
                        keep(p, first + c, rows, mean[c] + total[c], m2[c])
                    else:
                        parts[task // strips, 0, first + c] = mean[c] + total[c]
                        parts[task // strips, 1, first + c] = m2[c]
            if phase != SUM:
                mean, scale, shift = affines(p, zero, first, width)
                for i in range(start, start + here * channels, channels):
                    for c in range(width):
                        z = fused(get(x, i + c) - mean[c], scale[c], shift[c])
                        if adds != 0:
                            z = z + get(residual, i + c)
                        put(y, i + c, activate(act, z))
            done += 1
        if done > 0 and phase != APPLY and add_to_slot(p, DONE, done) == tasks:
            if phase == SUM:
                merge(p, parts)
            move_running(p, rows)

    return kernel


@njit(forceinline=True, fastmath=SUMS)
def gradient_sums(
    act: int, adds: int, x: Any, dy: Any, residual: Any, start: int, rows: int, channels: int, affine: Any, s: Any, q: Any
) -> None:
    """Add the sums of d and of d · (x - mean) of some rows to s and q."""
    mean, scale, shift = affine
    for i in range(start, start + rows * channels, channels):
        for c in range(len(s)):
            t = centred(x, i + c, mean[c])
            d = gradient(act, adds, x, dy, residual, i + c, t, scale[c], shift[c])
            s[c] += d
            q[c] += d * t


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


def backward(act: int, adds: int) -> Any:
    """Return the kernel of the gradients; ``adds`` is 1 where ``residual`` was added, 2 where it holds the output."""

    def kernel(p: Any) -> None:
        x, dy, dx = pointer(p, X), pointer(p, DY), pointer(p, DX)
        residual, dresidual, keeps = pointer(p, RESIDUAL), pointer(p, DRESIDUAL), slot(p, DRESIDUAL)
        rows, channels, height, strips = slot(p, SAMPLES), slot(p, CHANNELS), slot(p, HEIGHT), slot(p, STRIPS)
        phase, tasks = slot(p, PHASE), strips * slot(p, BLOCKS)
        parts = carray(reals(p, PARTS), (slot(p, BLOCKS), 2, channels))
        coefficients = carray(parameters(p, AFFINE), (3, channels))
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, top = (task % strips) * slot(p, WIDTH), (task // strips) * height
            width, here = min(slot(p, WIDTH), channels - first), min(height, rows - top)
            start = top * channels + first
            affine = affines(p, zero, first, width)
            mean, scale, shift = affine
            if phase != APPLY:
                total, squares = np.zeros(width), np.zeros(width)
                s, q = np.zeros_like(mean), np.zeros_like(mean)
                for tile in range(0, here, TILE):
                    gradient_sums(
                        act, adds, x, dy, residual, start + tile * channels, min(TILE, here - tile), channels, affine, s, q
                    )
                    flush(s, q, total, squares)
                for c in range(width):
                    if phase == ALL:
                        a0, b0, c0 = backward_affine(p, zero, first + c, rows, total[c], squares[c])
                        coefficients[0, first + c] = a0
                        coefficients[1, first + c] = b0
                        coefficients[2, first + c] = c0
                    else:
                        parts[task // strips, 0, first + c] = total[c]
                        parts[task // strips, 1, first + c] = squares[c]
            if phase != SUM and slot(p, DERIVE) != 0:
                slopes, offsets = coefficients[1, first:], coefficients[2, first:]
                gains = coefficients[0, first:]
                if adds != 0 and keeps != 0:
                    for i in range(start, start + here * channels, channels):
                        for c in range(width):
                            t = get(x, i + c) - mean[c]
                            d = gradient(act, adds, x, dy, residual, i + c, t, scale[c], shift[c])
                            put(dresidual, i + c, d)
                            put(dx, i + c, fused(gains[c], d, fused(slopes[c], t, offsets[c])))
                else:
                    for i in range(start, start + here * channels, channels):
                        for c in range(width):
                            t = get(x, i + c) - mean[c]
                            d = gradient(act, adds, x, dy, residual, i + c, t, scale[c], shift[c])
                            put(dx, i + c, fused(gains[c], d, fused(slopes[c], t, offsets[c])))
            done += 1
        if done > 0 and phase == SUM and add_to_slot(p, DONE, done) == tasks:
            merge_sums(p, zero, parts, channels)

    return kernel
