import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from batchnorm.lab.statistics import SignFlip, holm, mean_interval, sign_test, smallest_p

differences = st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=2, max_size=10)


@settings(max_examples=50)
@given(differences)
def test_p_is_scipys_exact_one(d):
    expected = stats.permutation_test(
        (d, np.zeros(len(d))), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=2 ** len(d)
    )
    # scipy doubles the smaller tail, which for the sign flip's symmetric distribution is the same number
    np.testing.assert_allclose(SignFlip(d).p, expected.pvalue, rtol=1e-12)


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=7, max_size=10), st.sampled_from([0.9, 0.95]))
def test_the_interval_holds_what_the_test_does_not_reject(d, level):
    flip = SignFlip(d)
    low, high = flip.interval(level)
    assert low <= flip.mean <= high
    if high == low:
        return
    inside, outside = 1e-6 * (high - low), -1e-6 * (high - low)
    for bound, side in ((low, 1), (high, -1)):
        assert SignFlip(np.asarray(d) - (bound + side * inside)).p > 1 - level
        assert SignFlip(np.asarray(d) - (bound + side * outside)).p <= 1 - level + 1e-12


def test_many_pairs_are_drawn_and_near_the_exact_p(rng):
    d = rng.normal(0.4, 1.0, 20)
    exact = stats.permutation_test(
        (d, np.zeros(20)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        vectorized=True,
        permutation_type="samples",
        n_resamples=2**20,
        batch=2**14,
    ).pvalue
    # 20,000 draws: standard error √(p(1-p)/20000) ≤ 0.0036, four of them
    assert abs(SignFlip(d).p - exact) < 0.015
    assert SignFlip(d).p == SignFlip(d).p


def test_the_observed_pattern_is_among_the_drawn_ones():
    assert SignFlip([1.0] * 20).p == smallest_p(20) == 1 / 20_000


def test_holm_steps_down():
    """Bonferroni would give 0.12 to the largest."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_interval_covers_as_often_as_it_says(rng):
    covered = sum(low <= 1.0 <= high for low, high in (SignFlip(rng.normal(1, 2, 8)).interval() for _ in range(300)))
    # 95 % of 300 is 285 ± 3.8
    assert 270 <= covered <= 298


def test_too_few_pairs_can_prove_nothing():
    assert smallest_p(5) == 1 / 16
    assert SignFlip([1.0] * 4 + [2.0]).interval() == (-math.inf, math.inf)


def test_equal_differences_have_a_point_for_an_interval():
    assert SignFlip([0.5] * 8).interval() == (0.5, 0.5)
    assert SignFlip([0.0] * 8).p == 1.0


def test_sign_test_with_runs_that_never_arrive():
    assert sign_test([math.inf] * 3, [math.inf] * 3) == 1.0
    assert sign_test([10] * 8, [math.inf] * 8) == pytest.approx(2 / 2**8)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_and_never_below_the_raw_p(p):
    corrected = holm(p)
    order = np.argsort(p, kind="stable")
    assert all(c >= v for c, v in zip(corrected, p, strict=True))
    assert list(np.array(corrected)[order]) == sorted(corrected)
    assert corrected[order[0]] == min(1.0, len(p) * min(p))


def test_mean_interval_is_students(rng):
    values = rng.normal(size=12)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose(mean_interval(values), (expected.low, expected.high))
    assert mean_interval([1.0]) == (-math.inf, math.inf)
