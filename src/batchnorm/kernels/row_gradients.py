"""Kernels of the gradients for rows: the sums of blocks are added, and dx follows in a second run."""

from typing import Any

import numpy as np
from numba import carray, njit

from batchnorm.kernels.arguments import (
    AFFINE,
    BLOCKS,
    BUILD,
    CHANNELS,
    DONE,
    DRESIDUAL,
    DX,
    DY,
    NEXT,
    PARTS,
    PLACES,
    RESIDUAL,
    SAMPLES,
    STRIPS,
    X,
)
from batchnorm.kernels.planes import SUMS, centred, gradient
from batchnorm.kernels.rows import TILE, affines, block, flush, spread
from batchnorm.kernels.scalars import (
    add_to,
    add_to_slot,
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
from batchnorm.kernels.statistics import backward_affine

__all__ = ["derive", "sums"]


@njit(forceinline=True, fastmath=SUMS, error_model="numpy")
def gradient_sums(
    act: int,
    adds: int,
    x: Any,
    dy: Any,
    residual: Any,
    start: int,
    rows: int,
    stride: int,
    affine: Any,
    s: Any,
    q: Any,
) -> None:
    """Add the sums of d and of d · (x - mean) of some rows to s and q."""
    mean, scale, shift = affine
    many = rows - rows % 4
    for i in range(start, start + many * stride, 4 * stride):
        for c in range(len(s)):
            plain, distant = like(mean[0], 0), like(mean[0], 0)
            for k in range(4):
                j = i + k * stride + c
                t = centred(x, j, of(mean, c))
                d = gradient(act, adds, x, dy, residual, j, t, of(scale, c), of(shift, c))
                plain += d
                distant += d * t
            add_to(s, c, plain)
            add_to(q, c, distant)
    for i in range(start + many * stride, start + rows * stride, stride):
        for c in range(len(s)):
            t = centred(x, i + c, of(mean, c))
            d = gradient(act, adds, x, dy, residual, i + c, t, of(scale, c), of(shift, c))
            add_to(s, c, d)
            add_to(q, c, d * t)


@njit(error_model="numpy")
def merge_sums(p: Any, zero: Any, parts: Any, channels: int) -> None:
    """Add the sums of the blocks, in their order, and write a, b and c of every channel."""
    affine = parameters(p, AFFINE)
    for c in range(channels):
        plain, distant = 0.0, 0.0
        for b in range(parts.shape[0]):
            plain += parts[b, 0, c]
            distant += parts[b, 1, c]
        found = backward_affine(p, zero, c, slot(p, SAMPLES) * slot(p, PLACES), plain, distant)
        affine[c], affine[channels + c], affine[2 * channels + c] = found


def sums(build: int, act: int, adds: int) -> Any:
    """Return the kernel of dγ and dβ: the sums of each block, added by the thread that ends last."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, residual = pointer(p, X), pointer(p, DY), pointer(p, RESIDUAL)
        channels, places, tasks = slot(p, CHANNELS), slot(p, PLACES), slot(p, STRIPS) * slot(p, BLOCKS)
        stride = channels * places
        parts = carray(reals(p, PARTS), (slot(p, BLOCKS), 2, channels))
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, width, number, rows, start = block(p, task)
            affine = affines(p, zero, first, width, places)
            total, distant = parts[number, 0, first : first + width], parts[number, 1, first : first + width]
            total[:] = 0
            distant[:] = 0
            s, q = np.zeros_like(affine[0]), np.zeros_like(affine[0])
            for tile in range(0, rows, TILE):
                here, many = start + tile * stride, min(TILE, rows - tile)
                gradient_sums(act, adds, x, dy, residual, here, many, stride, affine, s, q)
                flush(s, places, total)
                flush(q, places, distant)
            done += 1
        if done > 0 and add_to_slot(p, DONE, done) == tasks:
            merge_sums(p, zero, parts, channels)

    return kernel


@njit(forceinline=True, error_model="numpy")
def derive_rows(
    act: int,
    adds: int,
    x: Any,
    dy: Any,
    residual: Any,
    dx: Any,
    start: int,
    rows: int,
    stride: int,
    affine: Any,
    steps: Any,
) -> None:
    """Write dx of some rows."""
    mean, scale, shift = affine
    gains, slopes, offsets = steps
    many = rows - rows % 2
    for i in range(start, start + many * stride, 2 * stride):
        for c in range(len(mean)):
            for k in range(2):
                j = i + k * stride + c
                t = get(x, j) - of(mean, c)
                d = gradient(act, adds, x, dy, residual, j, t, of(scale, c), of(shift, c))
                put(dx, j, fused(of(gains, c), d, fused(of(slopes, c), t, of(offsets, c))))
    for i in range(start + many * stride, start + rows * stride, stride):
        for c in range(len(mean)):
            t = get(x, i + c) - of(mean, c)
            d = gradient(act, adds, x, dy, residual, i + c, t, of(scale, c), of(shift, c))
            put(dx, i + c, fused(of(gains, c), d, fused(of(slopes, c), t, of(offsets, c))))


@njit(forceinline=True, error_model="numpy")
def derive_both(
    act: int, adds: int, x: Any, dy: Any, residual: Any, dx: Any, dresidual: Any, start: int, rows: int, stride: int,
    affine: Any, steps: Any,
) -> None:  # fmt: skip
    """Write dx of some rows, and the residual's gradient."""
    mean, scale, shift = affine
    gains, slopes, offsets = steps
    for i in range(start, start + rows * stride, stride):
        for c in range(len(mean)):
            t = get(x, i + c) - of(mean, c)
            d = gradient(act, adds, x, dy, residual, i + c, t, of(scale, c), of(shift, c))
            put(dresidual, i + c, d)
            put(dx, i + c, fused(of(gains, c), d, fused(of(slopes, c), t, of(offsets, c))))


@njit(error_model="numpy")
def steps_of(coefficients: Any, first: int, width: int, places: int, like_these: Any) -> Any:
    """Return a, b and c of ``dx = a·d + b·(x - mean) + c`` for each column of a strip."""
    a, b, c = np.empty_like(like_these), np.empty_like(like_these), np.empty_like(like_these)
    spread(coefficients[0, first : first + width], places, a)
    spread(coefficients[1, first : first + width], places, b)
    spread(coefficients[2, first : first + width], places, c)
    return a, b, c


def derive(build: int, act: int, adds: int) -> Any:
    """Return the kernel of dx, and of the residual's gradient where it is asked for."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, dx = pointer(p, X), pointer(p, DY), pointer(p, DX)
        residual, dresidual, keeps = pointer(p, RESIDUAL), pointer(p, DRESIDUAL), slot(p, DRESIDUAL)
        channels, places, tasks = slot(p, CHANNELS), slot(p, PLACES), slot(p, STRIPS) * slot(p, BLOCKS)
        stride = channels * places
        coefficients = carray(parameters(p, AFFINE), (3, channels))
        zero = like(get(x, 0), 0)
        while True:
            task = tasks - 1 - take(p, NEXT)
            if task < 0:
                break
            first, width, _, rows, start = block(p, task)
            affine = affines(p, zero, first, width, places)
            steps = steps_of(coefficients, first, width, places, affine[0])
            if adds != 0 and keeps != 0:
                derive_both(act, adds, x, dy, residual, dx, dresidual, start, rows, stride, affine, steps)
            else:
                derive_rows(act, adds, x, dy, residual, dx, start, rows, stride, affine, steps)

    return kernel
