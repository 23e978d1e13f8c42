"""Batch normalization in the words of TensorFlow and Theano: their argument names, order, returns and semantics.

Both run on any array library. The numbers are those of the definition; only the spelling differs.
"""

from collections.abc import Sequence
from typing import Any

from batchnorm.arrays import Array, namespace, reduced_axes, widen
from batchnorm.errors import OptionError, ShapeError
from batchnorm.functional.definition import batch_norm_inference, update_running
from batchnorm.moments import Moments


def moments(
    x: Array,
    axes: int | Sequence[int],
    shift: object = None,
    keepdims: bool = False,
    name: str | None = None,
) -> tuple[Array, Array]:
    """Return mean and biased variance over ``axes``, as ``tf.nn.moments`` does.

    Args:
        x: any array.
        axes: the axes to reduce: ``[0]`` for a dense layer, ``[0, 1, 2]`` for a channels-last image.
        shift: not used, as in TensorFlow.
        keepdims: keep the reduced axes with size 1.
        name: not used here.

    Returns:
        ``(mean, variance)``, in the dtype of ``x``; computed centred, in float64.

    Example:
        >>> import numpy as np
        >>> mean, variance = moments(np.array([[1.0, 5.0], [3.0, 5.0]]), axes=[0])
        >>> mean, variance
        (array([2., 5.]), array([1., 0.]))

    Reference:
        TensorFlow, ``tf.nn.moments``.
    """
    del shift, name
    xp, reduced = namespace(x), reduced_axes(axes, x.ndim)
    measured = Moments.of(x, reduced)
    shape = tuple(1 if i in reduced else n for i, n in enumerate(x.shape))
    mean, variance = (xp.astype(v, x.dtype) for v in (measured.mean, measured.variance))
    if keepdims:
        return xp.reshape(mean, shape), xp.reshape(variance, shape)
    return mean, variance


def batch_normalization(
    x: Array,
    mean: Array,
    variance: Array,
    offset: Array | None,
    scale: Array | None,
    variance_epsilon: float,
    name: str | None = None,
) -> Array:
    """Return ``scale · (x - mean) / √(variance + variance_epsilon) + offset``, as ``tf.nn.batch_normalization`` does.

    Args:
        x: any array.
        mean: broadcastable to ``x`` from the right: ``(C,)`` for channels-last, or the result of `moments` with ``keepdims``.
        variance: like ``mean``.
        offset: β, like ``mean``, or ``None``.
        scale: γ, like ``mean``, or ``None``.
        variance_epsilon: added to the variance under the root.
        name: not used here.

    Returns:
        The output, shape and dtype of ``x``.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
        >>> mean, variance = moments(x, axes=[0])
        >>> batch_normalization(x, mean, variance, offset=None, scale=None, variance_epsilon=3.0)
        array([[-0.5,  0. ],
               [ 0.5,  0. ]])

    Reference:
        TensorFlow, ``tf.nn.batch_normalization``.
    """
    del name
    inv = 1.0 / (widen(variance) + variance_epsilon) ** 0.5
    y = (widen(x) - widen(mean)) * (inv if scale is None else inv * widen(scale))
    return namespace(x).astype(y if offset is None else y + widen(offset), x.dtype)


def batch_normalization_train(
    inputs: Array,
    gamma: Array,
    beta: Array,
    axes: str | Sequence[int] = "per-activation",
    epsilon: float = 1e-4,
    running_average_factor: float = 0.1,
    running_mean: Array | None = None,
    running_var: Array | None = None,
) -> tuple[Array, ...]:
    """Normalize a training batch, as ``theano.tensor.nnet.bn.batch_normalization_train`` does.

    Args:
        inputs: any array.
        gamma: scale, with the axes that are kept, or with as many dimensions as ``inputs`` and size 1 along the reduced ones.
        beta: shift, like ``gamma``.
        axes: ``'per-activation'`` (axis 0), ``'spatial'`` (all but axis 1) or a tuple of axes.
        epsilon: added to the variance under the root; at least 1e-5.
        running_average_factor: weight of the new batch in the running statistics.
        running_mean: like ``gamma``; given together with ``running_var`` or not at all.
        running_var: like ``gamma``; moves towards the unbiased variance ``m / (m - 1) · σ²``.

    Returns:
        ``(out, mean, invstd)``, and ``new_running_mean, new_running_var`` after them where running statistics were given;
        all but ``out`` in the layout of ``gamma``.

    Raises:
        OptionError: ``epsilon`` below 1e-5, unknown ``axes``, only one of the running statistics.
        ShapeError: arrays that do not fit ``inputs``.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1.0], [3.0]])
        >>> out, mean, invstd = batch_normalization_train(x, np.ones(1), np.zeros(1))
        >>> mean, invstd.round(4)
        (array([2.]), array([1.]))

    Reference:
        Theano, ``theano/tensor/nnet/bn.py``.
    """
    if (running_mean is None) != (running_var is None):
        raise OptionError("running_mean and running_var must both be given or both be None, got one of them")
    reduced = _theano_axes(axes, inputs.ndim, epsilon)
    xp = namespace(inputs)
    layout = tuple(gamma.shape)
    gamma, beta = (_kept(v, inputs, reduced) for v in (gamma, beta))
    batch = Moments.of(inputs, reduced)
    out = batch_norm_inference(inputs, batch.mean, batch.variance, gamma, beta, axes=reduced, eps=epsilon)
    invstd = 1.0 / (batch.variance + epsilon) ** 0.5
    results = [xp.astype(v, inputs.dtype) for v in (batch.mean, invstd)]
    if running_mean is not None and running_var is not None:
        old_mean, old_var = (_kept(v, inputs, reduced) for v in (running_mean, running_var))
        results += update_running(old_mean, old_var, batch, decay=1 - running_average_factor)
    return (out, *(xp.reshape(v, layout) for v in results))


def batch_normalization_test(
    inputs: Array,
    gamma: Array,
    beta: Array,
    mean: Array,
    var: Array,
    axes: str | Sequence[int] = "per-activation",
    epsilon: float = 1e-4,
) -> Array:
    """Normalize with given statistics, as ``theano.tensor.nnet.bn.batch_normalization_test`` does.

    Args:
        inputs: any array.
        gamma: scale, with the axes that are kept, or with as many dimensions as ``inputs`` and size 1 along the reduced ones.
        beta: shift, like ``gamma``.
        mean: like ``gamma``.
        var: like ``gamma``.
        axes: ``'per-activation'`` (axis 0), ``'spatial'`` (all but axis 1) or a tuple of axes.
        epsilon: added to the variance under the root; at least 1e-5.

    Returns:
        ``(inputs - mean) · gamma / √(var + epsilon) + beta``.

    Raises:
        OptionError: ``epsilon`` below 1e-5, unknown ``axes``.
        ShapeError: arrays that do not fit ``inputs``.

    Example:
        >>> import numpy as np
        >>> one = np.ones(1)
        >>> batch_normalization_test(np.array([[4.0]]), 2 * one, one, one, 9 * one).round(3)
        array([[3.]])

    Reference:
        Theano, ``theano/tensor/nnet/bn.py``.
    """
    reduced = _theano_axes(axes, inputs.ndim, epsilon)
    gamma, beta, mean, var = (_kept(v, inputs, reduced) for v in (gamma, beta, mean, var))
    return batch_norm_inference(inputs, mean, var, gamma, beta, axes=reduced, eps=epsilon)


def _kept(v: Array, inputs: Array, axes: tuple[int, ...]) -> Array:
    """Accept both of Theano's layouts: the kept axes alone, or all axes with size 1 where reduced."""
    kept = tuple(n for i, n in enumerate(inputs.shape) if i not in axes)
    full = tuple(1 if i in axes else n for i, n in enumerate(inputs.shape))
    if tuple(v.shape) not in (kept, full):
        raise ShapeError(
            f"a parameter must have the shape {kept} or {full} for inputs of shape {tuple(inputs.shape)}, "
            f"got {tuple(v.shape)}"
        )
    return namespace(v).reshape(v, kept)


def _theano_axes(axes: Any, ndim: int, epsilon: float) -> tuple[int, ...]:
    if epsilon < 1e-5:
        raise OptionError(f"epsilon must be at least 1e-5, got {epsilon}")
    return reduced_axes(axes, ndim)
