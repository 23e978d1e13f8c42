"""TensorFlow's and Theano's words, against plain NumPy formulas."""

import inspect
import re

import numpy as np
import pytest
import torch

from batchnorm.errors import OptionError, ShapeError
from batchnorm.functional import (
    batch_normalization,
    batch_normalization_test,
    batch_normalization_train,
    moments,
)

# the definition rounds float64 once; the formulas below sum some ten values of order one
EXACT = {"rtol": 1e-12, "atol": 1e-12}

on_every_library = pytest.mark.parametrize("to", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


@pytest.mark.parametrize(
    ("function", "original"),
    [
        (moments, "(x, axes, shift=None, keepdims=False, name=None)"),
        (batch_normalization, "(x, mean, variance, offset, scale, variance_epsilon, name=None)"),
        (
            batch_normalization_train,
            "(inputs, gamma, beta, axes='per-activation', epsilon=0.0001, running_average_factor=0.1, "
            "running_mean=None, running_var=None)",
        ),
        (
            batch_normalization_test,
            "(inputs, gamma, beta, mean, var, axes='per-activation', epsilon=0.0001)",
        ),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_arguments_have_the_original_names_order_and_defaults(function, original):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    stripped = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    assert str(stripped) == original


# --- TensorFlow ---------------------------------------------------------------------------------------------


@on_every_library
@pytest.mark.parametrize("axes", [[0], [0, 1, 2], (0, 3), -1, np.array([0, 1])])
@pytest.mark.parametrize("keepdims", [False, True])
def test_moments_are_mean_and_biased_variance(rng, to, axes, keepdims):
    x = rng.normal(3.0, 2.0, (4, 3, 2, 5))
    got = moments(to(x), axes, keepdims=keepdims)
    over = axes if isinstance(axes, int) else tuple(axes)
    assert isinstance(got, tuple)
    expected = x.mean(over, keepdims=keepdims), x.var(over, keepdims=keepdims)
    for ours, tensorflows in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, tensorflows, **EXACT)


def test_moments_of_float32_are_float32_without_cancellation(rng):
    x = rng.normal(1e4, 1.0, (500, 2)).astype(np.float32)
    mean, variance = moments(x, [0], shift=np.zeros(2), name="moments")
    assert mean.dtype == variance.dtype == np.float32
    # rounded once: half a unit in the last place of float32
    np.testing.assert_allclose(variance, x.astype(float).var(0), rtol=6e-8)


@on_every_library
@pytest.mark.parametrize("with_offset", [False, True], ids=["no offset", "offset"])
@pytest.mark.parametrize("with_scale", [False, True], ids=["no scale", "scale"])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 5), (1, 4, 1, 1)])
def test_batch_normalization_broadcasts_from_the_right(rng, to, shape, with_scale, with_offset):
    x, mean, variance = rng.normal(size=(3, 4, 2, 5)), rng.normal(size=shape), rng.random(shape)
    offset, scale = rng.normal(size=(2, *shape))
    expected = (x - mean) / np.sqrt(variance + 0.1) * (scale if with_scale else 1) + (offset if with_offset else 0)
    offset, scale = to(offset) if with_offset else None, to(scale) if with_scale else None
    y = batch_normalization(to(x), to(mean), to(variance), offset, scale, 0.1, name="bn")
    np.testing.assert_allclose(y, expected, **EXACT)


def test_batch_normalization_keeps_the_dtype_and_centres_before_it_scales(rng):
    x = rng.normal(1e4, 1.0, (50, 3)).astype(np.float32)
    y = batch_normalization(x, np.full(3, 1e4), np.ones(3), None, None, 0.0)
    assert y.dtype == np.float32
    assert np.array_equal(y, x - np.float32(1e4))


def test_gradients_pass_through_tensorflows_spelling():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    offset, scale = torch.randn(2, 3, dtype=torch.float64)

    def forward(x):
        return batch_normalization(x, *moments(x, [0]), offset, scale, 1e-3)

    assert torch.autograd.gradcheck(forward, x)


# --- Theano -------------------------------------------------------------------------------------------------

# axes as Theano writes them -> the axes of an input (4, 3, 2, 5)
AXES = {
    "per-activation": (0,),
    "spatial": (0, 2, 3),
    (0, 1, 2): (0, 1, 2),
    (3, 0): (0, 3),
    (0, 1, 2, 3): (0, 1, 2, 3),
}
every_axes = pytest.mark.parametrize(("axes", "reduced"), AXES.items(), ids=map(str, AXES))
every_layout = pytest.mark.parametrize("keepdims", [False, True], ids=["kept axes", "all axes"])


def theano_problem(rng, reduced, keepdims):
    """Return inputs, γ, β, running mean and variance, each in one of Theano's two layouts."""
    x = rng.normal(3.0, 2.0, (4, 3, 2, 5))
    kept = [(1 if i in reduced else n) for i, n in enumerate(x.shape) if keepdims or i not in reduced]
    gamma, beta, running_mean, running_var = (np.asarray(rng.normal(size=kept)) for _ in range(4))
    return x, gamma, beta, running_mean, running_var**2


@on_every_library
@every_axes
@every_layout
def test_train_returns_what_theano_documents(rng, to, axes, reduced, keepdims):
    x, gamma, beta, running_mean, running_var = theano_problem(rng, reduced, keepdims)
    mean, var = x.mean(reduced, keepdims=True), x.var(reduced, keepdims=True)
    wide_gamma, wide_beta = (v if keepdims else np.expand_dims(v, reduced) for v in (gamma, beta))
    m = x.size / mean.size
    mean_out, var_out = (v.reshape(gamma.shape) for v in (mean, var))
    expected = [
        (x - mean) * wide_gamma / np.sqrt(var + 1e-3) + wide_beta,
        mean_out,
        1 / np.sqrt(var_out + 1e-3),
        running_mean * (1 - 0.3) + mean_out * 0.3,
        running_var * (1 - 0.3) + m / (m - 1) * var_out * 0.3,
    ]
    arrays = [to(v) for v in (x, gamma, beta)]
    running = {"running_mean": to(running_mean), "running_var": to(running_var)}
    got = batch_normalization_train(*arrays, axes, 1e-3, 0.3, **running)
    assert isinstance(got, tuple)
    assert [tuple(v.shape) for v in got] == [x.shape] + [gamma.shape] * 4
    for ours, theanos in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theanos, **EXACT)
    for ours, theanos in zip(batch_normalization_train(*arrays, axes, 1e-3), expected[:3], strict=True):
        np.testing.assert_allclose(ours, theanos, **EXACT)


@on_every_library
@every_axes
@every_layout
def test_test_normalizes_with_the_statistics_it_is_given(rng, to, axes, reduced, keepdims):
    x, gamma, beta, mean, var = theano_problem(rng, reduced, keepdims)
    wide = [v if keepdims else np.expand_dims(v, reduced) for v in (gamma, beta, mean, var)]
    got = batch_normalization_test(*(to(v) for v in (x, gamma, beta, mean, var)), axes=axes, epsilon=0.01)
    np.testing.assert_allclose(got, (x - wide[2]) * wide[0] / np.sqrt(wide[3] + 0.01) + wide[1], **EXACT)


def test_defaults_are_theanos(rng):
    x, one = rng.normal(size=(4, 2)), np.ones(2)
    out, mean, invstd, running_mean, running_var = batch_normalization_train(
        x, one, one, running_mean=one, running_var=one
    )
    np.testing.assert_allclose(invstd, 1 / np.sqrt(x.var(0) + 1e-4), **EXACT)
    np.testing.assert_allclose(running_mean, 0.9 + 0.1 * mean, **EXACT)
    np.testing.assert_allclose(running_var, 0.9 + 0.1 * x.var(0, ddof=1), **EXACT)
    np.testing.assert_allclose(out, batch_normalization_test(x, one, one, mean, x.var(0)), **EXACT)


def test_gradients_pass_through_theanos_spelling():
    inputs = [torch.randn(5, 2, dtype=torch.float64, requires_grad=True)]
    inputs += [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(batch_normalization_train, inputs)


X, THREE = np.zeros((4, 3)), np.ones(3)


@pytest.mark.parametrize("epsilon", [0.0, 9.9e-6, -1.0])
def test_an_epsilon_that_cudnn_would_refuse_is_refused(epsilon):
    with pytest.raises(OptionError, match=re.escape(f"epsilon must be at least 1e-5, got {epsilon}")):
        batch_normalization_train(X, THREE, THREE, epsilon=epsilon)
    with pytest.raises(OptionError, match=re.escape(f"epsilon must be at least 1e-5, got {epsilon}")):
        batch_normalization_test(X, THREE, THREE, THREE, THREE, epsilon=epsilon)


def test_the_smallest_epsilon_is_allowed():
    batch_normalization_train(X, THREE, THREE, epsilon=1e-5)


@pytest.mark.parametrize("given", ["running_mean", "running_var"])
def test_one_running_statistic_without_the_other_is_refused(given):
    with pytest.raises(OptionError, match="both be given or both be None, got one of them"):
        batch_normalization_train(X, THREE, THREE, **{given: THREE})


@pytest.mark.parametrize(("axes", "text"), [("channels", "got 'channels'"), ((0, 2), "got (0, 2)"), ((), "got ()")])
def test_unknown_axes_are_named(axes, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        batch_normalization_train(X, THREE, THREE, axes)
    with pytest.raises(OptionError, match=re.escape(text)):
        batch_normalization_test(X, THREE, THREE, THREE, THREE, axes)


@pytest.mark.parametrize("wrong", range(4), ids=["gamma", "beta", "mean", "var"])
def test_a_parameter_in_neither_layout_is_named(wrong):
    arrays = [THREE] * 4
    arrays[wrong] = np.ones((3, 1))
    text = re.escape("must have the shape (3,) or (1, 3) for inputs of shape (4, 3), got (3, 1)")
    with pytest.raises(ShapeError, match=text):
        batch_normalization_test(X, *arrays)
    with pytest.raises(ShapeError, match=text):
        batch_normalization_train(X, *arrays[:2], running_mean=arrays[2], running_var=arrays[3])
