"""Rules on what a forward pass does to statistics that it should not do, or not so often."""

from collections.abc import Iterator

import numpy as np

from batchnorm.check.report import ERROR, WARNING, Finding
from batchnorm.check.rules import rule
from batchnorm.check.subject import MissingError, Subject
from batchnorm.moments import Moments
from batchnorm.observed import Observed, divergence
from batchnorm.states import NormState

__all__: list[str] = []

# KL divergence from which on two streams are different ones
DIFFERENT = 0.05


@rule("BN104", "parameters frozen while statistics still move")
def thawed(subject: Subject) -> Iterator[Finding]:
    """A layer whose γ and β get no gradient is meant to be frozen; its statistics follow every batch all the same."""
    for state in subject.states:
        meant = state.trainable is False and not state.frozen and state.moves
        if not meant or not (state.training or subject.view.learns):
            continue
        yield Finding(
            "BN104",
            state.name,
            "its γ and β are frozen, but not its running statistics: they move with every batch in training, so that what was "
            "frozen drifts to other data.",
            "freeze(layer) keeps both, whatever .train() is called later; load what has moved from the checkpoint.",
            ERROR,
            5.0,
        )


@rule("BN105", "one layer fed by several streams", "an example")
def several_streams(subject: Subject) -> Iterator[Finding]:
    """The running statistics of a layer that is called several times are those of a mixture that no call sees."""
    for norm, nodes in subject.calls():
        name, state = subject.name_of(norm), subject.state_of(norm)
        shared = () if state is None else state.shared
        if (len(nodes) < 2 and not shared) or norm.mean is None or norm.plain:
            continue
        apart = _apart(subject, name)
        if apart is not None and apart < DIFFERENT and not shared:
            continue
        often = f"it is called {len(nodes)} times in one forward pass" if len(nodes) > 1 else ""
        same = f"it holds the same running statistics as {', '.join(shared)}" if shared else ""
        differ = "" if apart is None else f", with inputs that differ (KL divergence {apart:.2g} between two calls)"
        yield Finding(
            "BN105",
            name,
            f"{often or same}{differ}: its running statistics are those of the mixture, in training each call has its own.",
            "Give each stream a layer of its own or statistics of its own (add_domains), or put the streams into one batch.",
            WARNING if apart is None else ERROR,
            4.0 + (apart or 0.0),
            {"calls": float(len(nodes))} | ({} if apart is None else {"divergence": apart}),
        )


def _apart(subject: Subject, name: str) -> float | None:
    """Return how far the inputs of two calls of a layer are apart; ``None`` without data."""
    observed = subject.observed(name)
    if observed is None or len(observed.calls) < 2:
        return None
    calls = [call for call in observed.calls if call.count > 1]
    return max((_between(a, b, observed) for a in calls for b in calls), default=0.0)


def _between(a: Moments, b: Moments, observed: Observed) -> float:
    return float(np.mean(divergence((a.mean, a.variance), (b.mean, b.variance), observed.eps)))


@rule("BN106", "statistics counted twice by activation checkpointing", "an example")
def counted_twice(subject: Subject) -> Iterator[Finding]:
    """A forward that is run again in the backward pass moves the running statistics again."""
    for name in subject.rehearsal.twice:
        yield Finding(
            "BN106",
            name,
            "its running statistics moved again in the backward pass, where activation checkpointing runs the layer a second "
            "time: every batch counts twice.",
            "convert(model): layers of this library count once.",
            ERROR,
            6.0,
        )


@rule("BN108", "modes mixed")
def mixed_modes(subject: Subject) -> Iterator[Finding]:
    """A layer in training mode in an evaluating model normalizes by the batch; the reverse freezes it for one epoch."""
    evaluates = subject.view.training is not True
    told = set()
    for state in subject.states:
        if state.mean is None or (state.frozen and not state.by_batch):
            continue
        if evaluates and state.by_batch:
            told.add(state.name)
            yield _by_batch(state.name)
        elif subject.view.training is True and not state.training:
            yield _in_evaluation(state)
    if evaluates:
        yield from _hard_wired(subject, told)


def _by_batch(name: str) -> Finding:
    return Finding(
        "BN108",
        name,
        "it normalizes by the batch while the model is in evaluation: the result for one sample depends on the others, and the "
        "running statistics are not used.",
        "Call model.eval() after the last .train(), and write no training=True into the model.",
        ERROR,
        7.0,
    )


def _in_evaluation(state: NormState) -> Finding:
    return Finding(
        "BN108",
        state.name,
        "it is in evaluation while the model trains: it normalizes by running statistics that stand still, and the next "
        ".train() of the model ends that.",
        "Call model.train() before training; if it is meant to be frozen, freeze(layer) keeps it so.",
        WARNING,
        1.0,
    )


def _hard_wired(subject: Subject, told: set[str]) -> Iterator[Finding]:
    """Yield layers whose call asks for the statistics of the batch, whatever the mode."""
    try:
        norms = list(subject.graph.norms())
    except MissingError:
        return
    for norm in norms:
        name = subject.name_of(norm)
        if norm.by_batch and norm.mean is not None and name not in told:
            yield _by_batch(name)


@rule("BN110", "momentum in another framework's convention")
def swapped_momentum(subject: Subject) -> Iterator[Finding]:
    """Torch's momentum is the weight of the new batch, Keras's that of the past; swapped, one batch is all that is kept."""
    for state in subject.states:
        if state.decay is None or state.decay >= 0.5 or not state.moves:
            continue
        own, other = subject.momentum(state.decay), subject.momentum(1 - state.decay)
        means = "of the new batch" if subject.framework == "torch" else "of the past"
        yield Finding(
            "BN110",
            state.name,
            f"momentum = {own:.4g} is the weight {means} here, so that the running statistics are those of the last batch or "
            "two: it looks like another framework's convention.",
            f"momentum = {other:.4g}; then recalibrate(model, data), or train on.",
            ERROR,
            5.5 - state.decay,
            {"momentum": own},
        )
