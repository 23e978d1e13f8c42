"""Batch normalization layers of Flax, for `batchnorm.translate`; importing it loads JAX and Flax."""

from batchnorm.flax.translating import FlaxLayer as FlaxLayer

__all__ = ["FlaxLayer"]
