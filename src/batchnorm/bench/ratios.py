"""Ratios of times that were measured in turns: medians, intervals, and when a ratio is noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom, gmean

from batchnorm.errors import VerificationError

__all__ = ["AGAIN", "Ratio", "interval", "is_unstable", "mean_speed_up", "multiple", "noise", "speed_up"]

AGAIN = " again"
# with fewer there is no 95 % interval for a median: 2 · 2⁻⁵ > 5 %
FEWEST = 6
UNSTABLE = 0.05
# memory that lies elsewhere does this much
LEAST_NOISE = 1.01
DRAWS = 500


@dataclass(frozen=True)
class Ratio:
    """How many times one takes what another takes: the median of the rounds' ratios, or a mean of such medians.

    Args:
        value: the ratio.
        interval: that holds it in 95 of 100 measurements.
        quartiles: half of the rounds lie between them.
        rounds: how many there were.
    """

    value: float
    interval: tuple[float, float]
    quartiles: tuple[float, float]
    rounds: int

    @classmethod
    def of(cls, longer: Sequence[float], shorter: Sequence[float]) -> "Ratio":
        """Return the ratio of two lists of times, round by round.

        Example:
            >>> Ratio.of([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]).value
            2.0
        """
        ratios = _ratios(longer, shorter)
        low, high = np.quantile(ratios, [0.25, 0.75])
        return cls(float(np.median(ratios)), interval(ratios.tolist()), (float(low), float(high)), len(ratios))

    def is_noise(self, noise: float) -> bool:
        """Say whether nothing was shown: too few rounds, an interval that holds 1, or a change by no more than ``noise``.

        Example:
            >>> Ratio(1.2, (0.9, 1.3), (1.1, 1.25), 50).is_noise(1.01)
            True
        """
        low, high = self.interval
        return self.rounds < FEWEST or low <= 1 <= high or max(self.value, 1 / self.value) <= noise

    def told(self, noise: float) -> str:
        """Return the ratio with its interval, in words where it is noise.

        Example:
            >>> Ratio(3.2, (3.1, 3.3), (3.0, 3.4), 50).told(1.01)
            '3.20× [3.10, 3.30]'
            >>> Ratio(1.02, (1.01, 1.03), (1.0, 1.04), 50).told(1.03)
            'no difference [1.01, 1.03]'
        """
        said = "no difference" if self.is_noise(noise) else f"{self.value:.2f}×"
        return f"{said} [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval for the median that holds for every distribution: two of the values themselves.

    Example:
        >>> interval([float(i) for i in range(100)])
        (39.0, 60.0)
    """
    ordered = sorted(values)
    if not ordered:
        raise VerificationError("an interval must have values, got none: measure at least one pair")
    low = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    low = max(0, low - 1)
    return ordered[low], ordered[len(ordered) - 1 - low]


def speed_up(row: dict[str, Any], name: str) -> Ratio:
    """Return how many times the first contestant of a row takes what another takes: above 1 the other is faster."""
    return Ratio.of(row["seconds"][row["first"]], row["seconds"][name])


def multiple(row: dict[str, Any], name: str, of: str) -> Ratio:
    """Return how many times a contestant takes what another takes."""
    return Ratio.of(row["seconds"][name], row["seconds"][of])


def noise(row: dict[str, Any]) -> float:
    """Return by what factor the first contestant may differ from itself, 1.01 at least."""
    return _farthest(speed_up(row, row["first"] + AGAIN))


def is_unstable(row: dict[str, Any]) -> bool:
    """Say whether the first contestant differs from itself by more than 5 %."""
    return abs(speed_up(row, row["first"] + AGAIN).value - 1) > UNSTABLE


def mean_speed_up(rows: list[dict[str, Any]], name: str) -> tuple[Ratio, float]:
    """Return the geometric mean of the speed-ups of several rows, and the factor that is noise in it."""
    again = _mean(rows, rows[0]["first"] + AGAIN)
    return _mean(rows, name), _farthest(again)


def _mean(rows: list[dict[str, Any]], name: str) -> Ratio:
    """Draw rounds again, with replacement, for the interval."""
    every = [_ratios(row["seconds"][row["first"]], row["seconds"][name]) for row in rows]
    generator = np.random.default_rng(0)
    drawn = [np.median(ratios[generator.integers(len(ratios), size=(DRAWS, len(ratios)))], axis=1) for ratios in every]
    low, high = np.quantile(gmean(drawn, axis=0), [0.025, 0.975])
    medians = [float(np.median(ratios)) for ratios in every]
    spread = np.quantile(medians, [0.25, 0.75])
    return Ratio(
        float(gmean(medians)), (float(low), float(high)), (float(spread[0]), float(spread[1])), min(map(len, every))
    )


def _farthest(ratio: Ratio) -> float:
    low, high = ratio.interval
    return max(1 / low, high, LEAST_NOISE)


def _ratios(longer: Sequence[float], shorter: Sequence[float]) -> np.ndarray:
    if len(longer) != len(shorter):
        raise VerificationError(f"times must be of the same rounds, got {len(longer)} and {len(shorter)}")
    ratios: np.ndarray = np.asarray(longer, dtype=float) / np.asarray(shorter, dtype=float)
    return ratios
