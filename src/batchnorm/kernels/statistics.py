"""What a kernel does for each channel, between its passes: from Moments to an Affine, gradients, running statistics."""

import math
from typing import Any

from numba import njit

from batchnorm.kernels.arguments import (
    BATCHES,
    BETA,
    CHANNELS,
    DBETA,
    DGAMMA,
    EPS,
    FINITE,
    FIXED,
    GAMMA,
    M2,
    MEAN,
    MOMENTUM,
    RSTD,
    RUNNING_MEAN,
    RUNNING_VAR,
)  # fmt: skip
from batchnorm.kernels.scalars import count_up, like, parameters, real, reals, set_slot, slot, small

__all__ = ["affine_of", "backward_affine", "is_far", "keep", "move_running", "rest_of"]

# sums are of distances from a first estimate of the mean; further off than this, in deviations, and they are taken again
FAR = 2.0


@njit(error_model="numpy")
def rest_of(plain: float, squares: float, count: int) -> Any:
    """Return what the estimate of a mean lacks, and m2, from the sums of distances and of their squares."""
    rest = plain / count
    m2 = squares - plain * rest
    return rest, (0.0 if m2 < 0.0 else m2)


@njit(error_model="numpy")
def is_far(rest: float, m2: float, count: int) -> bool:
    """Whether an estimate lay so far off that the sums have lost digits."""
    return rest * rest * count > FAR * FAR * m2


@njit(error_model="numpy")
def keep(p: Any, channel: int, count: int, mean: float, m2: float) -> None:
    """Write what was measured of a channel."""
    small()
    reals(p, MEAN)[channel] = mean
    reals(p, M2)[channel] = m2
    reals(p, RSTD)[channel] = 1 / math.sqrt(m2 / count + real(p, EPS))


@njit(error_model="numpy")
def gain(p: Any, channel: int) -> float:
    """Return γ, in float64."""
    return 1.0 if slot(p, GAMMA) == 0 else float(parameters(p, GAMMA)[channel])


@njit(error_model="numpy")
def affine_of(p: Any, zero: Any, channel: int) -> Any:
    """Return mean, scale and shift of ``(x - mean) · scale + shift`` in the type of ``zero``; the shift mends the mean."""
    small()
    exact = reals(p, MEAN)[channel]
    mean = like(zero, exact)
    scale = gain(p, channel) * reals(p, RSTD)[channel]
    offset = 0.0 if slot(p, BETA) == 0 else float(parameters(p, BETA)[channel])
    return mean, like(zero, scale), like(zero, offset - (exact - mean) * scale)


@njit(error_model="numpy")
def backward_affine(p: Any, zero: Any, channel: int, count: int, plain: float, distant: float) -> Any:
    """Return a, b, c of ``dx = a·d + b·(x - mean) + c`` from the sums of d and of d·(x - mean), and write dγ and dβ."""
    small()
    exact, rstd = reals(p, MEAN)[channel], reals(p, RSTD)[channel]
    rest = exact - like(zero, exact)
    distant -= rest * plain
    if slot(p, DGAMMA) != 0:
        parameters(p, DGAMMA)[channel] = like(zero, distant * rstd)
        parameters(p, DBETA)[channel] = like(zero, plain)
    a = gain(p, channel) * rstd
    if slot(p, FIXED) != 0:
        return like(zero, a), like(zero, 0), like(zero, 0)
    b = -a * rstd * rstd * distant / count
    return like(zero, a), like(zero, b), like(zero, -a * plain / count - b * rest)


@njit(error_model="numpy")
def move_running(p: Any, count: int) -> None:
    """Move the running statistics by a step, if everything is finite and stays so; otherwise move nothing, and say so."""
    small()
    mean, m2, momentum = reals(p, MEAN), reals(p, M2), real(p, MOMENTUM)
    channels, unbiased = slot(p, CHANNELS), 1 / max(1, count - 1)
    finite = 0.0
    for c in range(channels):
        finite += 0.0 * (mean[c] + m2[c] + gain(p, c))
    if slot(p, RUNNING_MEAN) != 0:
        old_mean, old_var = parameters(p, RUNNING_MEAN), parameters(p, RUNNING_VAR)
        for c in range(channels):
            finite += 0.0 * (old_mean[c] + old_var[c])
            finite += 0.0 * like(old_var[c], m2[c] * unbiased)
        if finite == 0.0:
            for c in range(channels):
                old_mean[c] += like(old_mean[c], momentum * (mean[c] - old_mean[c]))
                old_var[c] += like(old_var[c], momentum * (m2[c] * unbiased - old_var[c]))
    if finite == 0.0 and slot(p, BATCHES) != 0:
        count_up(p, BATCHES)
    set_slot(p, FINITE, 1 if finite == 0.0 else 0)
