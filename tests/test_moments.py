import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm import Moments
from batchnorm.errors import OptionError, ShapeError
from oracle import assert_near

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 0)


def parts_of(seed, sizes, loc=0.0, scale=1.0):
    x = np.random.default_rng(seed).normal(loc, scale, (sum(sizes), 3))
    return x, np.split(x, np.cumsum(sizes)[:-1])


@given(st.integers(0, 2**32 - 1), sizes, st.sampled_from([0.0, 1.0, -1e4]))
def test_merged_parts_are_the_whole(seed, sizes, loc):
    x, parts = parts_of(seed, sizes, loc)
    merged = Moments.empty().merge(*(Moments.of(p) for p in parts))
    assert merged.count == len(x)
    assert_near(merged.mean, x.mean(0), ulps=16)
    # a variance of 1 beside a mean of 10⁴: rounding of the values themselves is 10⁴ ulps of the variance
    np.testing.assert_allclose(merged.variance, x.var(0), rtol=1e-11, atol=1e-15 * loc**2)


@given(st.integers(0, 2**32 - 1), sizes)
def test_weights_are_frequencies(seed, sizes):
    rng = np.random.default_rng(seed)
    x, parts = parts_of(seed, sizes)
    w = rng.integers(0, 4, len(x))
    weights = np.split(w.astype(float)[:, None], np.cumsum(sizes)[:-1])
    merged = Moments.empty().merge(*(Moments.of(p, weight=v) for p, v in zip(parts, weights, strict=True)))
    repeated = Moments.of(np.repeat(x, w, axis=0))
    assert np.all(merged.count == w.sum())
    np.testing.assert_allclose(merged.mean, repeated.mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(merged.m2, repeated.m2, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(0, 9)] * 3))
def test_merge_is_associative_and_commutative(seed, sizes):
    _, parts = parts_of(seed, sizes, loc=3.0)
    a, b, c = (Moments.of(p) for p in parts)
    for other in (a.merge(b.merge(c)), c.merge(b, a)):
        np.testing.assert_allclose(other.mean, a.merge(b).merge(c).mean, rtol=1e-13)
        np.testing.assert_allclose(other.m2, a.merge(b).merge(c).m2, rtol=1e-12, atol=1e-13)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_an_empty_part_changes_no_bit(seed, size):
    x, _ = parts_of(seed, [size], loc=1e4)
    whole = Moments.of(x)
    for empty in (Moments.empty(), Moments.of(x[:0]), Moments.of(x, weight=np.zeros((size, 1)))):
        for merged in (whole.merge(empty), empty.merge(whole)):
            assert np.array_equal(merged.mean, whole.mean)
            assert np.array_equal(merged.m2, whole.m2)
            assert np.all(merged.count == whole.count)


def test_two_empty_parts_are_empty():
    merged = Moments.empty().merge(Moments.empty())
    assert (merged.count, merged.mean, merged.m2) == (0, 0.0, 0.0)
    assert merged.variance == merged.unbiased_variance == 0.0


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_float32_values_with_a_large_mean(rng, ratio):
    """mean/std = 10⁴ in float32, cut into uneven parts: E[x²] - E[x]² would be wrong by a factor of 100."""
    x = rng.normal(ratio, 1.0, (4096, 5)).astype(np.float32)
    parts = [Moments.of(p) for p in np.split(x, [7, 8, 1000])]
    merged = parts[0].merge(*parts[1:])
    exact = x.astype(np.float64)
    np.testing.assert_allclose(merged.variance, exact.var(0), rtol=1e-11)
    np.testing.assert_allclose(merged.unbiased_variance, exact.var(0, ddof=1), rtol=1e-11)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_float32_parts_merge_stably(seed):
    """Only arithmetic in the arrays' own dtype is used: float32 Moments lose no more than float32 rounding."""
    x = np.random.default_rng(seed).normal(1e4, 1.0, (512, 1))
    narrow = [
        Moments(m.count, m.mean.astype(np.float32), m.m2.astype(np.float32))
        for m in (Moments.of(p) for p in np.split(x, 8))
    ]
    merged = narrow[0].merge(*narrow[1:])
    assert merged.mean.dtype == np.float32
    # the mean of a part is rounded to 5e-4 beside a spread of 1
    np.testing.assert_allclose(merged.variance, x.var(0), rtol=2e-3)


def test_every_array_library_gives_the_same(rng):
    import jax

    x = rng.normal(size=(6, 3, 2))
    expected = Moments.of(x)
    got = Moments.of(torch.from_numpy(x))
    np.testing.assert_allclose(got.m2.numpy(), expected.m2, rtol=1e-13)
    with jax.enable_x64(True):
        got = Moments.of(jax.numpy.asarray(x)).merge(Moments.of(jax.numpy.asarray(x[:0])))
        np.testing.assert_allclose(np.asarray(got.m2), expected.m2, rtol=1e-13)


def test_python_numbers_are_enough():
    assert Moments(2, 1.0, 2.0).merge(Moments(1, 4.0, 0.0)).mean == 2.0


def test_nan_of_weight_zero_is_not_looked_at():
    x = np.array([[1.0], [np.nan], [3.0]])
    measured = Moments.of(x, weight=np.array([[1.0], [0.0], [1.0]]))
    assert float(measured.mean[0]) == 2.0
    assert float(measured.variance[0]) == 1.0


def test_axes_out_of_range_are_named():
    with pytest.raises(OptionError, match=r"array of 2 dimensions, got \(2,\)"):
        Moments.of(np.zeros((2, 3)), axes=2)
    with pytest.raises(OptionError, match="got 'spacial'"):
        Moments.of(np.zeros((2, 3)), axes="spacial")
    with pytest.raises(ShapeError, match="got dtype int64"):
        Moments.of(np.zeros((2, 3), dtype=np.int64))
