"""The proof of a rewrite: the model before and after it, on the same inputs, in float64 and in the model's own dtype."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm.arrays import Array, namespace, widen
from batchnorm.errors import BatchNormError, VerificationError
from batchnorm.graph import Weights
from batchnorm.protocol import Changes, Model, OneByOne

__all__ = ["Error", "Measured", "prove"]

EXACT = 1e-12
"""Relative difference in float64 that is always allowed: a few hundred roundings, one for each layer of a deep network."""
FACTOR = 8
"""A rewritten model may stand this many times as far from the model as the model does from float64."""
CONDITION = 32
"""The same in float64, predicted from its error in its dtype or from what changed weights do: rounding varies."""
DISTURBANCES = 8
"""How often a model that differs is run with weights that were changed in the last place, to see whether it jumps by itself."""
UNJUDGED = 4096
"""Roundings that are allowed to a model that can't be run in float64, so that its own error is not known."""
ROUNDINGS = 16
"""Roundings that are allowed to a model that is exact by chance."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The largest difference between two models on one set of inputs.

    Args:
        inputs: ``"example"`` or ``"random"``.
        precision: the dtype that both models computed in.
        absolute: ``max |y' - y|`` over all outputs.
        relative: the largest over the outputs of ``max |y' - y| / max |y|``.
        bound: what ``relative`` was held against.
    """

    inputs: str
    precision: str
    absolute: float
    relative: float
    bound: float


@dataclass(frozen=True, slots=True)
class Error:
    """How far a rewritten model is from the model; ``float()`` gives the largest relative difference, in float64 if it ran.

    Args:
        measured: one entry for each kind of inputs and each precision.
        note: what could not be measured, and why; empty where all was.
    """

    measured: tuple[Measured, ...]
    note: str = ""

    @property
    def absolute(self) -> float:
        """The largest absolute difference in the model's own dtype."""
        return max((m.absolute for m in self.measured if m.precision == self.measured[-1].precision), default=0.0)

    @property
    def relative(self) -> float:
        """The largest relative difference in the model's own dtype."""
        return max((m.relative for m in self.measured if m.precision == self.measured[-1].precision), default=0.0)

    def __float__(self) -> float:
        wide = [m.relative for m in self.measured if m.precision == "float64"]
        return max(wide, default=self.relative)

    def __str__(self) -> str:
        lines = [
            f"{m.precision}, {m.inputs} inputs: largest difference {m.absolute:.2g}, "
            f"relative {m.relative:.2g} (bound {m.bound:.2g})"
            for m in self.measured
        ]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def prove(
    before: Model,
    after: Model,
    widen_after: Callable[[Model], None],
    example: Any,
    weights: Collection[Weights],
    cancellation: float = 0.0,
) -> Error:
    """Hold a rewritten model against the model itself, and raise where they differ by more than rounding explains.

    In float64 the rewrite is repeated without rounding its weights, and must agree to `EXACT`, or to what the model's own
    rounding error in its dtype predicts for float64. In the model's own dtype the rewritten model may be `FACTOR` times as far
    from the float64 result as the model itself is, plus `ROUNDINGS` roundings.

    Args:
        before: the model.
        after: the rewritten model.
        widen_after: makes the same rewrite in a float64 copy of the model.
        example: what the model runs on.
        weights: those of the model, to see what it makes of a change in their last place.
        cancellation: how many times larger than their result the terms of a difference are that the rewrite takes: for
            ``scale · x + shift`` that is ``|mean| · scale``.

    Raises:
        VerificationError: a difference beyond its bound, or outputs of other shapes.
    """
    kinds = {"example": before.inputs(example, None)}
    own = {"example": before.outputs(kinds["example"])}
    notes = []
    try:
        kinds["random"] = before.inputs(example, 0)
        own["random"] = before.outputs(kinds["random"])
    except BatchNormError as error:
        del kinds["random"]
        notes.append(f"not measured on random inputs: {error}")
    rewritten = {kind: after.outputs(inputs) for kind, inputs in kinds.items()}
    if not any(np.isfinite(a).any() for arrays in own.values() for a in arrays):
        raise VerificationError(
            "the outputs must hold finite numbers to be compared, on the example and on random inputs they hold none: "
            "give another example"
        )
    wide, note = {kind: (own[kind], rewritten[kind]) for kind in kinds}, ""
    if before.precision != "float64":
        wide, note = _run_wide(before, widen_after, kinds)
    notes += [note] if note else []
    measured = [_wide(kind, *pair, own[kind], before.precision, cancellation) for kind, pair in wide.items()]
    if before.precision != "float64" or not wide:
        measured += [
            _own(kind, own[kind], rewritten[kind], wide.get(kind, (None,))[0], before.precision, cancellation)
            for kind in kinds
        ]
    measured = [m if m.relative <= m.bound else _disturbed(before, m, kinds[m.inputs], weights) for m in measured]
    for m in measured:
        if not m.relative <= m.bound:
            raise VerificationError(
                f"the rewritten model must compute what the model computes, but on {m.inputs} inputs in {m.precision} they "
                f"differ by {m.relative:.3g} of the largest output, allowed are {m.bound:.3g}: nothing was returned"
            )
    return Error(tuple(measured), "; ".join(notes))


def _run_wide(
    model: Model, widen_after: Callable[[Model], None], kinds: dict[str, Any]
) -> tuple[dict[str, tuple[list[np.ndarray], list[np.ndarray]]], str]:
    """Return the outputs in float64 before and after the rewrite, or why there are none."""
    wide = model.cast("float64")
    if wide is None:
        return {}, "not measured in float64: the model does not compute in it"
    try:
        before = {kind: wide.outputs(inputs) for kind, inputs in kinds.items()}
    except BatchNormError as error:
        return {}, f"not measured in float64: {error}"
    widen_after(wide)
    return {kind: (before[kind], wide.outputs(inputs)) for kind, inputs in kinds.items()}, ""


def _wide(
    kind: str,
    before: list[np.ndarray],
    after: list[np.ndarray],
    own: list[np.ndarray],
    precision: str,
    cancellation: float,
) -> Measured:
    absolute, relative = _difference(before, after)
    bound = max(EXACT, ROUNDINGS * _eps("float64") * cancellation)
    if precision != "float64":
        condition = _difference(before, own)[1] / _eps(precision)
        bound = max(bound, CONDITION * condition * _eps("float64")) if np.isfinite(condition) else bound
    return Measured(kind, "float64", absolute, relative, bound)


def _disturbed(model: Model, m: Measured, inputs: Any, weights: Collection[Weights]) -> Measured:
    """Widen a bound to what a change in the last place of its weights does to the model itself, which may sort or cut."""
    twin = model if m.precision == model.precision else model.cast(m.precision)
    assert twin is not None  # noqa: S101
    expected = twin.outputs(inputs)
    nudged = [_nudged(weights, m.precision, seed) for seed in range(DISTURBANCES)]
    jumps = [_difference(expected, twin.changed(changes).outputs(inputs))[1] for changes in nudged]
    return replace(m, bound=max(m.bound, CONDITION * max(jumps)))


def _nudged(weights: Collection[Weights], precision: str, seed: int) -> Changes:
    """Change free weights in the last place of a precision, at random."""
    places = {each: place for place, each in enumerate(each for each in weights if not each.locked)}

    def nudge(each: Weights) -> tuple[Array, Array | None]:
        weight, bias = each.read()
        wide = widen(weight)
        xp, rng = namespace(wide), np.random.default_rng([seed, places[each]])
        signs = xp.asarray(rng.integers(-1, 2, tuple(wide.shape)), dtype=wide.dtype, device=wide.device)
        nudged = wide * (1 + signs * _eps(precision))
        if precision != "float64":
            return xp.astype(nudged, weight.dtype), bias
        return nudged, None if bias is None else widen(bias)

    return Changes(weights=OneByOne(places, nudge))


def _own(
    kind: str,
    before: list[np.ndarray],
    after: list[np.ndarray],
    wide: list[np.ndarray] | None,
    precision: str,
    cancellation: float,
) -> Measured:
    absolute, relative = _difference(before, after)
    bound = (UNJUDGED if wide is None else ROUNDINGS) * _eps(precision) * max(1.0, cancellation)
    if wide is not None:
        own = _difference(wide, before)[1]
        # outputs that float64 cuts or sorts in another way say nothing about rounding
        bound += FACTOR * own if np.isfinite(own) else np.inf
    return Measured(kind, precision, absolute, relative, bound)


def _eps(precision: str) -> float:
    return {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[precision]


def _difference(expected: list[np.ndarray], actual: list[np.ndarray]) -> tuple[float, float]:
    """Return the largest absolute and relative difference; infinite where shapes or non-finite places differ."""
    if [a.shape for a in expected] != [a.shape for a in actual]:
        return np.inf, np.inf
    pairs = [_distance(*pair) for pair in zip(expected, actual, strict=True)]
    return max((a for a, _ in pairs), default=0.0), max((r for _, r in pairs), default=0.0)


def _distance(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    e, a = (v.astype(np.float64) for v in (expected, actual))
    finite = np.isfinite(e)
    if not np.array_equal(e[~finite], a[~finite], equal_nan=True):
        return np.inf, np.inf
    absolute = float(np.abs(a[finite] - e[finite]).max(initial=0.0))
    size = float(np.abs(e[finite]).max(initial=0.0))
    return absolute, absolute / size if size else absolute
