"""Rules on training: how many values a batch has, and what the optimizer, dropout and depth do to a norm."""

from collections.abc import Iterator
from math import sqrt

import numpy as np

from batchnorm.check.report import ERROR, WARNING, Finding
from batchnorm.check.rules import rule
from batchnorm.check.subject import MissingError, Subject
from batchnorm.check.wrong import WRONG, output_error
from batchnorm.graph import Activation, Node, Normalize

__all__: list[str] = []

# values a channel and samples of a batch from which on its statistics are good enough
VALUES, SAMPLES = 16, 8
# norms with activations in a row that are too many, and by what each multiplies the gradient's square at initialization
DEEP, GROWTH = 30, 1.47
# squared move of the mean that dropout can't cause, and how far (in logarithms) the variance while it drops may be from the
# stored one
MOVED, ALIKE = 0.05, 0.4
# how far dropout may widen a variance beyond 1/(1 - rate), where means are large
WIDENED = 4.0
# forwards to an optimizer's step that are more than one
SEVERAL = 1.5
NOT_TRAINED = "needs a model that is trained (training=True, an optimizer, or a model in training mode)"


@rule("BN107", "one value a channel", "an example, and a loader or a model that is trained")
def one_value(subject: Subject) -> Iterator[Finding]:
    """One value has no variance: the output is β whatever comes in, or training stops with an error."""
    samples, told, cure = _smallest_batch(subject)
    for name, places, values in subject.values(samples):
        state = subject.by_name.get(name)
        if values == 1 and (state is None or state.moves):
            yield Finding(
                "BN107",
                name,
                f"{told}, and {places} place of it reaches this layer: one value a channel, which has no variance.",
                cure,
                ERROR,
                6.5,
                {"values": 1.0},
            )


def _smallest_batch(subject: Subject) -> tuple[int | None, str, str]:
    """Return the size of the smallest batch of the training (``None`` for the example's), in words, and what to do."""
    if subject.loader is None:
        if not subject.trains:
            raise MissingError(NOT_TRAINED)
        return None, "the example is one sample", "Larger batches, or convert(model, on_single='running')."
    sizes = subject.sizes
    if sizes.usual == 1:
        return 1, "each batch of the loader has one sample", "Larger batches, or convert(model, on_single='running')."
    if sizes.last is None:
        raise MissingError("needs a loader that tells how many samples it has")
    told = f"the last batch of the loader has {sizes.last} sample ({sizes.samples} samples in batches of {sizes.usual})"
    return sizes.last, told, "drop_last=True in the loader, another batch size, or convert(model, on_single='skip')."


@rule("BN201", "too few values a channel", "an example; a loader tells the size of batches")
def few_values(subject: Subject) -> Iterator[Finding]:
    """The deviation of m values is off by about 1/√(2m), and a gradient keeps (m - 2)/m of its energy."""
    if not subject.trains:
        raise MissingError(NOT_TRAINED)
    samples = _usual_size(subject)
    for name, places, values in subject.values(samples):
        state = subject.by_name.get(name)
        if state is not None and not state.moves and not state.by_batch:
            continue
        rows = values // max(1, places)
        if _are_few(values, places, samples) and values > 1:
            yield Finding(
                "BN201",
                name,
                f"a batch has {values} values a channel ({rows} samples × {places} places): its deviation is off by about "
                f"{1 / sqrt(2 * values):.0%}, and the statistics of training are not those of evaluation.",
                "Larger batches, sync(model) over processes, convert(model, renorm=True), or freeze(model) when fine-tuning.",
                WARNING,
                1.0 / values,
                {"values": float(values), "samples": float(rows)},
            )


@rule("BN202", "weight decay on γ, β", "the optimizer")
def decayed(subject: Subject) -> Iterator[Finding]:
    """Decay of γ makes no function simpler: the next layer undoes it; decay of β moves thresholds to zero."""
    for name, decay in subject.optimization.decayed.items():
        yield Finding(
            "BN202",
            name,
            f"the optimizer decays its γ and β by {decay:g}, which pulls them to zero and regularizes nothing.",
            "Give them a group without decay: param_groups(model, weight_decay).",
            WARNING,
            decay,
            {"weight decay": decay},
        )


@rule("BN203", "dropout before a norm", "an example")
def dropout_before(subject: Subject) -> Iterator[Finding]:
    """Dropout with rate p makes what a norm sees in training wider than in evaluation, by up to 1/(1 - p)."""
    for name, (rate, direct) in subject.rehearsal.dropout.items():
        state, ratio = subject.by_name.get(name), _narrower(subject, name)
        if state is None or not state.moves or rate <= 0:
            continue
        shifted = is_dropouts_work(subject, name)
        if not direct and not shifted:
            continue
        where = "directly before it" if direct else "before it, with nothing that would normalize in between"
        measured = f", here to {ratio:.2f}" if ratio is not None else ""
        yield Finding(
            "BN203",
            name,
            f"dropout with rate {rate:g} stands {where}: in evaluation the variance falls to between {1 - rate:.2g} and 1 of "
            f"that in training{measured}.",
            "Put dropout behind the last norm, or measure without it: recalibrate(model, data).",
            ERROR if shifted else WARNING,
            5.0 + rate if shifted else rate,
            {"rate": rate} | ({} if ratio is None else {"ratio": ratio}),
        )


def is_dropouts_work(subject: Subject, name: str) -> bool:
    """Whether the data shows that dropout has widened the statistics of a layer: the variance, and not the mean.

    Where the variance was measured while dropout dropped, it must be the stored one.
    """
    try:
        found, observed = subject.rehearsal, subject.observed(name)
    except MissingError:
        return False
    if observed is None or observed.stored_mean is None or name not in found.dropout:
        return False
    assert observed.stored_variance is not None  # noqa: S101
    rate, direct = found.dropout[name]
    wide = observed.stored_variance + observed.eps
    ratio, moved = _narrower(subject, name), float(np.mean((observed.mean - observed.stored_mean) ** 2 / wide))
    # directly before it, less is enough
    clear = direct or float(np.mean(output_error(observed))) > WRONG
    if ratio is None or ratio >= (1 - rate / 4 if direct else 1.0) or moved > MOVED or not clear:
        return False
    dropped = found.variances.get(name)
    if dropped is None:
        return ratio >= (1 - rate) / WIDENED
    return abs(float(np.median(np.log(wide / (dropped + observed.eps))))) < ALIKE


def _narrower(subject: Subject, name: str) -> float | None:
    """Return the variance of the data, without dropout, as a share of the stored one; ``None`` without data."""
    observed = subject.observed(name)
    if observed is None or observed.stored_variance is None:
        return None
    total = float((observed.stored_variance + observed.eps).sum())
    return float((observed.variance + observed.eps).sum()) / total


@rule("BN204", "gradient accumulation smaller than the batch", "the optimizer, one that counts its steps")
def accumulated(subject: Subject) -> Iterator[Finding]:
    """Gradients of several forwards make one step, but each forward is normalized by its own small batch."""
    found = subject.optimization
    times = float(found.accumulation or 0)
    if not times and found.steps is None:
        raise MissingError("needs an optimizer that counts its steps, as Adam does")
    told = f"the optimizer accumulates {found.accumulation} batches to a step"
    if not times and found.steps:
        counted = [state.updates for state in subject.states if state.moves and state.updates]
        times = min(counted, default=0) / found.steps
        told = f"{min(counted, default=0):,} batches went through the model in {found.steps:,} steps of the optimizer"
    if times >= SEVERAL and not _counts_twice(subject):
        yield Finding(
            "BN204",
            "",
            f"{told}: normalization sees batches {times:.2g} times smaller than those that the gradient stands for.",
            "Count the small batch when choosing settings; accumulate(model) moves the statistics once a step; sync(model) or "
            "ghost batches make the sizes equal.",
            WARNING,
            times,
            {"batches a step": times},
        )


def _counts_twice(subject: Subject) -> bool:
    """Whether batches are counted more often than they were seen."""
    try:
        return bool(subject.rehearsal.twice) or any(calls > 1 for calls in subject.rehearsal.calls.values())
    except MissingError:
        return False


@rule("BN206", "deep stack of norm and ReLU without skips", "an example, and a model that is trained")
def deep_stack(subject: Subject) -> Iterator[Finding]:
    """At initialization each norm with ReLU multiplies the square of the gradient, and nothing leads around it."""
    if not subject.trains:
        raise MissingError(NOT_TRAINED)
    end, depth = _longest(subject)
    if end is not None and depth > DEEP:
        assert isinstance(end.operation, Normalize)  # noqa: S101
        yield Finding(
            "BN206",
            subject.name_of(end.operation.norm),
            f"{depth} norms with activations in a row end here, with no connection around them: at initialization the gradient "
            f"grows about {sqrt(GROWTH):.2f}× a layer, {sqrt(GROWTH) ** depth:.0e}× in all.",
            "Add skip connections, start with a small learning rate (warm-up), or use fewer layers.",
            WARNING,
            float(depth),
            {"layers": float(depth)},
        )


def _longest(subject: Subject) -> tuple[Node | None, int]:
    """Return the norm at the end of the longest chain of norms and activations, and how many it has."""
    # norms behind each value, and whether an activation came after the last of them
    behind: dict[int, tuple[int, bool]] = {}
    best: tuple[Node | None, int] = None, 0
    for node in subject.graph.nodes:
        depth, active = max((behind.get(id(value), (0, False)) for value in node.inputs), default=(0, False))
        operation = node.operation
        if isinstance(operation, Activation):
            active = True
        elif isinstance(operation, Normalize):
            depth, active = (depth + 1 if active or depth == 0 else depth), False
            best = max(best, (node, depth), key=lambda found: found[1])
        elif len({id(value) for value in node.inputs}) > 1:
            # a sum, a concatenation: something leads around
            depth, active = 0, False
        for value in node.outputs:
            behind[id(value)] = depth, active
    return best


@rule("BN207", "synchronization missing or useless", "a distributed job, or synchronized layers")
def synchronization(subject: Subject) -> Iterator[Finding]:
    """Each process normalizes by its own batch unless it is told otherwise; alone, there is nobody to ask."""
    moving = [state for state in subject.states if state.moves]
    together = [state for state in moving if state.synchronized]
    if not subject.trains:
        raise MissingError(NOT_TRAINED)
    if subject.processes == 1:
        yield from (_useless(state.name) for state in together)
        return
    small = _small_layers(subject)
    for state in moving:
        mixed = bool(together) and not state.synchronized
        if mixed or (not state.synchronized and state.name in small):
            few = f" with {small[state.name]} values a channel" if state.name in small else ""
            others = f", although {len(together)} other layers are synchronized" if mixed else ""
            yield Finding(
                "BN207",
                state.name,
                f"each of {subject.processes} processes normalizes its own batch{few}{others}.",
                "sync(model), on any device and backend.",
                WARNING,
                1.0,
                {"processes": float(subject.processes)},
            )


def _useless(name: str) -> Finding:
    return Finding(
        "BN207",
        name,
        "it is synchronized, and there is only this process: nobody is there to synchronize with.",
        "unsync(model), or start the job with torchrun.",
        WARNING,
        0.5,
    )


def _small_layers(subject: Subject) -> dict[str, int]:
    samples = _usual_size(subject)
    try:
        found = list(subject.values(samples))
    except MissingError:
        return {}
    return {name: values for name, places, values in found if _are_few(values, places, samples)}


def _usual_size(subject: Subject) -> int | None:
    """Return the samples of a batch of the loader; ``None`` without one, for those of the example."""
    return subject.sizes.usual if subject.loader is not None else None


def _are_few(values: int, places: int, samples: int | None) -> bool:
    """Whether a batch has too few values a channel, or where a loader tells its size, too few samples."""
    return values < VALUES or (samples is not None and values // max(1, places) < SAMPLES)
