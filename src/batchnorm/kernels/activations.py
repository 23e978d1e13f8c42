"""Activations and their slopes, eight numbers at a time and without a branch; NaN stays NaN."""

import math

from batchnorm.kernels.lanes import Lanes, where

__all__ = ["CODES", "activate", "is_light", "slope", "slope_by_output"]

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
EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
# an odd rational function, right to 4e-7
ERF_ABOVE = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
    -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
ERF_BELOW = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)  # fmt: skip
# of tanh around 0, without its first term
TANH = (-1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3)


def is_light(code: int) -> bool:
    """Say whether an activation costs no more than what is around it."""
    return code <= CODES["leaky_relu"]


def _polynomial(coefficients: tuple[float, ...], z: Lanes) -> Lanes:
    found = z * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        found = found * z + coefficient
    return found


def _exp(z: Lanes) -> Lanes:
    if z.is_double:
        return z.each("exp")
    z = z.clip(EXP_MIN, EXP_MAX)
    # NaN has no integer, and comes back by r
    n = (where(z > EXP_MIN, z, EXP_MIN) * 1.4426950408889634 + 0.5).floor()
    r = (z - n * LN2_HIGH) - n * LN2_LOW
    return _polynomial(EXP, r) * n.power_of_two()


def _erf(z: Lanes) -> Lanes:
    if z.is_double:
        return z.each("erf")
    # beyond 4 erf is ±1 in float32
    z = z.clip(-4.0, 4.0)
    v = z * z
    return z * _polynomial(ERF_ABOVE, v) / _polynomial(ERF_BELOW, v)


def _tanh(z: Lanes) -> Lanes:
    if z.is_double:
        return z.each("tanh")
    v = z * z
    near = z + z * v * _polynomial(TANH, v)
    far = 1.0 - 2.0 / (_exp(z + z) + 1.0)
    return where(v < 0.09, near, far)


def _sigmoid(z: Lanes) -> Lanes:
    return 1.0 / (1.0 + _exp(0.0 - z))


def _relu6(z: Lanes) -> Lanes:
    return z.clip(0.0, 6.0)


def _gelu(z: Lanes) -> Lanes:
    half = 0.5 * z
    return half + half * _erf(z * ROOT_HALF)


ACTIVATIONS = {
    "relu": lambda z: where(z < 0.0, 0.0, z),
    "relu6": _relu6,
    "leaky_relu": lambda z: where(z < 0.0, z * LEAK, z),
    "silu": lambda z: z * _sigmoid(z),
    "gelu": _gelu,
    "hardswish": lambda z: z * _relu6(z + 3.0) * (1 / 6),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}
NAMES = {code: name for name, code in CODES.items()}


def activate(code: int, z: Lanes) -> Lanes:
    """Return the activation of ``z``."""
    name = NAMES[code]
    return z if name is None else ACTIVATIONS[name](z)


def _gated_slope(name: str, y: Lanes) -> Lanes:
    one, zero = Lanes(y.builder, y.like(1.0)), Lanes(y.builder, y.like(0.0))
    if name == "relu6":
        one = where(y < 6.0, one, zero)
    return where(y > 0.0, one, LEAK if name == "leaky_relu" else zero)


def slope_by_output(code: int, y: Lanes) -> Lanes:
    """Return the slope where an activation has given ``y``, for those that tell it; it is also the slope at ``y``."""
    return _gated_slope(str(NAMES[code]), y)


def _slope_of_silu(z: Lanes) -> Lanes:
    s = _sigmoid(z)
    return s + s * z * (1.0 - s)


def _slope_of_gelu(z: Lanes) -> Lanes:
    below = 0.5 + 0.5 * _erf(z * ROOT_HALF)
    return below + z * DENSITY_AT_0 * _exp(-0.5 * z * z)


def _slope_of_hardswish(z: Lanes) -> Lanes:
    middle = where(z >= 3.0, 1.0, z * (1 / 3) + 0.5)
    return where(z <= -3.0, 0.0, middle)


def _slope_of_sigmoid(z: Lanes) -> Lanes:
    s = _sigmoid(z)
    return s * (1.0 - s)


def _slope_of_tanh(z: Lanes) -> Lanes:
    t = _tanh(z)
    return (1.0 - t) * (1.0 + t)


SLOPES = {
    "silu": _slope_of_silu,
    "gelu": _slope_of_gelu,
    "hardswish": _slope_of_hardswish,
    "sigmoid": _slope_of_sigmoid,
    "tanh": _slope_of_tanh,
}


def slope(code: int, z: Lanes) -> Lanes:
    """Return the slope of the activation at ``z``."""
    name = str(NAMES[code])
    return SLOPES[name](z) if name in SLOPES else _gated_slope(name, z)
