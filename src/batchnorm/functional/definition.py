"""Batch normalization as defined: forward, the explicit backward, inference.

Written for reading. The same lines run on NumPy (in float64: the oracle of every test), on torch (autograd, ``torch.func``,
any order of derivative) and on JAX. Everything is computed in float64 and rounded once, at the end. Equation numbers are
those of Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), Algorithm 1, unless another paper is named.
"""

from typing import Any, NamedTuple

from batchnorm.arrays import Array, constant, expand, namespace, reduced_axes, where, widen
from batchnorm.errors import OptionError, ShapeError
from batchnorm.functional.groups import Axes, Batch, groups, only_valid
from batchnorm.moments import Moments


class Renorm(NamedTuple):
    """How far batch renormalization may correct the batch's statistics towards the running ones.

    Args:
        rmax: bound of the ratio of deviations, ``1/rmax ≤ r ≤ rmax``; 1 is plain batch normalization.
        dmax: bound of the difference of means in deviations, ``-dmax ≤ d ≤ dmax``; 0 is plain batch normalization.

    Example:
        >>> import numpy as np
        >>> x, zero, one = np.array([[1.0], [3.0]]), np.zeros(1), np.ones(1)
        >>> batch_norm_train(x, None, None, zero, one, eps=0.0, renorm=Renorm(rmax=3.0, dmax=5.0)).y
        array([[1.],
               [3.]])
    """

    rmax: Any
    dmax: Any


class Normalized(NamedTuple):
    """What a training step of batch normalization gives.

    Args:
        y: the output, shape and dtype of the input.
        moments: of the whole batch, ghost batches merged.
        running_mean: the updated running mean, ``None`` where none was given.
        running_var: the updated running variance, ``None`` where none was given.

    Example:
        >>> import numpy as np
        >>> step = batch_norm_train(np.array([[1.0], [3.0]]), None, None, np.zeros(1), np.ones(1), decay=0.5)
        >>> step.running_mean, step.running_var
        (array([1.]), array([1.5]))
    """

    y: Array
    moments: Moments
    running_mean: Array | None
    running_var: Array | None


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the input, γ and β.

    Example:
        >>> import numpy as np
        >>> batch_norm_backward(np.ones((1, 1)), np.ones((1, 1)))   # of a single value, β alone can learn
        Gradients(dx=array([[0.]]), dgamma=array([0.]), dbeta=array([1.]))
    """

    dx: Array
    dgamma: Array
    dbeta: Array


def batch_norm_train(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    axes: Axes = "spatial",
    eps: float = 1e-5,
    decay: float = 0.9,
    unbiased: bool = True,
    mask: Array | None = None,
    sample_weight: Array | None = None,
    virtual_batch_size: int | None = None,
    renorm: Renorm | None = None,
) -> Normalized:
    """Normalize a training batch with its own statistics.

    ::

        μ = Σ w·x / Σ w         σ² = Σ w·(x - μ)² / Σ w         x̂ = (x - μ) / √(σ² + ε)         y = γ·x̂ + β

    with all weights ``w = 1`` where neither ``mask`` nor ``sample_weight`` is given.

    Args:
        x: ``(N, C, *spatial)``, or any array that ``axes`` makes sense for.
        gamma: scale, the shape of the axes that are kept: ``(C,)`` for ``axes="spatial"``; 1 where ``None``.
        beta: shift, like ``gamma``; 0 where ``None``.
        running_mean: like ``gamma``; not written to, the updated one is returned.
        running_var: like ``gamma``; not written to, the updated one is returned.
        axes: ``"spatial"`` (one statistic a channel), ``"per-activation"`` (one a feature and place) or the axes to reduce.
        eps: added to the variance under the root.
        decay: weight of the past in the running statistics (torch's ``1 - momentum``).
        unbiased: keep the unbiased variance as running variance, as torch does; Keras and Flax keep the biased one.
        mask: bool, broadcastable to the reduced axes ``(N, *spatial)``, true where a value is valid. Other places are not
            looked at, get the output 0 and the gradient 0.
        sample_weight: frequencies, ``(N,)`` or broadcastable to the reduced axes.
        virtual_batch_size: normalize ghost batches of this many samples each; see `ghost_batches`.
        renorm: correct towards the running statistics by constants ``r``, ``d``: ``y = γ·(x̂·r + d) + β``.

    Returns:
        `Normalized`: ``y``, the Moments of the whole batch, and the new running statistics.

    Raises:
        OptionError: ``axes``, ``virtual_batch_size`` or ``renorm`` out of range, ``renorm`` without running statistics, one
            running statistic without the other.
        ShapeError: arrays that do not fit ``x``.

    Example:
        >>> import numpy as np
        >>> batch_norm_train(np.array([[1.0], [3.0]]), eps=0.0).y
        array([[-1.],
               [ 1.]])

    Reference:
        Ioffe, Szegedy 2015, Algorithm 1. Ghost batches: Hoffer, Hubara, Soudry 2017 (arXiv:1705.08741), Algorithm 1.
        Renormalization: Ioffe 2017 (arXiv:1702.03275).
    """
    _check_running(x, axes, running_mean, running_var, renorm)
    outputs, parts = [], []
    for batch in groups(x, axes, mask, sample_weight, virtual_batch_size):
        moments, x_hat, _ = _standardize(batch, eps)
        r, d = _renorm_constants(batch, moments, running_mean, running_var, eps, renorm)
        y = batch.per_channel(gamma, 1.0) * (x_hat * r + d) + batch.per_channel(beta, 0.0)
        outputs.append(y)
        parts.append(moments)
    xp = namespace(x)
    y = outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=0)
    y = only_valid(xp.astype(y, x.dtype), mask, reduced_axes(axes, x.ndim))
    moments = parts[0].merge(*parts[1:])
    if running_mean is None or running_var is None:
        return Normalized(y, moments, None, None)
    return Normalized(y, moments, *update_running(running_mean, running_var, moments, decay=decay, unbiased=unbiased))


def batch_norm_backward(
    dy: Array,
    x: Array,
    gamma: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    axes: Axes = "spatial",
    eps: float = 1e-5,
    mask: Array | None = None,
    sample_weight: Array | None = None,
    virtual_batch_size: int | None = None,
    renorm: Renorm | None = None,
) -> Gradients:
    """Return the gradients of `batch_norm_train` for the upstream gradient ``dy``.

    ::

        dx̂ = γ·r·dy         dx = (dx̂ - w/W · Σ dx̂ - x̂ · w/W · Σ dx̂·x̂) / √(σ² + ε)         W = Σ w
        dγ = Σ dy·(x̂·r + d)         dβ = Σ dy

    This is the paper's chain of six gradients in closed form. ``Σ`` runs over a ghost batch; ``r``, ``d`` are constants.

    Args:
        dy: gradient with respect to ``y``, the shape of ``x``.
        x: as in the forward, like all other arguments.
        gamma: see `batch_norm_train`.
        running_mean: the running mean before the step; read by ``renorm`` only.
        running_var: the running variance before the step; read by ``renorm`` only.
        axes: see `batch_norm_train`.
        eps: see `batch_norm_train`.
        mask: see `batch_norm_train`.
        sample_weight: see `batch_norm_train`.
        virtual_batch_size: see `batch_norm_train`.
        renorm: see `batch_norm_train`.

    Returns:
        `Gradients`: ``dx`` in the dtype of ``x``; ``dgamma`` and ``dbeta`` in float64.

    Raises:
        OptionError: as in the forward.
        ShapeError: ``dy`` and ``x`` differ in shape, or as in the forward.

    Example:
        >>> import numpy as np
        >>> x, dy = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [0.0], [0.0]])
        >>> abs(batch_norm_backward(dy, x).dx.sum()) < 1e-12    # shifting the whole batch changes nothing
        np.True_

    Reference:
        Ioffe, Szegedy 2015, section 3, the equations of the backward pass.
    """
    if dy.shape != x.shape:
        raise ShapeError(f"dy must have the shape of x, {tuple(x.shape)}, got {tuple(dy.shape)}")
    _check_running(x, axes, running_mean, running_var, renorm)
    reduced = reduced_axes(axes, x.ndim)
    xp = namespace(x)
    upstream = only_valid(widen(dy), mask, reduced)
    dx, dgamma, dbeta, start = [], 0.0, 0.0, 0
    for batch in groups(x, axes, mask, sample_weight, virtual_batch_size):
        g = upstream[start : start + batch.x.shape[0]]
        start += batch.x.shape[0]
        moments, x_hat, inv = _standardize(batch, eps)
        r, d = _renorm_constants(batch, moments, running_mean, running_var, eps, renorm)
        dx_hat = batch.per_channel(gamma, 1.0) * r * g
        share = (1.0 if batch.weight is None else batch.weight) / (moments.count + (moments.count == 0))
        dx.append(inv * (dx_hat - share * batch.total(dx_hat) - x_hat * share * batch.total(dx_hat * x_hat)))
        dgamma = dgamma + xp.sum(g * (x_hat * r + d), axis=reduced)
        dbeta = dbeta + xp.sum(g, axis=reduced)
    return Gradients(only_valid(xp.astype(xp.concat(dx, axis=0), x.dtype), mask, reduced), dgamma, dbeta)


def batch_norm_inference(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axes: Axes = "spatial",
    eps: float = 1e-5,
) -> Array:
    """Normalize with fixed statistics: ``y = γ · (x - mean) / √(variance + ε) + β``.

    The difference is taken before the scaling: ``x·scale + shift`` would cancel where the mean is far from zero.

    Args:
        x: ``(N, C, *spatial)``, or any array that ``axes`` makes sense for.
        mean: the shape of the axes that are kept, ``(C,)`` for ``axes="spatial"``.
        variance: like ``mean``.
        gamma: like ``mean``; 1 where ``None``.
        beta: like ``mean``; 0 where ``None``.
        axes: the axes that the statistics were taken over.
        eps: added to the variance under the root.

    Returns:
        The output, shape and dtype of ``x``.

    Raises:
        ShapeError: arrays that do not fit ``x``.

    Example:
        >>> import numpy as np
        >>> batch_norm_inference(np.array([[7.0]]), np.array([1.0]), np.array([4.0]), eps=0.0)
        array([[3.]])

    Reference:
        Ioffe, Szegedy 2015, Algorithm 2, line 11.
    """
    batch = Batch(widen(x), None, reduced_axes(axes, x.ndim))
    inv = 1.0 / (batch.per_channel(variance, 0.0) + eps) ** 0.5
    centred = batch.x - batch.per_channel(mean, 0.0)
    y = batch.per_channel(gamma, 1.0) * (centred * inv) + batch.per_channel(beta, 0.0)
    return namespace(x).astype(y, x.dtype)


def batch_norm_inference_backward(
    dy: Array,
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    *,
    axes: Axes = "spatial",
    eps: float = 1e-5,
) -> Gradients:
    """Return the gradients of `batch_norm_inference`: ``dx = γ·dy / √(variance + ε)``, the statistics being constants.

    Args:
        dy: gradient with respect to ``y``, the shape of ``x``.
        x: as in the forward, like all other arguments.
        mean: see `batch_norm_inference`.
        variance: see `batch_norm_inference`.
        gamma: see `batch_norm_inference`.
        axes: see `batch_norm_inference`.
        eps: see `batch_norm_inference`.

    Returns:
        `Gradients`: ``dx`` in the dtype of ``x``; ``dgamma`` and ``dbeta`` in float64.

    Raises:
        ShapeError: ``dy`` and ``x`` differ in shape.

    Example:
        >>> import numpy as np
        >>> one = np.ones((1, 1))
        >>> batch_norm_inference_backward(one, one, one[0], 4 * one[0], eps=0.0).dx
        array([[0.5]])
    """
    if dy.shape != x.shape:
        raise ShapeError(f"dy must have the shape of x, {tuple(x.shape)}, got {tuple(dy.shape)}")
    xp, batch = namespace(x), Batch(widen(x), None, reduced_axes(axes, x.ndim))
    g = widen(dy)
    inv = 1.0 / (batch.per_channel(variance, 0.0) + eps) ** 0.5
    x_hat = (batch.x - batch.per_channel(mean, 0.0)) * inv
    dx = batch.per_channel(gamma, 1.0) * inv * g
    return Gradients(xp.astype(dx, x.dtype), xp.sum(g * x_hat, axis=batch.axes), xp.sum(g, axis=batch.axes))


def update_running(
    running_mean: Array,
    running_var: Array,
    moments: Moments,
    *,
    decay: float = 0.9,
    unbiased: bool = True,
    total_variance: bool = False,
) -> tuple[Array, Array]:
    """Move running statistics towards those of a batch: ``new = decay · old + (1 - decay) · batch``.

    ``total_variance`` adds what an average of variances leaves out, the variance between the batches' means:
    ``decay · (1 - decay) · (batch mean - old mean)²``. It is then the moving ``E[x²] - E[x]²``, without the cancellation.

    A batch without values changes nothing. One value says nothing about an unbiased variance, which then stays as it was.

    Args:
        running_mean: ``(C,)``.
        running_var: ``(C,)``.
        moments: of the batch.
        decay: weight of the past.
        unbiased: use ``m2 / (count - 1)`` (torch) or ``m2 / count`` (Keras, Flax).
        total_variance: keep the variance within and between batches.

    Returns:
        The new running mean and variance, in the dtypes of the old ones.

    Example:
        >>> import numpy as np
        >>> update_running(np.zeros(1), np.ones(1), Moments(2, np.array([10.0]), np.array([8.0])), decay=0.5)
        (array([5.]), array([4.5]))
    """
    xp = namespace(running_mean)
    batch_var = moments.unbiased_variance if unbiased else moments.variance
    mean = decay * widen(running_mean) + (1 - decay) * moments.mean
    var = decay * widen(running_var) + (1 - decay) * batch_var
    if total_variance:
        var = var + decay * (1 - decay) * (moments.mean - widen(running_mean)) ** 2
    return (
        where(moments.count > 0, xp.astype(mean, running_mean.dtype), running_mean),
        where(moments.count > int(unbiased), xp.astype(var, running_var.dtype), running_var),
    )


def _check_running(
    x: Array, axes: Axes, running_mean: Array | None, running_var: Array | None, renorm: Renorm | None
) -> None:
    """Refuse running statistics that come alone or broadcast by accident, and bounds that exclude plain normalization."""
    given = {"running_mean": running_mean, "running_var": running_var}
    names = [name for name, v in given.items() if v is not None]
    if len(names) == 1:
        raise OptionError(f"running_mean and running_var must both be given or both be None, got {names[0]} alone")
    for name in names:
        expand(given[name], x, reduced_axes(axes, x.ndim))
    if renorm is not None and not (renorm.rmax >= 1 and renorm.dmax >= 0):
        raise OptionError(f"renorm must have rmax of at least 1 and dmax of at least 0, got {renorm}")


def _standardize(batch: Batch, eps: float) -> tuple[Moments, Array, Array]:
    moments = Moments.of(batch.x, batch.axes, batch.weight)  # (1), (2)
    inv = 1.0 / (expand(moments.variance, batch.x, batch.axes) + eps) ** 0.5
    return moments, (batch.x - expand(moments.mean, batch.x, batch.axes)) * inv, inv  # (3)


def _renorm_constants(
    batch: Batch,
    moments: Moments,
    running_mean: Array | None,
    running_var: Array | None,
    eps: float,
    renorm: Renorm | None,
) -> tuple[Any, Any]:
    """Return ``r = clip(σ_B / σ, 1/rmax, rmax)`` and ``d = clip((μ_B - μ) / σ, -dmax, dmax)``."""
    if renorm is None:
        return 1.0, 0.0
    if running_mean is None or running_var is None:
        raise OptionError("renorm corrects towards running statistics: give running_mean and running_var")
    xp = namespace(batch.x)
    sigma = (widen(running_var) + eps) ** 0.5
    r = xp.clip((moments.variance + eps) ** 0.5 / sigma, 1 / renorm.rmax, renorm.rmax)
    d = xp.clip((moments.mean - widen(running_mean)) / sigma, -renorm.dmax, renorm.dmax)
    return tuple(expand(constant(v), batch.x, batch.axes) for v in (r, d))
