"""Activations and their slopes, in forms that are computed for many values at once: without a branch.

Nothing here may be reordered by the compiler: the reduction of the exponential would cancel out.
"""

import math
from typing import Any

from numba import njit, types
from numba.extending import overload

from batchnorm.kernels.scalars import floor, like, power_of_two

__all__ = ["CODES", "activate", "slope", "slope_by_output"]

CODES: dict[str | None, int] = {
    None: 0,
    "relu": 1,
    "relu6": 2,
    "leaky_relu": 3,
    "silu": 4,
    "gelu": 5,
    "hardswish": 6,
    "sigmoid": 7,
    "tanh": 8,
}
LEAK = 0.01
ROOT_HALF, DENSITY_AT_0 = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
# below, float32 ends; above is infinity
EXP_MIN, EXP_MAX = -87.0, 89.0
# n · LN2_HIGH is exact for every n that occurs
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4


def _exp(z: Any) -> Any:
    return math.exp(z)


@overload(_exp, jit_options={"forceinline": True, "error_model": "numpy"})
def _exp_of(z: Any) -> Any:
    def wide(z: Any) -> Any:
        return math.exp(z)

    def narrow(z: Any) -> Any:
        z = like(z, EXP_MIN) if z < EXP_MIN else z
        z = like(z, EXP_MAX) if z > EXP_MAX else z
        # NaN has no integer, and comes back by r
        known = z if z > EXP_MIN else like(z, EXP_MIN)
        n = floor(known * like(z, 1.4426950408889634) + like(z, 0.5))
        r = (z - n * like(z, LN2_HIGH)) - n * like(z, LN2_LOW)
        s = like(z, 1 / 5040)
        s = s * r + like(z, 1 / 720)
        s = s * r + like(z, 1 / 120)
        s = s * r + like(z, 1 / 24)
        s = s * r + like(z, 1 / 6)
        s = s * r + like(z, 0.5)
        s = s * r + like(z, 1)
        s = s * r + like(z, 1)
        return s * power_of_two(n)

    return wide if z == types.float64 else narrow


def _erf(z: Any) -> Any:
    return math.erf(z)


@overload(_erf, jit_options={"forceinline": True, "error_model": "numpy"})
def _erf_of(z: Any) -> Any:
    def wide(z: Any) -> Any:
        return math.erf(z)

    def narrow(z: Any) -> Any:
        # an odd rational function, right to 4e-7; beyond 4 erf is ±1 in float32
        z = like(z, -4) if z < -4 else z
        z = like(z, 4) if z > 4 else z
        v = z * z
        a = like(z, -2.72614225801306e-10)
        a = a * v + like(z, 2.77068142495902e-08)
        a = a * v + like(z, -2.10102402082508e-06)
        a = a * v + like(z, -5.69250639462346e-05)
        a = a * v + like(z, -7.34990630326855e-04)
        a = a * v + like(z, -2.95459980854025e-03)
        a = a * v + like(z, -1.60960333262415e-02)
        b = like(z, -1.45660718464996e-05)
        b = b * v + like(z, -2.13374055278905e-04)
        b = b * v + like(z, -1.68282697438203e-03)
        b = b * v + like(z, -7.37332916720468e-03)
        b = b * v + like(z, -1.42647390514189e-02)
        return z * a / b

    return wide if z == types.float64 else narrow


def _tanh(z: Any) -> Any:
    return math.tanh(z)


@overload(_tanh, jit_options={"forceinline": True, "error_model": "numpy"})
def _tanh_of(z: Any) -> Any:
    def wide(z: Any) -> Any:
        return math.tanh(z)

    def narrow(z: Any) -> Any:
        v = z * z
        s = like(z, -1382 / 155925)
        s = s * v + like(z, 62 / 2835)
        s = s * v + like(z, -17 / 315)
        s = s * v + like(z, 2 / 15)
        s = s * v + like(z, -1 / 3)
        near = z + z * v * s
        e = _exp(z + z)
        far = like(z, 1) - like(z, 2) / (e + like(z, 1))
        return near if v < like(z, 0.09) else far

    return wide if z == types.float64 else narrow


@njit(forceinline=True, error_model="numpy")
def _sigmoid(z: Any) -> Any:
    return like(z, 1) / (like(z, 1) + _exp(-z))


@njit(forceinline=True, error_model="numpy")
def activate(code: int, z: Any) -> Any:
    """Return the activation of ``z``; NaN stays NaN."""
    if code == 1:
        return like(z, 0) if z < 0 else z
    if code == 2:
        z = like(z, 0) if z < 0 else z
        return like(z, 6) if z > 6 else z
    if code == 3:
        return z * like(z, LEAK) if z < 0 else z
    if code == 4:
        return z * _sigmoid(z)
    if code == 5:
        half = like(z, 0.5) * z
        return half + half * _erf(z * like(z, ROOT_HALF))
    if code == 6:
        gate = z + like(z, 3)
        gate = like(z, 0) if gate < 0 else gate
        gate = like(z, 6) if gate > 6 else gate
        return z * gate * like(z, 1 / 6)
    if code == 7:
        return _sigmoid(z)
    if code == 8:
        return _tanh(z)
    return z


@njit(forceinline=True, error_model="numpy")
def slope_by_output(code: int, y: Any) -> Any:
    """Return the slope where an activation has given ``y``, for those that tell it; it is also the slope at ``y``."""
    if code == 1:
        return like(y, 1) if y > 0 else like(y, 0)
    if code == 2:
        inside = like(y, 1) if y < 6 else like(y, 0)
        return inside if y > 0 else like(y, 0)
    if code == 3:
        return like(y, 1) if y > 0 else like(y, LEAK)
    return like(y, 1)


@njit(forceinline=True, error_model="numpy")
def slope(code: int, z: Any) -> Any:
    """Return the slope of the activation at ``z``."""
    if code == 4:
        s = _sigmoid(z)
        return s + s * z * (like(z, 1) - s)
    if code == 5:
        below = like(z, 0.5) + like(z, 0.5) * _erf(z * like(z, ROOT_HALF))
        return below + z * like(z, DENSITY_AT_0) * _exp(like(z, -0.5) * z * z)
    if code == 6:
        middle = z * like(z, 1 / 3) + like(z, 0.5)
        middle = like(z, 1) if z >= 3 else middle
        return like(z, 0) if z <= -3 else middle
    if code == 7:
        s = _sigmoid(z)
        return s * (like(z, 1) - s)
    if code == 8:
        t = _tanh(z)
        return (like(z, 1) - t) * (like(z, 1) + t)
    return slope_by_output(code, z)
