"""Rule 112: zeros that fill up sequences, and are measured as if they were data."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from batchnorm.check.report import ERROR, Finding
from batchnorm.check.rules import rule
from batchnorm.check.subject import Subject

__all__: list[str] = []

# of the places: what is padding for certain; and how much more of it one end must have than the other
SHARE, ONE_SIDED = 0.05, 3.0
# places at the end that a padded convolution has touched
BORDER = 4
# share of the samples that must end in the same vector
FEWEST = 0.1
# mean squared change of the normalized values that is worth a word
EFFECT = 0.01


@rule("BN112", "constant padding inside the statistics", "data")
def padding(subject: Subject) -> Iterator[Finding]:
    """Places that hold one and the same vector up to the end, for some samples longer than for others, are padding."""
    for number, observed in enumerate(subject.observation.layers):
        x = None if observed.inputs is None else np.asarray(observed.inputs, np.float64)
        if x is None or x.ndim < 3 or not np.isfinite(x).all():
            continue
        filled = _padding(x)
        if filled is None:
            continue
        share, effect = float(filled.mean()), _effect(x, filled)
        if share >= SHARE and effect >= EFFECT:
            yield Finding(
                "BN112",
                observed.layer,
                f"{share:.0%} of the places that it measures are padding: one constant up to the end, in sequences of unequal "
                f"length; without it, normalized values would be {np.sqrt(effect):.2g} deviations elsewhere.",
                "Hand it a mask: convert(model), and layer(x, mask=…) or layer(x, lengths=…).",
                ERROR,
                4.5 + 1.0 / (2 + number),
                {"share": share, "effect": effect},
            )


def _padding(x: np.ndarray) -> np.ndarray | None:
    """Return where ``(N, C, *places)`` is padding, as ``(N, places of one axis)``; ``None`` where nothing is."""
    for axis in range(2, x.ndim):
        # samples, places of this axis, everything of a place
        rows = np.moveaxis(x, axis, 1).reshape(len(x), x.shape[axis], -1)
        ends, starts = _runs(rows), _runs(rows[:, ::-1])
        for one, other, flip in ((ends, starts, False), (starts, ends, True)):
            if one.any() and one.sum() >= ONE_SIDED * other.sum() and np.ptp(one.sum(1)) > 0:
                found = one[:, ::-1] if flip else one
                return found.reshape(len(x), *[n if i == axis else 1 for i, n in enumerate(x.shape)][2:])
    return None


def _runs(rows: np.ndarray) -> np.ndarray:
    """Return which places ``(N, L)`` belong to a constant run up to the end, of the same constant in all samples."""
    best = np.zeros(rows.shape[:2], bool)
    length = rows.shape[1]
    for border in range(min(BORDER, length - 1)):
        last = length - 1 - border
        run = _run_to(rows[:, : last + 1])
        if run is not None and run.sum() > best.sum():
            best = np.zeros(rows.shape[:2], bool)
            best[:, : last + 1] = run
            # what a convolution has touched at the end is padding too
            best[:, last + 1 :] = np.any(run, axis=1, keepdims=True)
    return best


def _run_to(rows: np.ndarray) -> np.ndarray | None:
    """Return the places of runs that end in the last place; ``None`` where too few samples have one."""
    repeats: Any = np.equal(rows[:, -1], rows[:, -2]).all(axis=-1)
    if repeats.sum() < max(2, FEWEST * len(rows)):
        return None
    # minus zero is zero
    ends = Counter(row.tobytes() for row in rows[repeats, -1] + 0.0)
    vector, count = ends.most_common(1)[0]
    if count < max(2, FEWEST * len(rows)):
        return None
    same: Any = np.equal(rows, np.frombuffer(vector, rows.dtype)).all(axis=-1)
    run: np.ndarray = np.logical_and.accumulate(same[:, ::-1], axis=1)[:, ::-1]
    run[run.sum(1) < 2] = False
    return run


def _effect(x: np.ndarray, filled: np.ndarray) -> float:
    """Return how far normalized values move when padding is left out: mean squares over channels."""
    valid = np.broadcast_to(~filled[:, None], x.shape)
    axes = (0, *range(2, x.ndim))
    count = np.maximum(valid.sum(axes), 1)
    mean = (x * valid).sum(axes) / count
    shape = (1, -1, *[1] * (x.ndim - 2))
    variance = (((x - mean.reshape(shape)) ** 2) * valid).sum(axes) / count
    whole, wide = x.mean(axes), x.var(axes) + 1e-12
    return float(np.mean((whole - mean) ** 2 / wide + (np.sqrt(variance / wide) - 1) ** 2))
