"""Findings in words that a person who has never seen the project understands."""

import math
from dataclasses import dataclass

__all__ = ["Finding", "Side", "describe", "headline", "span"]


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


# question -> what a better arm does, what a worse one does, what is open where nothing is decided
_EFFECTS = {
    "log_loss": ("predicts better", "predicts worse", "whether it predicts better"),
    "accuracy": ("is right more often", "is right less often", "whether it is right more often"),
    "steps": ("learns sooner", "learns later", "whether it learns sooner"),
    "usable": (
        "works at more learning rates",
        "works at fewer learning rates",
        "whether it works at more learning rates",
    ),
}


def headline(arm: str, reference: str, outcomes: dict[str, str]) -> str:
    """Return the answer to "does it help?" as one sentence.

    Args:
        arm: name of the arm with batch normalization.
        reference: name of the arm without.
        outcomes: for each question ``"better"``, ``"worse"``, ``"equivalent"`` or ``"undecided"``.

    Example:
        >>> headline("before", "none", {"log_loss": "better", "accuracy": "equivalent"})
        'Batch normalization (“before”) helps here: compared with “none” it predicts better.'
    """
    better = [_EFFECTS[q][0] for q, outcome in outcomes.items() if outcome == "better"]
    worse = [_EFFECTS[q][1] for q, outcome in outcomes.items() if outcome == "worse"]
    still = [_EFFECTS[q][2] for q, outcome in outcomes.items() if outcome == "undecided"]
    if better and worse:
        verdict = f"helps and hurts here: compared with “{reference}” it {_listed(better)}, but {_listed(worse)}."
    elif better or worse:
        effect = "helps" if better else "hurts"
        verdict = f"{effect} here: compared with “{reference}” it {_listed(better or worse)}."
    elif still:
        verdict = f"makes no difference to “{reference}” here that these runs could prove."
    else:
        verdict = f"makes no difference to “{reference}” here that matters."
    ending = f" Open: {_listed(still)}." if still and (better or worse) else ""
    return f"Batch normalization (“{arm}”) {verdict}{ending}"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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
        span = f"{_number(f.low * scale)} to {_amount(f.high * scale, unit)}"
        size = (
            f"first minus second, before correction: {span}" if math.isfinite(f.low) else "any difference is possible"
        )
        return f"{f.better} and {f.other}: undecided in {what} ({size})"
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
    spans = f"{span(f.better.usable)} against {span(f.other.usable)}"
    if not f.decided:
        return f"{f.better} and {f.other}: undecided which works at more learning rates ({spans})"
    return f"{f.better} works at more learning rates than {f.other}: {spans}"


def _count(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "more than all"


def span(usable: tuple[float, ...]) -> str:
    """Return a stretch of learning rates in words."""
    if len(usable) < 2:
        return f"{usable[0]:g} only" if usable else "none"
    return f"{usable[0]:g} to {usable[-1]:g}"


def _number(value: float) -> str:
    # the ends of an interval are found to about nine digits
    return f"{0.0 if abs(value) < 1e-6 else value:.2g}".replace("-", "−")


def _amount(value: float, unit: str) -> str:
    number = _number(value)
    return f"{number} {unit[:-1] if number == '1' else unit}"
