"""What the tests of the Keras layer share: its peer, gradients on any backend, the definition on any axis."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_train
from batchnorm.keras import BatchNormalization
from batchnorm.keras.internals import as_array

PEER = keras.layers.BatchNormalization
BACKEND = keras.backend.backend()
SHAPES = [((8, 3), -1), ((5, 4, 3), -1), ((5, 3, 4), 1), ((4, 3, 5, 2), 2), ((3, 2, 2, 3, 2), -1), ((4, 6), 0)]


def array(x):
    """Return values of any kind as an array of NumPy."""
    x = getattr(x, "value", x)
    return as_array(x).copy()


def filled(layer, shape, seed=1):
    """Build a layer, and give it weights that are not those it starts with."""
    rng = np.random.default_rng(seed)
    layer.build(shape)
    for v in layer.weights:
        if v.name != "updates":
            v.assign(rng.uniform(0.5, 1.5, size=tuple(v.shape)))
    return layer


def gradients(layer, x, upstream, **call):
    """Return the output of a layer in training, and the gradients of x and of its trainable weights."""
    dtype = layer.compute_dtype
    if BACKEND == "torch":
        import torch

        t = torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True)
        y = layer(t, training=True, **call)
        weights = [v.value for v in layer.trainable_variables]
        found = torch.autograd.grad(y, [t, *weights], torch.tensor(upstream, dtype=y.dtype))
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        t = tf.constant(x, dtype)
        with tf.GradientTape() as tape:
            tape.watch(t)
            y = layer(t, training=True, **call)
        found = tape.gradient(y, [t, *(v.value for v in layer.trainable_variables)], tf.constant(upstream, y.dtype))
    else:
        import jax

        def run(t, weights):
            y, moved = layer.stateless_call(
                weights, [v.value for v in layer.non_trainable_variables], t, training=True, **call
            )
            return y, moved

        weights = [v.value for v in layer.trainable_variables]
        y, back, moved = jax.vjp(run, jax.numpy.asarray(x, dtype), weights, has_aux=True)
        for v, new in zip(layer.non_trainable_variables, moved, strict=True):
            v.assign(new)
        dx, dweights = back(jax.numpy.asarray(upstream, y.dtype))
        found = [dx, *dweights]
    return array(y), [array(g).astype(np.float64) for g in found]


def compiled_step(layer, x, **call):
    """Run a step of training compiled, and return the output."""
    if BACKEND == "torch":
        return layer(x, training=True, **call)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda t, kw: layer(t, training=True, **kw))(tf.constant(x), call)
    import jax

    state = [v.value for v in layer.trainable_variables], [v.value for v in layer.non_trainable_variables]
    y, moved = jax.jit(lambda a, b, t, kw: layer.stateless_call(a, b, t, training=True, **kw))(*state, x, call)
    for v, new in zip(layer.non_trainable_variables, moved, strict=True):
        v.assign(new)
    return y


def defined(layer, x, upstream, *, renorm=None, **options):
    """Return what the definition says of a step: output, gradients, moving mean and variance, from the layer before it."""
    gamma, beta, mean, var = (None if v is None else array(v.value).astype(np.float64) for v in _weights(layer))
    axes = tuple(i for i in range(x.ndim) if i != layer.axis % x.ndim)
    options = {"axes": axes, "eps": layer.epsilon, **options}
    wide = x.astype(np.float64)
    past = (mean, var)
    if renorm is not None:
        deviation = array(layer.renorm_stddev.value).astype(np.float64)
        past = (array(layer.renorm_mean.value).astype(np.float64), deviation**2 - layer.epsilon)
        options["renorm"] = Renorm(*renorm)
    unbiased = getattr(layer, "unbiased", False)
    step = batch_norm_train(wide, gamma, beta, *past, decay=layer.momentum, unbiased=unbiased, **options)
    grads = batch_norm_backward(upstream.astype(np.float64), wide, gamma, *past, **options)
    return step, [grads.dx, *(g for g, v in ((grads.dgamma, gamma), (grads.dbeta, beta)) if v is not None)]


def _weights(layer):
    return layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance


def close(got, expected, what="", rtol=2e-6, atol=None, of=0.0):
    """Hold values to others: rounding of float32, of the largest of them, or of what they are small differences of."""
    got, expected = (np.asarray(v if isinstance(v, list) else array(v), np.float64) for v in (got, expected))
    scale = max(1e-3, np.abs(expected).max(initial=0), np.abs(of).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol or rtol * scale, err_msg=what)


__all__ = [
    "BACKEND",
    "PEER",
    "SHAPES",
    "BatchNormalization",
    "array",
    "close",
    "compiled_step",
    "defined",
    "filled",
    "gradients",
]
