"""How far the outputs of a layer are off, where its statistics are not those of the data."""

import numpy as np

from batchnorm.observed import Observed

__all__ = ["CHANCE", "WRONG", "output_error"]

# mean squared error of normalized outputs from which on statistics are wrong; networks that are well measured 0.003 at most
WRONG = 0.02
# by how much more, for a single sample: a mean of few samples is off by chance
CHANCE = 2.0


def output_error(observed: Observed) -> np.ndarray:
    """Return for each channel the mean squared error of normalized outputs, in units of γ².

    ``(M - m)² / (v + ε) + (√(V / (v + ε)) - √(V / (V + ε)))²`` with the mean M and the variance V of the data, and the stored m
    and v: how far ``(x - m) / √(v + ε)`` is from ``(x - M) / √(V + ε)``.
    """
    assert observed.stored_mean is not None  # noqa: S101
    assert observed.stored_variance is not None  # noqa: S101
    mean, variance, wide = observed.mean, observed.variance, observed.stored_variance + observed.eps
    with np.errstate(all="ignore"):
        shift = (mean - observed.stored_mean) ** 2 / wide
        scale = np.sqrt(variance / wide) - np.sqrt(variance / (variance + observed.eps))
    error = shift + scale**2
    return np.where(np.isfinite(error), error, np.inf)
