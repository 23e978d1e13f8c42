"""Rule 103: running statistics that are not those of the data, and what that comes from."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batchnorm.check.report import ERROR, Finding
from batchnorm.check.rules import rule
from batchnorm.check.statistics import RECALIBRATE
from batchnorm.check.subject import Subject
from batchnorm.check.training import is_dropouts_work
from batchnorm.check.wrong import CHANCE, WRONG, output_error
from batchnorm.observed import Observed
from batchnorm.states import NormState

__all__: list[str] = []

# the share of initial values that explains an error, and the decay beyond which momentum is to blame for it
INITIAL, SLOW = 0.05, {"torch": 0.99, "keras": 0.999, "onnx": 0.999}
# share of the variance between batches that is no chance, beyond what their size explains
DIFFERENCE = 0.03
# how much worse the first layer is than those behind it, where the data is another one
AT_THE_DOOR = 5.0


@dataclass(slots=True)
class _Gap:
    """A layer, and how far its outputs are off."""

    observed: Observed
    state: NormState
    error: float
    cause: str = ""
    cure: str = ""
    root: bool = True


@rule("BN103", "running statistics far from the data's", "data")
def far_from_data(subject: Subject) -> Iterator[Finding]:
    """Each layer is held against the data alone, those before it normalizing as in training: so the layer at fault shows."""
    gaps = list(_gaps(subject))
    allowed = WRONG + CHANCE / max(1, subject.observation.samples)
    wrong = _confirmed([gap for gap in gaps if gap.error > allowed], subject)
    for gap in wrong:
        _explain_by_counting(gap, subject)
    _explain_together(gaps, [gap for gap in wrong if not gap.cause], subject)
    for gap in wrong:
        size = gap.error / (1 + gap.error) if np.isfinite(gap.error) else 1.0
        yield Finding(
            "BN103",
            gap.observed.layer,
            f"{gap.cause}: {_compared(gap.observed)}, which moves its outputs by {np.sqrt(gap.error):.2g} deviations.",
            gap.cure,
            ERROR,
            size + gap.root,
            {"output error": gap.error, "divergence": gap.observed.distance or 0.0},
        )


def _gaps(subject: Subject) -> Iterator[_Gap]:
    """Yield the layers that hold statistics of their own, and are not explained by other rules."""
    for observed in subject.observation.layers:
        state = subject.by_name.get(observed.layer)
        if state is None or observed.stored_mean is None or observed.count <= 1:
            continue
        variance = observed.stored_variance
        if variance is None or not np.isfinite([observed.stored_mean, variance]).all() or (variance < 0).any():
            continue
        if not state.is_initial and not is_dropouts_work(subject, observed.layer):
            yield _Gap(observed, state, float(np.mean(output_error(observed))))


def _confirmed(wrong: list[_Gap], subject: Subject) -> list[_Gap]:
    """Return the layers that are off in evaluation too: batches that differ, as sorted ones, change what training would see."""
    evaluation = subject.evaluation if wrong else None
    if evaluation is None:
        return wrong
    errors = {one.layer: float(np.mean(output_error(one))) for one in evaluation if one.stored_mean is not None}
    confirmed = [gap for gap in wrong if not errors.get(gap.observed.layer, np.inf) <= WRONG]
    # where batches differ, those behind the first are not judged alone
    return confirmed[:1] if _differ(subject) else confirmed


def _differ(subject: Subject) -> bool:
    """Whether more of the variance lies between the batches of the data than chance puts there."""
    found = subject.observation
    return max(one.between for one in found) > 2 * found.batches / max(1, found.samples) + DIFFERENCE


def _compared(observed: Observed) -> str:
    assert observed.stored_mean is not None  # noqa: S101
    assert observed.stored_variance is not None  # noqa: S101
    wide = observed.stored_variance + observed.eps
    ratio = float(np.exp(np.median(np.log((observed.variance + observed.eps) / wide))))
    shift = float(np.sqrt(np.mean((observed.mean - observed.stored_mean) ** 2 / wide)))
    power = _power(observed)
    told = f"the data's mean is {shift:.2g} deviations from the running one, its variance {ratio:.3g} × the running one"
    return told if not power else f"{told}; the running variance looks like {power} of the data's"


def _power(observed: Observed) -> str:
    """Return what was stored in place of a variance, where that fits in all channels; empty where nothing does."""
    assert observed.stored_variance is not None  # noqa: S101
    real, stored = observed.variance + observed.eps, observed.stored_variance
    known = (real > 0) & (stored > 0)
    if known.sum() < 4 or np.ptp(np.log(real[known])) < 1:
        return ""
    x, y = np.log(real[known]), np.log(stored[known])
    for power, name in ((0.5, "the root"), (-0.5, "one over the root"), (-1.0, "one over that"), (2.0, "the square")):
        if np.abs(y - power * x).max() < 0.1:
            return name
    return ""


# -- causes --------------------------------------------------------------------------------------------------------------


def _explain_by_counting(gap: _Gap, subject: Subject) -> None:
    """Name initial values that have not been forgotten yet: known from the number of updates, or fitted without one."""
    share = gap.state.initial_share
    if share is None:
        share = _fitted_share(gap.observed)
    if share < INITIAL or not _explains(gap.observed, share):
        return
    decay, updates = gap.state.decay, gap.state.updates
    slow = decay is not None and decay > SLOW[subject.framework]
    counted = "" if updates is None else f" after {updates:,} batches"
    own = "" if decay is None else f"{subject.momentum(decay):.4g}"
    if slow:
        gap.cause = f"momentum = {own} is too slow,{counted} its initial values still weigh {share:.0%}"
        gap.cure = f"A usual momentum, or {RECALIBRATE}."
    else:
        gap.cause = f"too few updates,{counted} its initial values still weigh {share:.0%}"
        gap.cure = f"Train longer, or {RECALIBRATE}."


def _fitted_share(observed: Observed) -> float:
    """Return the share a that fits ``v = (1 - a)·V + a`` and ``m = (1 - a)·M`` best."""
    mean, variance, stored = observed.mean, observed.variance, observed.stored_variance
    assert observed.stored_mean is not None  # noqa: S101
    assert stored is not None  # noqa: S101
    wide = np.sqrt(variance + stored + observed.eps)
    x = np.concatenate([(1 - variance) / wide**2, -mean / wide])
    y = np.concatenate([(stored - variance) / wide**2, (observed.stored_mean - mean) / wide])
    return float(np.clip((x * y).sum() / max(float((x * x).sum()), 1e-12), 0.0, 0.99))


def _explains(observed: Observed, share: float) -> bool:
    """Whether the statistics are those of the data once the initial values are taken out of them."""
    assert observed.stored_mean is not None  # noqa: S101
    assert observed.stored_variance is not None  # noqa: S101
    wide, rest = observed.variance + observed.eps, max(1 - share, 1e-6)
    variance = np.maximum(observed.stored_variance - share, 0.0) / rest + observed.eps
    mean = observed.stored_mean / rest
    left = (mean - observed.mean) ** 2 / wide + np.log(variance / wide) ** 2
    before = (observed.stored_mean - observed.mean) ** 2 / wide
    before = before + np.log((observed.stored_variance + observed.eps) / wide) ** 2
    return bool(np.median(left) < np.median(before))


def _explain_together(gaps: list[_Gap], wrong: list[_Gap], subject: Subject) -> None:
    """Tell apart data that is another one, weights that have moved, and one layer that misleads those behind it."""
    if not wrong:
        return
    # a clean layer's error is rounding
    behind = [max(gap.error, WRONG / 10) for gap in gaps[1:]]
    first, others = gaps[0], wrong[1:]
    if wrong[0] is first and (not behind or first.error >= AT_THE_DOOR * float(np.median(behind))):
        first.cause = (
            "other data than it was trained on, or statistics overwritten, as it is the first layer that is off"
        )
        first.cure = f"Prepare the data as in training; if this data is what the model will meet, {RECALIBRATE}."
        _blame(first, others)
    elif len(wrong) > len(gaps) / 2:
        for gap in wrong:
            gap.cause = "statistics of other weights, as most layers are off"
            gap.cure = (
                "Were weights trained on while statistics stood still, averaged, pruned, rounded, or of another checkpoint? "
                f"{_capital(RECALIBRATE)}."
            )
    else:
        root = wrong[0]
        root.cause = (
            f"its own statistics, or the weights just before it, were changed alone, as {_before(gaps, root)} fine"
        )
        root.cure = f"{_capital(RECALIBRATE)}, or load them from the checkpoint."
        _blame(root, others)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _before(gaps: list[_Gap], gap: _Gap) -> str:
    number = gaps.index(gap)
    return (
        f"the {number} layers before it are"
        if number > 1
        else "the layer before it is"
        if number
        else "most others are"
    )


def _blame(root: _Gap, others: list[_Gap]) -> None:
    for gap in others:
        gap.root = gap.error > root.error
        gap.cause = f"another layer upstream, {root.observed.layer}, or what it gets"
        gap.cure = f"Mend {root.observed.layer} first."
