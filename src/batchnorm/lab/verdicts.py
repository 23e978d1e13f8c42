"""From rows to answers: the best learning rate of each arm, what it reaches, and what the arms' differences prove."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from batchnorm.lab import words
from batchnorm.lab.arms import Arm
from batchnorm.lab.statistics import SignFlip, holm, mean_interval, sign_test, smallest_p

__all__ = ["ArmResult", "Estimate", "Evidence", "Margins", "Verdict", "analyse", "runs_at_best"]

Row = dict[str, Any]
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval, cut to the values that are possible."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], most: float = math.inf) -> "Estimate":
        """Estimate the mean of ``values``, which lie between 0 and ``most``, by Student's interval."""
        low, high = mean_interval(values)
        cut = (low, high) if len(values) < 2 else (max(low, 0.0), min(high, most))
        return cls(float(np.mean(values)), *cut)


@dataclass(frozen=True, slots=True)
class Margins:
    """Differences that would not matter, fixed before looking: the bounds of the equivalence tests.

    Args:
        log_loss: in nats.
        accuracy: a share; 0.01 is one point.
    """

    log_loss: float = 0.03
    accuracy: float = 0.01


@dataclass(frozen=True, slots=True)
class AtRate:
    """An arm at one learning rate, over all seeds."""

    learning_rate: float
    val_log_loss: float
    test_log_loss: Estimate
    diverged: int


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What one arm reaches.

    Args:
        arm: the arm.
        learning_rate: the best one, by mean validation log-loss.
        at_edge: the best one is the smallest or largest of the grid: a wider grid may hold a better one.
        log_loss: on test rows, nats, at the best learning rate; diverged runs count as the worst that any run scored.
        accuracy: on test rows, at the best learning rate; diverged runs count as guessing.
        steps: median steps to the threshold at the best learning rate; infinite where most seeds never reach it.
        usable: learning rates, side by side in the grid, at which most seeds reach the threshold.
        rates: the arm at every learning rate.
        scores: per seed and question, what `Verdict` compares.
        best_seed: the seed with the lowest validation log-loss at the best learning rate.
    """

    arm: Arm
    learning_rate: float
    at_edge: bool
    log_loss: Estimate
    accuracy: Estimate
    steps: float
    usable: tuple[float, ...]
    rates: tuple[AtRate, ...]
    scores: dict[str, tuple[float, ...]]
    best_seed: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the paired seeds prove about two arms in one question.

    Args:
        question: ``"log_loss"``, ``"accuracy"``, ``"steps"`` or ``"usable"``.
        first: name of an arm.
        second: name of another.
        difference: mean of first minus second; for steps, the share of seeds where first takes longer minus the share where
            second does.
        low: lower end of the 95 % interval, NaN for steps.
        high: upper end.
        p: two-sided.
        p_holm: corrected for the number of pairs of arms.
        outcome: ``"first"`` or ``"second"`` is better, ``"equivalent"``, or ``"undecided"``.
        text: the same in words.
    """

    question: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    outcome: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Evidence:
    """All answers of a comparison.

    Args:
        results: of each arm, in the order of the arms.
        verdicts: of each pair of arms and question.
        best: the arm with the lowest validation log-loss at its best learning rate.
        threshold: validation accuracy that "steps" and "usable" ask for.
        headline: whether batch normalization helps, in one sentence; empty where no arm has it or none is without.
        notes: what limits the evidence, in words.
    """

    results: tuple[ArmResult, ...]
    verdicts: tuple[Verdict, ...]
    best: ArmResult
    threshold: float
    headline: str
    notes: tuple[str, ...]


def runs_at_best(rows: Sequence[Row], result: ArmResult) -> list[Row]:
    """Return the runs of an arm at its best learning rate."""
    return [row for row in rows if (row["arm"], row["learning_rate"]) == (result.arm.name, result.learning_rate)]


def analyse(
    rows: Sequence[Row],
    arms: Sequence[Arm],
    rates: Sequence[float],
    *,
    chance: float,
    margins: Margins | None = None,
    threshold: float | None = None,
) -> Evidence:
    """Answer all questions from finished rows.

    Args:
        rows: one for each arm, learning rate and seed.
        arms: in the order to show them.
        rates: the grid.
        chance: accuracy of always naming the most frequent class.
        margins: of the equivalence tests.
        threshold: validation accuracy to reach; by default 90 % of the way from chance to the best arm's.
    """
    scored = _Scores(rows, rates, chance)
    best_rates = {arm.name: scored.best_rate(arm.name) for arm in arms}
    if threshold is None:
        reached = max(np.mean(scored.at("val_accuracy", name, rate)) for name, rate in best_rates.items())
        threshold = float(chance + 0.9 * (reached - chance))
    results = tuple(_result(arm, best_rates[arm.name], scored, threshold) for arm in arms)
    verdicts = tuple(
        verdict for question in _QUESTIONS for verdict in _verdicts(question, results, margins or Margins(), threshold)
    )
    best = min(results, key=_validated)
    notes = tuple(_notes(results, len(scored.seeds)))
    return Evidence(results, verdicts, best, threshold, _headline(results, verdicts), notes)


def _validated(result: ArmResult) -> float:
    """Return the mean validation log-loss of an arm at its best rate."""
    return next(at.val_log_loss for at in result.rates if at.learning_rate == result.learning_rate)


def _headline(results: Sequence[ArmResult], verdicts: Sequence[Verdict]) -> str:
    """Compare the best arm with batch normalization to the first arm without any."""
    plain = [r for r in results if r.arm.norm == "none" and r.arm.input != "norm"]
    normalized = [r for r in results if r.arm.norm == "batch"]
    if not (plain and normalized):
        return ""
    reference, arm = plain[0].arm.name, min(normalized, key=_validated).arm.name
    outcomes = {}
    for verdict in verdicts:
        if {verdict.first, verdict.second} == {reference, arm}:
            won = {"first": verdict.first, "second": verdict.second}.get(verdict.outcome)
            outcomes[verdict.question] = verdict.outcome if won is None else ("better" if won == arm else "worse")
    return words.headline(arm, reference, outcomes)


class _Scores:
    """Rows by arm and learning rate, seeds in order, with a number for runs that diverged."""

    def __init__(self, rows: Sequence[Row], rates: Sequence[float], chance: float) -> None:
        self.rates = sorted(rates)
        self.seeds = sorted({row["seed"] for row in rows})
        self.rows = {(row["arm"], row["learning_rate"], row["seed"]): row for row in rows}
        losses = [row[key] for row in rows for key in ("val_log_loss", "test_log_loss") if row[key] is not None]
        worst = max([*losses, math.log(2)])
        self.diverged = {"val_log_loss": worst, "test_log_loss": worst}
        self.diverged |= {"val_accuracy": chance, "test_accuracy": chance}

    def rows_at(self, arm: str, rate: float) -> list[Row]:
        return [self.rows[arm, rate, seed] for seed in self.seeds]

    def at(self, key: str, arm: str, rate: float) -> list[float]:
        return [self.diverged[key] if row[key] is None else row[key] for row in self.rows_at(arm, rate)]

    def best_rate(self, arm: str) -> float:
        return min(self.rates, key=lambda rate: float(np.mean(self.at("val_log_loss", arm, rate))))


def _result(arm: Arm, rate: float, scored: _Scores, threshold: float) -> ArmResult:
    rows = scored.rows_at(arm.name, rate)
    usable_by_seed = [
        _longest_run([scored.at("val_accuracy", arm.name, r)[i] >= threshold for r in scored.rates])
        for i in range(len(scored.seeds))
    ]
    most = [np.median(scored.at("val_accuracy", arm.name, r)) >= threshold for r in scored.rates]
    scores = {
        "log_loss": tuple(scored.at("test_log_loss", arm.name, rate)),
        "accuracy": tuple(scored.at("test_accuracy", arm.name, rate)),
        "steps": tuple(_steps_to(row, threshold) for row in rows),
        "usable": tuple(float(len(run)) for run in usable_by_seed),
    }
    return ArmResult(
        arm=arm,
        learning_rate=rate,
        at_edge=len(scored.rates) > 1 and rate in (scored.rates[0], scored.rates[-1]),
        log_loss=Estimate.of(scores["log_loss"]),
        accuracy=Estimate.of(scores["accuracy"], most=1.0),
        steps=float(np.median(scores["steps"])),
        usable=tuple(scored.rates[i] for i in _longest_run(most)),
        rates=tuple(_at_rate(arm.name, r, scored) for r in scored.rates),
        scores=scores,
        best_seed=scored.seeds[int(np.argmin(scored.at("val_log_loss", arm.name, rate)))],
    )


def _at_rate(arm: str, rate: float, scored: _Scores) -> AtRate:
    return AtRate(
        rate,
        float(np.mean(scored.at("val_log_loss", arm, rate))),
        Estimate.of(scored.at("test_log_loss", arm, rate)),
        sum(row["status"] == "diverged" for row in scored.rows_at(arm, rate)),
    )


def _steps_to(row: Row, threshold: float) -> float:
    """Return the first recorded step whose validation accuracy reaches the threshold; infinite where none does."""
    return next(
        (step for step, _, _, accuracy in row["curve"] if accuracy is not None and accuracy >= threshold),
        math.inf,
    )


def _longest_run(flags: Sequence[Any]) -> range:
    """Return the positions of the longest run of true values.

    Example:
        >>> _longest_run([True, False, True, True])
        range(2, 4)
    """
    best, start = range(0), 0
    for i, flag in enumerate([*flags, False]):
        if not flag:
            best = max(best, range(start, i), key=len)
            start = i + 1
    return best


# difference, lower and upper end of its interval, p
_Numbers = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class _Question:
    key: str
    lower_is_better: bool
    test: Callable[[Sequence[float], Sequence[float]], _Numbers]


def _by_sign_flip(first: Sequence[float], second: Sequence[float]) -> _Numbers:
    flip = SignFlip([a - b for a, b in zip(first, second, strict=True)])
    return flip.mean, *flip.interval(), flip.p


def _by_sign(first: Sequence[float], second: Sequence[float]) -> _Numbers:
    """Compare times that may be infinite, by how often each is the longer one."""
    longer = sum(a > b for a, b in zip(first, second, strict=True))
    shorter = sum(a < b for a, b in zip(first, second, strict=True))
    return (longer - shorter) / len(first), math.nan, math.nan, sign_test(first, second)


_QUESTIONS = (
    _Question("log_loss", True, _by_sign_flip),
    _Question("accuracy", False, _by_sign_flip),
    _Question("steps", True, _by_sign),
    _Question("usable", False, _by_sign_flip),
)


def _verdicts(question: _Question, results: Sequence[ArmResult], margins: Margins, threshold: float) -> list[Verdict]:
    if question.key == "usable" and len(results[0].rates) == 1:
        return []
    pairs = list(combinations(results, 2))
    found = [question.test(a.scores[question.key], b.scores[question.key]) for a, b in pairs]
    corrected = holm([p for *_, p in found])
    return [
        _verdict(question, a, b, numbers, p_holm, margins, threshold)
        for (a, b), numbers, p_holm in zip(pairs, found, corrected, strict=True)
    ]


def _verdict(
    question: _Question,
    a: ArmResult,
    b: ArmResult,
    numbers: _Numbers,
    p_holm: float,
    margins: Margins,
    threshold: float,
) -> Verdict:
    difference, low, high, p = numbers
    margin = {"log_loss": margins.log_loss, "accuracy": margins.accuracy}.get(question.key)
    if p_holm <= LEVEL and difference != 0:
        outcome = "first" if (difference < 0) == question.lower_is_better else "second"
    else:
        outcome = "equivalent" if margin and _within(a, b, question.key, margin) else "undecided"
    better, other = (b, a) if outcome == "second" else (a, b)
    text = words.describe(
        words.Finding(
            question=question.key,
            decided=outcome in ("first", "second"),
            equivalent=outcome == "equivalent",
            better=words.Side(better.arm.name, better.steps, better.usable),
            other=words.Side(other.arm.name, other.steps, other.usable),
            difference=difference,
            low=low,
            high=high,
            margin=margin or 0.0,
            threshold=threshold,
            p=p_holm,
        )
    )
    return Verdict(question.key, a.arm.name, b.arm.name, difference, low, high, p, p_holm, outcome, text)


def _within(first: ArmResult, second: ArmResult, question: str, margin: float) -> bool:
    """Two one-sided tests at 5 %: the 90 % interval lies inside the margins."""
    pairs = zip(first.scores[question], second.scores[question], strict=True)
    low, high = SignFlip([a - b for a, b in pairs]).interval(0.90)
    return -margin < low and high < margin


def _notes(results: Sequence[ArmResult], seeds: int) -> list[str]:
    notes = []
    pairs = len(results) * (len(results) - 1) // 2
    if pairs and smallest_p(seeds) * pairs > LEVEL:
        enough = next(n for n in range(seeds, 100) if smallest_p(n) * pairs <= LEVEL or n > 30)
        notes.append(
            f"{seeds} seeds can't prove a difference between {len(results)} arms at 5 %: take at least {enough}."
        )
    notes += [
        f"The best learning rate of “{r.arm.name}”, {r.learning_rate:g}, is at the edge of the grid: "
        "a wider grid may hold a better one."
        for r in results
        if r.at_edge
    ]
    return notes
