"""Kernels for rows: blocks of them are added up, and when all are, they are normalized in a second reading.

A row of ``(N, C)`` or channels-last holds each channel once. A sample of ``(N, C, *spatial)`` is a row too, in which each
channel has as many columns as there are places: so are small planes treated, whose runs would be too short to be quick.

A strip is as many channels as a task takes. All blocks of a strip are added up around the same estimate of the mean.
"""

from typing import Any

from numba import njit

from batchnorm.kernels import strips
from batchnorm.kernels.arguments import (
    AFFINE,
    AGAIN,
    BLOCKS,
    BUILD,
    CHANNELS,
    DERIVE,
    DONE,
    DONE_AGAIN,
    DRESIDUAL,
    DX,
    DY,
    FIXED,
    HEIGHT,
    MEAN,
    NEXT,
    NEXT_AGAIN,
    NEXT_OUTPUT,
    PARTS,
    PAST_CACHE,
    PLACES,
    READY,
    RESIDUAL,
    SAMPLES,
    STRIPS,
    WIDTH,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.scalars import (
    add_to_slot,
    after,
    cleared,
    coarse,
    like,
    parameters,
    pointer,
    reals,
    scratch,
    set_slot,
    settle,
    slot,
    small,
    take,
    wait_for,
    zero_of,
)
from batchnorm.kernels.statistics import affine_of, backward_affine, is_far, keep, move_running, rest_of

__all__ = ["TILE", "WIDEST", "backward", "forward"]

# columns of a strip, at most
WIDEST = 1024
# rows that are added in float32 before their sum is added in float64
TILE = 64
# values, at least, whose mean is the first estimate
FIRST = 16
NUMBERS = WIDEST + 8


@njit(error_model="numpy")
def strip_of(p: Any, task: int) -> Any:
    """Return what a task is about: its strip's first channel and width, its block, number of rows, and first element."""
    blocks, height = slot(p, BLOCKS), slot(p, HEIGHT)
    first, block = (task // blocks) * slot(p, WIDTH), task % blocks
    top = block * height
    width = min(slot(p, WIDTH), slot(p, CHANNELS) - first)
    start = (top * slot(p, CHANNELS) + first) * slot(p, PLACES)
    return first, width, block, min(height, slot(p, SAMPLES) - top), start


@njit(error_model="numpy")
def sums_of(p: Any, block: int, first: int, width: int) -> Any:
    """Return where the two sums of a block are, from channel 0 on, those of a strip being 0."""
    plain = after(reals(p, PARTS), 2 * block * slot(p, CHANNELS))
    second = after(plain, slot(p, CHANNELS))
    cleared(after(plain, first), width)
    cleared(after(second, first), width)
    return plain, second


@njit(error_model="numpy")
def estimate(p: Any, x: Any, first: int, width: int, found: Any, mean: Any, s: Any, q: Any) -> None:
    """Write the means of some rows, which are spread over the batch, as a first estimate for each channel of a strip."""
    small()
    places = slot(p, PLACES)
    columns, stride = width * places, slot(p, CHANNELS) * places
    rows = min(slot(p, SAMPLES), 1 + (FIRST - 1) // places)
    cleared(mean, strips.slots(columns))
    apart = slot(p, SAMPLES) // rows * stride
    strips.add_distances(x, first * places, rows, apart, columns, mean, s, q)
    cleared(found, width)
    strips.flush(s, width, places, found, 0)
    cleared(q, strips.slots(columns))
    for c in range(width):
        found[c] = coarse(x, like(mean[0], found[c] / (rows * places)))


@njit(error_model="numpy")
def measure(p: Any, x: Any, counter: int, total: int, again: bool) -> bool:
    """Add up blocks until none is left; ``True`` for the thread that ends last."""
    places, channels, tasks = slot(p, PLACES), slot(p, CHANNELS), slot(p, STRIPS) * slot(p, BLOCKS)
    stride = channels * places
    mean, s, q, about = scratch(x, NUMBERS), scratch(x, NUMBERS), scratch(x, NUMBERS), scratch(x, WIDEST)
    cleared(s, NUMBERS)
    cleared(q, NUMBERS)
    known, done = -1, 0
    while True:
        task = take(p, counter)
        if task >= tasks:
            break
        first, width, block, rows, start = strip_of(p, task)
        if first != known:
            if again:
                for c in range(width):
                    about[c] = coarse(x, like(about[0], reals(p, MEAN)[first + c]))
            else:
                estimate(p, x, first, width, about, mean, s, q)
            strips.spread(about, 0, width, places, mean)
            known = first
        if block == 0:
            for c in range(width):
                reals(p, AFFINE)[first + c] = about[c]
        plain, squares = sums_of(p, block, first, width)
        for tile in range(0, rows, TILE):
            some = min(TILE, rows - tile)
            strips.add_distances(x, start + tile * stride, some, stride, width * places, mean, s, q)
            strips.flush(s, width, places, plain, first)
            strips.flush(q, width, places, squares, first)
        done += 1
    return done > 0 and add_to_slot(p, total, done) == tasks


@njit(error_model="numpy")
def added_blocks(p: Any) -> Any:
    """Return the two sums of every channel, those of the blocks added in their order."""
    channels, parts = slot(p, CHANNELS), reals(p, PARTS)
    for b in range(1, slot(p, BLOCKS)):
        part = after(parts, 2 * b * channels)
        for c in range(2 * channels):
            parts[c] += part[c]
    return parts


@njit(error_model="numpy")
def merge(p: Any) -> bool:
    """Write what the sums of the blocks say of every channel; ``True`` if an estimate lay far off."""
    small()
    channels, count = slot(p, CHANNELS), slot(p, SAMPLES) * slot(p, PLACES)
    parts, about = added_blocks(p), reals(p, AFFINE)
    far = False
    for c in range(channels):
        rest, m2 = rest_of(parts[c], parts[channels + c], count)
        far = far or is_far(rest, m2, count)
        keep(p, c, count, about[c] + rest, m2)
    return far


@njit(error_model="numpy")
def measured(p: Any, x: Any) -> None:
    """Measure all channels, and move the running statistics; ends in all threads when it is done."""
    if measure(p, x, NEXT, DONE, False):
        far = merge(p)
        if not far:
            move_running(p, slot(p, SAMPLES) * slot(p, PLACES))
        set_slot(p, AGAIN, 1 if far else 0)
        add_to_slot(p, READY, 1)
    wait_for(p, READY, 1)
    if slot(p, AGAIN) != 0:
        if measure(p, x, NEXT_AGAIN, DONE_AGAIN, True):
            merge(p)
            move_running(p, slot(p, SAMPLES) * slot(p, PLACES))
            add_to_slot(p, READY, 1)
        wait_for(p, READY, 2)


@njit(error_model="numpy")
def affines(
    p: Any, x: Any, known: int, first: int, width: int, channels: Any, mean: Any, scale: Any, shift: Any
) -> int:
    """Write mean, scale and shift of each column of a strip, unless they are known; ``channels`` is scratch."""
    small()
    if first == known:
        return first
    places = slot(p, PLACES)
    scales, shifts = after(channels, WIDEST), after(channels, 2 * WIDEST)
    for c in range(width):
        channels[c], scales[c], shifts[c] = affine_of(p, zero_of(x), first + c)
    strips.spread(channels, 0, width, places, mean)
    strips.spread(scales, 0, width, places, scale)
    strips.spread(shifts, 0, width, places, shift)
    return first


@njit(error_model="numpy")
def steps(p: Any, known: int, first: int, width: int, a: Any, b: Any, c: Any) -> int:
    """Write a, b and c of ``dx = a · d + b · (x - mean) + c`` for each column of a strip, unless they are known."""
    small()
    if first == known:
        return first
    found, places, channels = parameters(p, AFFINE), slot(p, PLACES), slot(p, CHANNELS)
    strips.spread(found, first, width, places, a)
    strips.spread(found, channels + first, width, places, b)
    strips.spread(found, 2 * channels + first, width, places, c)
    return first


AFFINES = 3 * WIDEST


def forward(build: int, act: int, adds: int) -> Any:
    """Return the kernel ``y = activation(normalize(x) + residual)``."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, y, residual = pointer(p, X), pointer(p, Y), pointer(p, RESIDUAL)
        if slot(p, FIXED) == 0:
            measured(p, x)
        places, tasks = slot(p, PLACES), slot(p, STRIPS) * slot(p, BLOCKS)
        mean, scale, shift = scratch(x, NUMBERS), scratch(x, NUMBERS), scratch(x, NUMBERS)
        channels, past_cache, known = scratch(x, AFFINES), slot(p, PAST_CACHE), -1
        while True:
            # what was read last is in the cache still
            task = tasks - 1 - take(p, NEXT_OUTPUT)
            if task < 0:
                break
            first, width, _, rows, start = strip_of(p, task)
            known = affines(p, x, known, first, width, channels, mean, scale, shift)
            stride, columns = slot(p, CHANNELS) * places, width * places
            strips.write_outputs(
                act, adds, x, y, residual, start, rows, stride, columns, mean, scale, shift, past_cache
            )
        settle()

    return kernel


@njit(error_model="numpy")
def merge_gradients(p: Any, x: Any) -> None:
    """Write what the sums of the blocks say of every channel: dγ and dβ, and a, b and c."""
    small()
    channels, count = slot(p, CHANNELS), slot(p, SAMPLES) * slot(p, PLACES)
    parts, affine = added_blocks(p), parameters(p, AFFINE)
    for c in range(channels):
        found = backward_affine(p, zero_of(x), c, count, parts[c], parts[channels + c])
        affine[c], affine[channels + c], affine[2 * channels + c] = found


def backward(build: int, act: int, adds: int) -> Any:
    """Return the kernel of the gradients; ``adds`` is 1 where ``residual`` was added, 2 where it holds the output."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, dx = pointer(p, X), pointer(p, DY), pointer(p, DX)
        residual, dresidual = pointer(p, RESIDUAL), pointer(p, DRESIDUAL)
        places, channels, tasks = slot(p, PLACES), slot(p, CHANNELS), slot(p, STRIPS) * slot(p, BLOCKS)
        stride = channels * places
        mean, scale, shift = scratch(x, NUMBERS), scratch(x, NUMBERS), scratch(x, NUMBERS)
        a, b, c = scratch(x, NUMBERS), scratch(x, NUMBERS), scratch(x, NUMBERS)
        numbers = scratch(x, AFFINES)
        # a and b are where the sums are before
        cleared(a, NUMBERS)
        cleared(b, NUMBERS)
        known, done = -1, 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            first, width, block, rows, start = strip_of(p, task)
            columns = width * places
            known = affines(p, x, known, first, width, numbers, mean, scale, shift)
            plain, distant = sums_of(p, block, first, width)
            for tile in range(0, rows, TILE):
                here, some = start + tile * stride, min(TILE, rows - tile)
                strips.add_gradients(act, adds, x, dy, residual, here, some, stride, columns, mean, scale, shift, a, b)
                strips.flush(a, width, places, plain, first)
                strips.flush(b, width, places, distant, first)
            done += 1
        if done > 0 and add_to_slot(p, DONE, done) == tasks:
            merge_gradients(p, x)
            add_to_slot(p, READY, 1)
        wait_for(p, READY, 1)
        past_cache, written = slot(p, PAST_CACHE), -1
        while slot(p, DERIVE) != 0:
            task = tasks - 1 - take(p, NEXT_OUTPUT)
            if task < 0:
                break
            first, width, block, rows, start = strip_of(p, task)
            known = affines(p, x, known, first, width, numbers, mean, scale, shift)
            written = steps(p, written, first, width, a, b, c)
            strips.write_gradients(
                act, adds, x, dy, residual, dx, dresidual, start, rows, stride, width * places,
                mean, scale, shift, a, b, c, past_cache,
            )  # fmt: skip
        settle()

    return kernel
