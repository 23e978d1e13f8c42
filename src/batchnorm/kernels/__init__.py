"""Fused kernels for processors, in Numba: statistics, normalization, residual and activation in the fewest readings."""
