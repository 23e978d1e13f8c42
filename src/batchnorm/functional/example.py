"""Inference example weighing: an example's own statistics beside the stored ones."""

from batchnorm.arrays import Array, expand, namespace, reduced_axes, widen
from batchnorm.errors import ShapeError
from batchnorm.moments import Moments

__all__ = ["batch_norm_example_inference"]


def batch_norm_example_inference(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    example_weight: float,
    eps: float = 1e-5,
    weight: Array | None = None,
) -> Array:
    """Normalize each example with a mixture of the stored statistics and its own.

    ::

        μ = (1 - a) · mean + a · μ_x        σ² = (1 - a) · variance + a · σ²_x + a · (1 - a) · (μ_x - mean)²

    ``μ_x`` and ``σ²_x`` are taken over the places of one example, for each channel; the last term is the variance between
    the two. ``a = 0`` is `batch_norm_inference`.

    Args:
        x: ``(N, C, *spatial)`` with at least one spatial axis.
        mean: ``(C,)``.
        variance: ``(C,)``.
        gamma: ``(C,)``; 1 where ``None``.
        beta: ``(C,)``; 0 where ``None``.
        example_weight: ``a``, from 0 to 1.
        eps: added to the variance under the root.
        weight: of the places, broadcastable to ``x``; the others do not count.

    Returns:
        The output, shape and dtype of ``x``.

    Raises:
        ShapeError: ``x`` has no spatial axis: one value has no variance.

    Example:
        >>> import numpy as np
        >>> x, zero, one = np.array([[[1.0, 3.0]]]), np.zeros(1), np.ones(1)
        >>> batch_norm_example_inference(x, zero, one, example_weight=1.0, eps=0.0)
        array([[[-1.,  1.]]])

    Reference:
        Summers, Dinneen: Four things everyone should know to improve batch normalization, 2020 (arXiv:1906.03548), section 3.1.
    """
    if x.ndim < 3:
        raise ShapeError(f"an example's own statistics need spatial axes (N, C, *spatial), got shape {tuple(x.shape)}")
    xp, wide, a = namespace(x), widen(x), example_weight
    places = tuple(range(2, x.ndim))
    own = Moments.of(wide, places, weight)
    # an example without a valid place has no statistics of its own
    a = a * xp.astype(xp.zeros_like(own.mean) + own.count > 0, wide.dtype)
    mu = (1 - a) * widen(mean) + a * own.mean
    var = (1 - a) * widen(variance) + a * own.variance + a * (1 - a) * (own.mean - widen(mean)) ** 2
    channels = reduced_axes("spatial", x.ndim)
    x_hat = (wide - expand(mu, wide, places)) / (expand(var, wide, places) + eps) ** 0.5
    scaled = x_hat if gamma is None else x_hat * expand(widen(gamma), wide, channels)
    return xp.astype(scaled if beta is None else scaled + expand(widen(beta), wide, channels), x.dtype)
