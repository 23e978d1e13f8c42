"""Fused kernels for processors, in Numba: statistics, normalization, residual and activation in as few readings as there can be."""
