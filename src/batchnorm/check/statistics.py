"""Rules on what is stored: running statistics, their dtype, ε, and what became of it in a conversion."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from batchnorm.check.report import ERROR, WARNING, Finding
from batchnorm.check.rules import rule
from batchnorm.check.subject import MissingError, Subject
from batchnorm.states import NormState

__all__: list[str] = []

RECALIBRATE = "measure them anew: recalibrate(model, data)"
# the largest numbers of dtypes that statistics should not be kept in
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
# share of the initial values up to which a running mean of zero may be theirs; what float32 leaves of a constant's variance,
# beside its mean's square; what one update rounds off; and what float32 can't tell from zero
DEAD, ROUNDED, ROUNDING, NOTHING = 1e-2, 1e-6, 1e-7, 1e-37
# layers that a group must have before one of them is the odd one out, and the share of the others that must agree
GROUP, SAME = 3, 0.9


@rule("BN101", "statistics never updated")
def never_updated(subject: Subject) -> Iterator[Finding]:
    """Running mean 0 and variance 1 in every channel are what a layer starts with."""
    kept = [state for state in subject.states if state.mean is not None]
    fresh = [state for state in kept if state.is_initial]
    if len(fresh) == len(kept) and subject.trains:
        # a new model that is about to be trained
        return
    reached = _reached(subject) if fresh else None
    for state in fresh:
        if reached is not None and state.name not in reached:
            # left over in the model, and never called
            continue
        counted = f", although {state.updates} batches were counted" if state.updates else ""
        yield Finding(
            "BN101",
            state.name,
            f"its running mean is 0 and its running variance 1 in all channels, as at initialization{counted}: "
            "evaluation does not normalize.",
            f"Train it, load its statistics, or {RECALIBRATE}.",
            ERROR,
            2.0,
        )


def _reached(subject: Subject) -> set[str] | None:
    """Return the layers that an example reaches; ``None`` without one."""
    try:
        return set(subject.rehearsal.calls)
    except MissingError:
        return None


@rule("BN102", "non-finite or negative running statistics")
def not_finite(subject: Subject) -> Iterator[Finding]:
    """A mean that is no number, or a variance that is none or below zero, makes every output of its channel wrong."""
    for state in subject.states:
        for what, values in _vectors(state):
            bad = ~np.isfinite(values)
            if what == "running variance":
                bad |= values < 0
            if bad.any():
                first = int(np.flatnonzero(bad)[0])
                learned = what in ("γ", "β")
                yield Finding(
                    "BN102",
                    state.name,
                    f"its {what} is {values[first]:g} in channel {first}, and wrong in {int(bad.sum())} of {len(bad)} channels"
                    + ("." if learned else ": one bad batch is enough, and stays for ever."),
                    "Go back to a checkpoint." if learned else f"Go back to a checkpoint, or {RECALIBRATE}.",
                    ERROR,
                    100.0 + int(bad.sum()) / len(bad),
                    {"channels": float(bad.sum())},
                )
                break


def _vectors(state: NormState) -> list[tuple[str, np.ndarray]]:
    named = (("γ", state.gamma), ("β", state.beta))
    stored = (("running mean", state.mean), ("running variance", state.variance))
    return [(what, values) for what, values in (*stored, *named) if values is not None]


@rule("BN109", "half-precision statistics, or a variance beyond the dtype")
def half_precision(subject: Subject) -> Iterator[Finding]:
    """Updates of a running mean in half precision vanish; a variance beyond 65,504 is infinite in float16."""
    for state in subject.states:
        if state.variance is None or state.dtype not in _LARGEST:
            continue
        largest = float(np.max(state.variance, initial=0.0))
        observed = subject.observed(state.name)
        seen = 0.0 if observed is None else float(np.max(observed.variance, initial=0.0))
        beyond = max(largest, seen) > _LARGEST[state.dtype] / 2
        size = f", and a variance of {max(largest, seen):.3g} is (nearly) beyond it" if beyond else ""
        yield Finding(
            "BN109",
            state.name,
            f"it keeps its running statistics in {state.dtype}{size}: three digits, in which small updates are lost.",
            "Keep them in float32: convert(model, wide_statistics=True) before .half() or .bfloat16(), or report.fix().",
            ERROR,
            3.0 if beyond else 1.0,
            {"largest variance": max(largest, seen)},
        )


@rule("BN111", "ε lost in a conversion")
def odd_eps(subject: Subject) -> Iterator[Finding]:
    """One layer with another ε than all of its neighbours, or without one, was converted or merged carelessly."""
    for state in subject.states:
        if state.mean is not None and state.eps <= 0:
            yield _lost(state, 1e-5, "it has no ε")
    kept = [state for state in subject.states if state.mean is not None and state.eps > 0]
    for state in kept:
        mates = Counter(mate.eps for mate in _mates(state, kept))
        usual, count = mates.most_common(1)[0] if mates else (state.eps, 0)
        if state.eps != usual and count >= max(GROUP - 1, SAME * mates.total()):
            yield _lost(state, usual, f"its ε is {state.eps:g}, that of {count} layers around it is {usual:g}")


def _lost(state: NormState, usual: float, message: str) -> Finding:
    assert state.variance is not None  # noqa: S101
    with np.errstate(all="ignore"):
        ratio = np.sqrt((state.variance + usual) / (state.variance + max(state.eps, 0.0)))
    effect = float(np.nanmax(np.abs(ratio - 1), initial=0.0))
    told = f", which changes its outputs by up to {effect:.1%}" if np.isfinite(effect) else ""
    return Finding(
        "BN111",
        state.name,
        f"{message}{told}: it may have been lost in a conversion (torch starts from 1e-5, Keras from 1e-3).",
        f"Give it the ε that it was trained with, eps = {usual:g}.",
        ERROR if effect > 0.01 else WARNING,
        1.0 + min(effect, 10.0),
        {"eps": state.eps, "usual eps": usual, "effect": effect},
    )


def _mates(state: NormState, kept: list[NormState]) -> list[NormState]:
    """Return the other layers of the same part of the model; all others, for a layer that is a part itself.

    A small part is held against those before and behind it; not at the end, where heads come with an ε of their own.
    """
    part, dot, _ = state.name.partition(".")
    same = [other for other in kept if other.name.startswith(f"{part}.")] if dot else kept
    if len(same) < GROUP and state is not kept[-1]:
        number = kept.index(state)
        same = kept[max(0, number - GROUP) : number + GROUP + 1]
    return [other for other in same if other is not state]


@rule("BN205", "dead channels")
def dead_channels(subject: Subject) -> Iterator[Finding]:
    """A channel that was constant in training has variance 0: evaluation multiplies whatever comes by γ/√ε."""
    for state in subject.states:
        if state.variance is None or state.is_initial:
            continue
        dead = _stored_dead(state)
        if state.gamma is not None:
            dead &= state.gamma != 0
        if not dead.any():
            continue
        times = 1 / np.sqrt(state.variance[dead] + max(state.eps, np.finfo(np.float64).tiny))
        seen = subject.observed(state.name)
        both = "" if seen is None else f" ({int(((seen.variance == 0) & dead).sum())} of them in this data too)"
        yield Finding(
            "BN205",
            state.name,
            f"{int(dead.sum())} of {len(dead)} channels never varied in training{both}: in evaluation a value beside the mean "
            f"is multiplied by up to {times.max():.3g}.",
            "Drop channels that are constant (prune), feed them data in which they vary, or give the layer a larger eps.",
            WARNING,
            float(dead.mean()),
            {"channels": float(dead.sum()), "amplification": float(times.max())},
        )


def _stored_dead(state: NormState) -> np.ndarray:
    """Return the channels whose running variance is what is left of its initial 1."""
    assert state.variance is not None  # noqa: S101
    share = state.initial_share
    if share is None or (state.mean is not None and not state.mean.any() and share > DEAD):
        share = 0.0
    # not beside ε: a channel of small values is not dead
    rounded = 0.0 if state.mean is None else np.minimum(ROUNDED * state.mean**2, DEAD * state.eps)
    left = rounded + NOTHING + ROUNDING * share * (1 + (state.updates or 0))
    # statistics may have been measured anew, and hold nothing of their initial values
    dead: np.ndarray = (np.abs(state.variance - share) <= left) | (np.abs(state.variance) <= rounded + NOTHING)
    return dead
