"""Kernels for contiguous ``(N, C, *spatial)``: a few channels at a time, so that their second reading comes from the cache."""

from typing import Any

from numba import njit

from batchnorm.kernels.arguments import (
    BUILD,
    CHANNELS,
    DERIVE,
    DONE,
    DRESIDUAL,
    DX,
    DY,
    FIXED,
    NEXT,
    PAST_CACHE,
    PLACES,
    RESIDUAL,
    SAMPLES,
    STRIPS,
    WIDTH,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.runs import CHUNK, add_distances, add_gradients, ask_for, write_gradients, write_outputs
from batchnorm.kernels.scalars import (
    add_to_slot,
    after,
    cleared,
    coarse,
    like,
    pointer,
    scratch,
    scratch_reals,
    settle,
    slot,
    small,
    take,
    zero_of,
)
from batchnorm.kernels.statistics import affine_of, backward_affine, is_far, keep, move_running, rest_of

__all__ = ["MOST", "backward", "forward"]

# channels of a task, at most
MOST = 128
# eight lanes of two sums each
TOTALS = 16 * MOST
# mean, scale and shift
AFFINES = 3 * MOST


@njit(error_model="numpy")
def total(totals: Any, first: int) -> float:
    """Return the sum of eight lanes."""
    found = 0.0
    for i in range(first, first + 8):
        found += totals[i]
    return found


@njit(error_model="numpy")
def around(x: Any, samples: int, stride: int, first: int, places: int, channels: int, means: Any, totals: Any) -> None:
    """Add up the distances of some channels from a mean of each, in the order that they lie in memory."""
    cleared(totals, 16 * channels)
    for n in range(samples):
        ask_for(x, first + (n + 1) * stride)
        for c in range(channels):
            start = first + n * stride + c * places
            add_distances(x, start, places, means[c], after(totals, 16 * c))


@njit(error_model="numpy")
def sums_of(totals: Any, channel: int) -> Any:
    """Return the two sums of a channel."""
    return total(totals, 16 * channel), total(totals, 16 * channel + 8)


@njit(error_model="numpy")
def three(numbers: Any, channel: int) -> Any:
    """Return the three numbers of a channel."""
    return numbers[3 * channel], numbers[3 * channel + 1], numbers[3 * channel + 2]


@njit(error_model="numpy")
def measure(p: Any, x: Any, channel: int, channels: int, means: Any, totals: Any) -> None:
    """Find mean and m2 of some channels: sums of distances from an estimate, taken again where that is far off."""
    samples, places = slot(p, SAMPLES), slot(p, PLACES)
    stride, first, count = slot(p, CHANNELS) * places, channel * places, samples * places
    zero = zero_of(x)
    known = min(places, CHUNK)
    cleared(totals, 16 * channels)
    for c in range(channels):
        start = first + c * places
        add_distances(x, start, known, zero, after(totals, 16 * c))
        means[c] = coarse(x, like(zero, total(totals, 16 * c) / known))
    around(x, samples, stride, first, places, channels, means, totals)
    for c in range(channels):
        rest, m2 = rest_of(*sums_of(totals, c), count)
        mean = means[c]
        if is_far(rest, m2, count):
            mean = coarse(x, like(zero, mean + rest))
            means[0] = mean
            here = after(totals, 16 * c)
            around(x, samples, stride, first + c * places, places, 1, means, here)
            rest, m2 = rest_of(*sums_of(here, 0), count)
        keep(p, channel + c, count, mean + rest, m2)


@njit(error_model="numpy")
def affines(p: Any, zero: Any, channel: int, channels: int, found: Any) -> None:
    """Write mean, scale and shift of some channels."""
    small()
    for c in range(channels):
        found[3 * c], found[3 * c + 1], found[3 * c + 2] = affine_of(p, zero, channel + c)


def forward(build: int, act: int, adds: int) -> Any:
    """Return the kernel ``y = activation(normalize(x) + residual)``."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, y, residual = pointer(p, X), pointer(p, Y), pointer(p, RESIDUAL)
        samples, channels, places = slot(p, SAMPLES), slot(p, CHANNELS), slot(p, PLACES)
        width, tasks, past_cache = slot(p, WIDTH), slot(p, STRIPS), slot(p, PAST_CACHE)
        totals, means, found = scratch_reals(TOTALS), scratch(p, MOST), scratch(p, AFFINES)
        done = 0
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            channel = task * width
            some = min(width, channels - channel)
            if slot(p, FIXED) == 0:
                measure(p, x, channel, some, means, totals)
            affines(p, zero_of(x), channel, some, found)
            for n in range(samples):
                for c in range(some):
                    start = (n * channels + channel + c) * places
                    write_outputs(act, adds, x, y, residual, start, places, three(found, c), past_cache)
            done += 1
        settle()
        if done > 0 and slot(p, FIXED) == 0 and add_to_slot(p, DONE, done) == tasks:
            move_running(p, samples * places)

    return kernel


def backward(build: int, act: int, adds: int) -> Any:
    """Return the kernel of the gradients; ``adds`` is 1 where ``residual`` was added, 2 where it holds the output."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, dx = pointer(p, X), pointer(p, DY), pointer(p, DX)
        residual, dresidual = pointer(p, RESIDUAL), pointer(p, DRESIDUAL)
        samples, channels, places = slot(p, SAMPLES), slot(p, CHANNELS), slot(p, PLACES)
        width, tasks, past_cache = slot(p, WIDTH), slot(p, STRIPS), slot(p, PAST_CACHE)
        totals, found, steps = scratch_reals(TOTALS), scratch(p, AFFINES), scratch(p, AFFINES)
        while True:
            task = take(p, NEXT)
            if task >= tasks:
                break
            channel = task * width
            some = min(width, channels - channel)
            affines(p, zero_of(x), channel, some, found)
            cleared(totals, 16 * some)
            for n in range(samples):
                following = ((n + 1) * channels + channel) * places
                ask_for(x, following)
                ask_for(dy, following)
                for c in range(some):
                    start = (n * channels + channel + c) * places
                    here = after(totals, 16 * c)
                    add_gradients(act, adds, x, dy, residual, start, places, three(found, c), here)
            for c in range(some):
                plain, distant = sums_of(totals, c)
                step = backward_affine(p, zero_of(x), channel + c, samples * places, plain, distant)
                steps[3 * c], steps[3 * c + 1], steps[3 * c + 2] = step
            for n in range(samples if slot(p, DERIVE) != 0 else 0):
                for c in range(some):
                    start = (n * channels + channel + c) * places
                    affine, step = three(found, c), three(steps, c)
                    write_gradients(act, adds, x, dy, residual, dx, dresidual, start, places, affine, step, past_cache)
        settle()

    return kernel
