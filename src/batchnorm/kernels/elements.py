"""What is computed for each element, eight at a time: the output, and the gradient before the activation."""

from typing import Any

from batchnorm.kernels.activations import activate, slope, slope_by_output
from batchnorm.kernels.lanes import Lanes

__all__ = ["gradient", "output"]

# what stands beside the input: a residual (1), or the output in its place
RESIDUAL_IS_OUTPUT = 2


def output(act: int, x: Lanes, beside: Lanes | None, mean: Lanes, scale: Lanes, shift: Lanes) -> Lanes:
    """Return ``activation((x - mean) · scale + shift + residual)``."""
    z = (x - mean).fused(scale, shift)
    return activate(act, z if beside is None else z + beside)


def gradient(act: int, adds: int, dy: Lanes, beside: Lanes | None, t: Lanes, scale: Lanes, shift: Lanes) -> Any:
    """Return the gradient before the activation, ``t`` being the distance from the mean."""
    if act == 0:
        return dy
    if adds == RESIDUAL_IS_OUTPUT and beside is not None:
        return dy * slope_by_output(act, beside)
    z = t.fused(scale, shift)
    return dy * slope(act, z if beside is None else z + beside)
