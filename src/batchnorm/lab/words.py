"""Findings in words that a person who has never seen the project understands."""

import math
from dataclasses import dataclass

__all__ = ["Finding", "Side", "describe"]


@dataclass(frozen=True, slots=True)
class Side:
    """An arm as a sentence needs it: name, median steps to the threshold, usable learning rates."""

    name: str
    steps: float
    usable: tuple[float, ...]

    def __str__(self) -> str:
        return f"“{self.name}”"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about two arms; ``better`` and ``other`` are in any order where nothing is decided."""

    question: str
    decided: bool
    equivalent: bool
    better: Side
    other: Side
    difference: float
    low: float
    high: float
    margin: float
    threshold: float
    p: float


# question -> what is measured, which way is better, how to write a number of it
_MEASURES = {
    "log_loss": ("test log-loss", "lower", 1.0, "nats"),
    "accuracy": ("test accuracy", "higher", 100.0, "points"),
}


def describe(found: Finding) -> str:
    """Return a finding as one sentence."""
    if found.question in _MEASURES:
        sentence = _measured(found)
    else:
        sentence = _steps(found) if found.question == "steps" else _usable(found)
    return f"{sentence} (p = {found.p:.2g})." if found.decided else f"{sentence}."


def _measured(f: Finding) -> str:
    what, better, scale, unit = _MEASURES[f.question]
    if f.equivalent:
        return f"{f.better} and {f.other}: no difference in {what} larger than {_amount(f.margin * scale, unit)}"
    if not f.decided:
        span = f"from {_number(f.low * scale)} to {_amount(f.high * scale, unit)}"
        size = span if math.isfinite(f.low) else "of any size"
        return f"{f.better} and {f.other}: undecided in {what}, the runs allow a difference {size}"
    near, far = sorted((abs(f.low * scale), abs(f.high * scale)))
    size = _amount(abs(f.difference * scale), unit)
    interval = f"95 % interval {_number(near)} to {_number(far)}"
    return f"{f.better} has a {better} {what} than {f.other}, by {size}, {interval}"


def _steps(f: Finding) -> str:
    goal = f"{100 * f.threshold:.1f} % validation accuracy"
    if not f.decided:
        took = f"{_count(f.better.steps)} and {_count(f.other.steps)} steps, medians"
        return f"{f.better} and {f.other}: undecided which is the sooner at {goal} ({took})"
    took = f"after {_count(f.better.steps)} steps against {_count(f.other.steps)}, medians"
    return f"{f.better} reaches {goal} sooner than {f.other}: {took}"


def _usable(f: Finding) -> str:
    spans = f"{_span(f.better.usable)} against {_span(f.other.usable)}"
    if not f.decided:
        return f"{f.better} and {f.other}: undecided which works at more learning rates ({spans})"
    return f"{f.better} works at more learning rates than {f.other}: {spans}"


def _count(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "more than all"


def _span(usable: tuple[float, ...]) -> str:
    if len(usable) < 2:
        return f"{usable[0]:g} only" if usable else "none"
    return f"{usable[0]:g} to {usable[-1]:g}"


def _number(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")


def _amount(value: float, unit: str) -> str:
    number = _number(value)
    return f"{number} {unit[:-1] if number == '1' else unit}"
