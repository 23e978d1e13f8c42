"""Evidence from paired seeds: sign-flip permutation tests, their intervals, equivalence, Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["SignFlip", "holm", "mean_interval", "sign_test", "smallest_p"]

EXACT_UP_TO = 14
DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class SignFlip:
    """The paired sign-flip permutation test of a mean difference, and the interval that it does not reject.

    Under the null hypothesis each paired difference is as likely to have the opposite sign. The p-value is the share of all
    sign patterns whose mean is at least as far from zero as the observed one: of all ``2ⁿ`` up to 14 pairs, of 20,000 random
    ones (drawn from a fixed seed, the observed one among them) beyond.

    Args:
        differences: one for each pair, finite.

    Example:
        >>> SignFlip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p     # 2 of 64 patterns are as extreme
        0.03125

    Reference:
        Fisher, The Design of Experiments, 1935, section 21. Good, Permutation Tests of Hypotheses, 2005.
    """

    differences: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean difference."""
        return float(np.mean(self.differences))

    @property
    def p(self) -> float:
        """The two-sided p-value of a mean difference of zero."""
        return self._p(0.0)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the mean differences that the test does not reject at ``1 - level``; infinite where pairs are too few."""
        return self._bound(level, -1), self._bound(level, +1)

    def _p(self, shift: float) -> float:
        d = np.asarray(self.differences) - shift
        means = _signs(len(d)) @ d
        # patterns that equal the observed one up to rounding count as equal
        reached = np.abs(means) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()
        return float(reached.mean())

    def _bound(self, level: float, side: int) -> float:
        if smallest_p(len(self.differences)) > 1 - level:
            return side * math.inf
        d = np.asarray(self.differences)
        step = float(np.ptp(d)) or 0.0
        inside, outside = self.mean, self.mean + side * step
        if step == 0.0:
            return self.mean
        while self._p(outside) > 1 - level:
            step *= 2
            inside, outside = outside, outside + side * step
        for _ in range(40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self._p(middle) > 1 - level else (inside, middle)
        return inside


def _signs(pairs: int) -> np.ndarray:
    """Return sign patterns, a row each, the observed one (all +1) first."""
    if pairs <= EXACT_UP_TO:
        bits = np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1
        return 1.0 - 2.0 * bits
    drawn = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, pairs))
    drawn[0] = 1.0
    return drawn


def smallest_p(pairs: int) -> float:
    """Return the smallest p-value that `SignFlip` can give for so many pairs: ``2 / 2ⁿ``.

    Example:
        >>> smallest_p(5) > 0.05 > smallest_p(6)    # five pairs can't show anything at 5 %
        True
    """
    return 2.0 / 2**pairs if pairs <= EXACT_UP_TO else 1.0 / DRAWS


def sign_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value that neither is smaller more often; infinite values are allowed, ties don't count.

    Example:
        >>> sign_test([1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 9, math.inf])
        0.03125
    """
    wins = sum(a < b for a, b in zip(first, second, strict=True))
    losses = sum(a > b for a, b in zip(first, second, strict=True))
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the given order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Reference:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of a mean; infinite for a single value.

    Example:
        >>> [round(bound, 2) for bound in mean_interval([1.0, 2.0, 3.0])]
        [-0.48, 4.48]
    """
    if len(values) < 2:
        return -math.inf, math.inf
    mean, half = np.mean(values), stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)
