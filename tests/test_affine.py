import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Affine, Moments
from batchnorm.errors import BatchNormError, NotInvertibleError

numbers = st.floats(-100, 100).filter(lambda v: v == 0 or abs(v) > 1e-3)
affines = st.builds(Affine, numbers, numbers)


@given(affines, affines, affines, numbers)
def test_composition_is_application_one_after_the_other(a, b, c, x):
    np.testing.assert_allclose(a.then(b)(x), b(a(x)), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(a.then(b).then(c)(x), a.then(b.then(c))(x), rtol=1e-9, atol=1e-6)


@given(affines.filter(lambda a: a.scale != 0), numbers)
def test_inverse_undoes(a, x):
    np.testing.assert_allclose(a.inverse()(a(x)), x, rtol=1e-9, atol=1e-9 * (1 + abs(a.shift / a.scale)))


def test_from_moments_is_inference(rng):
    x = rng.normal(3, 2, (50, 4))
    gamma, beta = rng.normal(size=4), rng.normal(size=4)
    affine = Affine.from_moments(Moments.of(x), gamma, beta, eps=1e-3)
    expected = gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) + beta
    np.testing.assert_allclose(affine(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_pass():
    gamma = torch.tensor([2.0], requires_grad=True)
    (Affine.from_statistics(torch.zeros(1), torch.ones(1), gamma, eps=3.0)(torch.tensor([4.0]))).backward()
    assert gamma.grad.item() == 2.0


@pytest.mark.parametrize("zero", [0.0, np.array([1.0, 0.0]), torch.tensor([0.0, 1.0])])
def test_a_zero_scale_has_no_inverse(zero):
    with pytest.raises(NotInvertibleError, match="leave out the channels that are constant") as caught:
        Affine(zero, zero).inverse()
    assert isinstance(caught.value, BatchNormError)
