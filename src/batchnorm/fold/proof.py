"""The proof of a rewrite: the model before and after it, on the same inputs, in float64 and in the model's own dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.errors import VerificationError
from batchnorm.graph import Model

__all__ = ["Error", "Measured", "prove"]

EXACT = 1e-12
"""Relative difference in float64 that is always allowed: a few hundred roundings, one for each layer of a deep network."""
FACTOR = 4
"""A rewritten model may stand this many times as far from float64 as the model itself does."""
ROUNDINGS = 32
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
            f"{m.precision}, {m.inputs} inputs: max difference {m.absolute:.2g}, relative {m.relative:.2g} (bound {m.bound:.2g})"
            for m in self.measured
        ]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def prove(before: Model, after: Model, widen_after: Callable[[Model], None], example: Any) -> Error:
    """Hold a rewritten model against the model itself, and raise where they differ by more than rounding explains.

    In float64 the rewrite is repeated without rounding its weights, and must agree to `EXACT`, or to what the model's own
    rounding error in its dtype predicts for float64. In the model's own dtype the rewritten model may be `FACTOR` times as far
    from the float64 result as the model itself is, plus `ROUNDINGS` roundings.

    Args:
        before: the model.
        after: the rewritten model.
        widen_after: makes the same rewrite in a float64 copy of the model.
        example: what the model runs on.

    Raises:
        VerificationError: a difference beyond its bound, or outputs of other shapes.
    """
    kinds = {"example": before.inputs(example, None), "random": before.inputs(example, 0)}
    own = {kind: (before.outputs(inputs), after.outputs(inputs)) for kind, inputs in kinds.items()}
    measured, note = [], ""
    wide_before = before.cast("float64")
    wide = None if wide_before is None else {kind: wide_before.outputs(inputs) for kind, inputs in kinds.items()}
    if wide_before is not None and wide is not None:
        widen_after(wide_before)
        wide_after = {kind: wide_before.outputs(inputs) for kind, inputs in kinds.items()}
        measured += [_wide(kind, wide[kind], wide_after[kind], own[kind][0], before.precision) for kind in kinds]
    else:
        note = "not measured in float64: the model does not compute in it"
    if before.precision != "float64":
        measured += [
            _own(kind, *own[kind], None if wide is None else wide[kind], before.precision) for kind in kinds
        ]
    for m in measured:
        if not m.relative <= m.bound:
            raise VerificationError(
                f"the rewritten model must compute what the model computes, but on {m.inputs} inputs in {m.precision} they "
                f"differ by {m.relative:.3g} of the largest output, allowed are {m.bound:.3g}: nothing was returned"
            )
    return Error(tuple(measured), note)


def _wide(
    kind: str, before: list[np.ndarray], after: list[np.ndarray], own: list[np.ndarray], precision: str
) -> Measured:
    absolute, relative = _difference(before, after)
    bound = EXACT
    if precision != "float64":
        condition = _difference(before, own)[1] / _eps(precision)
        bound = max(bound, FACTOR * condition * _eps("float64")) if np.isfinite(condition) else bound
    return Measured(kind, "float64", absolute, relative, bound)


def _own(
    kind: str, before: list[np.ndarray], after: list[np.ndarray], wide: list[np.ndarray] | None, precision: str
) -> Measured:
    absolute, relative = _difference(before, after)
    bound = ROUNDINGS * _eps(precision)
    if wide is None:
        # no judge: the two may stand on opposite sides of the truth
        return Measured(kind, precision, absolute, relative, 2 * FACTOR * bound)
    own, relative = _difference(wide, before)[1], _difference(wide, after)[1]
    return Measured(kind, precision, absolute, relative, FACTOR * own + bound)


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
