"""Kernels for contiguous ``(N, C, *spatial)``: one channel at a time, so that its second reading comes from the cache."""

from typing import Any

from numba import njit

from batchnorm.kernels.activations import activate, slope, slope_by_output
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
    PLACES,
    RESIDUAL,
    SAMPLES,
    X,
    Y,
)  # fmt: skip
from batchnorm.kernels.scalars import add_to_slot, coarse, fused, get, like, pointer, put, slot, take
from batchnorm.kernels.statistics import affine_of, backward_affine, keep, move_running

__all__ = ["SUMS", "backward", "forward"]

# values that are added in float32 before their sum is added in float64
CHUNK = 2048
# sums are of distances from a first estimate of the mean; further off than this, in deviations, and they are taken again
FAR = 4.0
SUMS = {"reassoc", "contract", "nsz"}


@njit(forceinline=True, error_model="numpy")
def centred(x: Any, index: int, mean: Any) -> Any:
    """Return an element's distance from a mean, which must not be reordered: the distance is small, both are not."""
    return get(x, index) - mean


@njit(fastmath=SUMS, error_model="numpy")
def distances(x: Any, start: int, stop: int, mean: Any) -> Any:
    """Return the sums of the distances from a mean and of their squares, over elements that lie side by side."""
    total, squares = 0.0, 0.0
    while start < stop:
        end = min(start + CHUNK, stop)
        s, q = like(mean, 0), like(mean, 0)
        for i in range(start, end):
            t = centred(x, i, mean)
            s += t
            q += t * t
        total += s
        squares += q
        start = end
    return total, squares


@njit(error_model="numpy")
def around(x: Any, samples: int, stride: int, first: int, places: int, mean: Any) -> Any:
    """Return the rest of a channel's mean, and its m2."""
    total, squares = 0.0, 0.0
    for n in range(samples):
        s, q = distances(x, first + n * stride, first + n * stride + places, mean)
        total += s
        squares += q
    rest = total / (samples * places)
    m2 = squares - total * rest
    return rest, (0.0 if m2 < 0.0 else m2)


@njit(error_model="numpy")
def measure(x: Any, samples: int, stride: int, first: int, places: int) -> Any:
    """Return mean and m2 of a channel."""
    zero = like(get(x, first), 0)
    known = min(places, CHUNK)
    near, _ = distances(x, first, first + known, zero)
    mean = coarse(x, like(zero, near / known))
    rest, m2 = around(x, samples, stride, first, places, mean)
    if rest * rest * (samples * places) > FAR * FAR * m2:
        mean = coarse(x, like(zero, mean + rest))
        rest, m2 = around(x, samples, stride, first, places, mean)
    return mean + rest, m2


def forward(build: int, act: int, adds: int) -> Any:
    """Return the kernel ``y = activation(normalize(x) + residual)``."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, y, residual = pointer(p, X), pointer(p, Y), pointer(p, RESIDUAL)
        samples, channels, places = slot(p, SAMPLES), slot(p, CHANNELS), slot(p, PLACES)
        count, stride, fixed = samples * places, channels * places, slot(p, FIXED)
        zero = like(get(x, 0), 0)
        done = 0
        while True:
            channel = take(p, NEXT)
            if channel >= channels:
                break
            first = channel * places
            if fixed == 0:
                mean, m2 = measure(x, samples, stride, first, places)
                keep(p, channel, count, mean, m2)
            centre, scale, shift = affine_of(p, zero, channel)
            for n in range(samples):
                start = first + n * stride
                for i in range(start, start + places):
                    z = fused(get(x, i) - centre, scale, shift)
                    if adds != 0:
                        z = z + get(residual, i)
                    put(y, i, activate(act, z))
            done += 1
        if done > 0 and fixed == 0 and add_to_slot(p, DONE, done) == channels:
            move_running(p, count)

    return kernel


@njit(forceinline=True, error_model="numpy")
def gradient(act: int, adds: int, x: Any, dy: Any, residual: Any, i: int, t: Any, scale: Any, shift: Any) -> Any:
    """Return the gradient before the activation."""
    if act == 0:
        return get(dy, i)
    if adds == 2:
        return get(dy, i) * slope_by_output(act, get(residual, i))
    z = fused(t, scale, shift)
    if adds == 1:
        z = z + get(residual, i)
    return get(dy, i) * slope(act, z)


@njit(forceinline=True, fastmath=SUMS, error_model="numpy")
def gradient_sums(act: int, adds: int, x: Any, dy: Any, residual: Any, start: int, stop: int, affine: Any) -> Any:
    """Return the sums of d and of d · (x - mean), over elements that lie side by side."""
    centre, scale, shift = affine
    plain, distant = 0.0, 0.0
    while start < stop:
        end = min(start + CHUNK, stop)
        s, q = like(centre, 0), like(centre, 0)
        for i in range(start, end):
            t = centred(x, i, centre)
            d = gradient(act, adds, x, dy, residual, i, t, scale, shift)
            s += d
            q += d * t
        plain += s
        distant += q
        start = end
    return plain, distant


def backward(build: int, act: int, adds: int) -> Any:
    """Return the kernel of the gradients; ``adds`` is 1 where ``residual`` was added, 2 where it holds the output."""

    def kernel(p: Any) -> None:
        if slot(p, BUILD) != build:
            return
        x, dy, dx = pointer(p, X), pointer(p, DY), pointer(p, DX)
        residual, dresidual = pointer(p, RESIDUAL), pointer(p, DRESIDUAL)
        samples, channels, places = slot(p, SAMPLES), slot(p, CHANNELS), slot(p, PLACES)
        stride, derive, keeps = channels * places, slot(p, DERIVE), slot(p, DRESIDUAL)
        zero = like(get(x, 0), 0)
        while True:
            channel = take(p, NEXT)
            if channel >= channels:
                break
            first = channel * places
            affine = affine_of(p, zero, channel)
            centre, scale, shift = affine
            plain, distant = 0.0, 0.0
            for n in range(samples):
                start = first + n * stride
                s, q = gradient_sums(act, adds, x, dy, residual, start, start + places, affine)
                plain += s
                distant += q
            a, b, c = backward_affine(p, zero, channel, samples * places, plain, distant)
            for n in range(samples if derive != 0 else 0):
                start = first + n * stride
                if adds != 0 and keeps != 0:
                    for i in range(start, start + places):
                        t = get(x, i) - centre
                        d = gradient(act, adds, x, dy, residual, i, t, scale, shift)
                        put(dresidual, i, d)
                        put(dx, i, fused(a, d, fused(b, t, c)))
                else:
                    for i in range(start, start + places):
                        t = get(x, i) - centre
                        d = gradient(act, adds, x, dy, residual, i, t, scale, shift)
                        put(dx, i, fused(a, d, fused(b, t, c)))

    return kernel
