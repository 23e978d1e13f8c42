"""Measure, mix with the prior, write."""

from collections.abc import Callable
from math import inf, isinf
from typing import Any

import numpy as np

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models import adapt
from batchnorm.moments import Moments
from batchnorm.protocol import Measure, Model, Pair, Statistics
from batchnorm.reading import check_reading, of_two
from batchnorm.recalibrate.passes import Totals, largest_move, one_pass, over_processes
from batchnorm.recalibrate.result import Left, Recalibration, compared
from batchnorm.source import Source

__all__ = ["recalibrate"]

METHODS = ("one-pass", "sequential")
# moves of that size are none, by the precision of the layers; and those that may still be rounding, which no longer shrink
SETTLED = {"float16": 2.0**-10, "bfloat16": 2.0**-7}, 1e-6
NOISE = 1e-4
# passes beyond one for each layer: a layer that is called twice depends on itself
EXTRA = 30


def recalibrate(
    model: Any,
    data: Any,
    *,
    forward: Callable[..., Any] | None = None,
    batches: int | None = None,
    samples: int | None = None,
    method: str = "one-pass",
    prior: float | None = None,
    device: Any = None,
    progress: bool = True,
    tolerance: float | None = None,
) -> Recalibration:
    """Replace running statistics by those of a whole data set, exactly.

    Over all batches b, with the total variance, within and between them::

        mean = Σ n_b · mean_b / n        m2 = Σ m2_b + Σ n_b · (mean_b - mean)²
        variance = m2 / n, or in torch m2 / (n - 1)

    Everything but batch normalization stays in evaluation, and nothing is written before everything is measured. With
    ``"one-pass"`` the layers normalize each batch by its own statistics meanwhile, as in training. With ``"sequential"`` they
    normalize by the new statistics, and the data is read again until these no longer move: then each layer's inputs in
    evaluation have exactly the mean and the variance that the layer holds, however the data is cut into batches.

    In a process of a ``torch.distributed`` job each rank gives its own data, and all end with the statistics of all data.

    Args:
        model: of PyTorch, Keras or ONNX, changed in place (a path of an ONNX or Keras file: see ``model`` of the result).
            Frozen layers stay as they are.
        data: batches, or one array ``(N, ...)``. A mapping or dataclass gives named arguments, a tuple or list its first
            items (Keras: ``(x, y)`` gives x).
        forward: ``forward(model, batch)``, where the model is to be called in another way.
        batches: read at most these batches.
        samples: stop when so many samples were read.
        method: ``"one-pass"`` or ``"sequential"``.
        prior: the stored statistics count as so many samples beside the data: 0 is the data alone, infinity changes nothing.
        device: where batches are moved to; where the model is, if ``None``.
        progress: show a progress bar.
        tolerance: stop when no mean (in deviations) and no variance (relative) moved more than this while the data doubled.

    Returns:
        `Recalibration`: ``moved``, ``left``, ``passes``; prints as a table.

    Raises:
        OptionError: options that can't be; a model without running statistics, or with frozen ones only.
        DataError: data that is empty, fails, does not fit the model or is not finite. The model is as it was.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).eval()
        >>> found = recalibrate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (3.0, 7.0)
        >>> print(found)
        Layer  Values  Mean moved by  Variance
        ──────────────────────────────────────
        0      3       1.13 σ         × 7 to 7
        ──────────────────────────────────────
        1 of 1 layers have new statistics, of 3 samples in 2 batches

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), Algorithm 2, line 10. Chan, Golub, LeVeque 1979.
        Prior: Schneider et al. 2020 (arXiv:2006.16971).
    """
    _check(forward, batches, samples, method, prior, tolerance)
    view = adapt(model)
    statistics = view.statistics()
    if statistics and all(one.fixed for one in statistics):
        raise OptionError(
            f"the model must have running statistics that may move, all {len(statistics)} layers are kept as they are: "
            f"{statistics[0].name}: {statistics[0].fixed}"
        )
    source = Source(view.batches(data), batches, repeated=method == "sequential")

    def read(measure: Measure, use: dict[Statistics, Pair] | None) -> Totals:
        found: Totals | BatchNormError
        try:
            found = one_pass(measure, source, use, samples=samples, tolerance=tolerance, shown=progress)
        except BatchNormError as error:
            found = error
        return over_processes(statistics, found)

    with view.measuring(statistics, of_two(forward), device) as measure:
        totals = read(measure, None)
        new = _new(totals, prior)
        passes = 1
        moves: list[float] = []
        # the first k layers are exact after k passes
        while method == "sequential" and not _is_over(moves, len(new)):
            use, totals = new, read(measure, new)
            new, passes = _new(totals, prior), passes + 1
            moves.append(largest_move(use, new))
            totals.settled = _is_settled(moves, view.precision)
            if totals.settled:
                break
    return _finish(view, statistics, totals, new, passes)


def _is_settled(moves: list[float], precision: str) -> bool:
    """Whether the last move is none, or rounding: small, and no smaller than half of the one before."""
    narrow, usual = SETTLED
    noisy = len(moves) > 1 and moves[-2] / 2 < moves[-1] <= NOISE
    return moves[-1] <= narrow.get(precision, usual) or noisy


def _is_over(moves: list[float], layers: int) -> bool:
    """Whether further passes would not help: the data itself differs from pass to pass."""
    return len(moves) >= layers + EXTRA or (len(moves) > layers and moves[-1] > 0.9 * moves[-2])


def _finish(
    view: Model, statistics: list[Statistics], totals: Totals, new: dict[Statistics, Pair], passes: int
) -> Recalibration:
    if not statistics and not totals.moments:
        raise OptionError("the model must have batch normalization with running statistics, none was found")
    view.write(new, totals.batches)
    moved = tuple(compared(one, float(totals.moments[one].count), pair) for one, pair in new.items())
    rest = [one for one in dict.fromkeys([*statistics, *totals.moments]) if one not in new]
    left = tuple(Left(one.name, one.fixed or _why_left(totals.moments.get(one))) for one in rest)
    return Recalibration(view.model, moved, left, totals.batches, totals.samples, passes, totals.settled)


def _why_left(moments: Moments | None) -> str:
    if moments is None:
        return "it was never reached"
    return "no value reached it" if moments.count == 0 else "a single value reached it, which has no variance"


def _new(totals: Totals, prior: float | None) -> dict[Statistics, Pair]:
    """Return the statistics to store, of layers that enough data has reached."""
    return {
        one: _mixed(one, moments, (prior or 0.0) / max(1, totals.samples))
        for one, moments in totals.moments.items()
        if moments.count > 1
    }


def _mixed(one: Statistics, moments: Moments, share: float) -> Pair:
    """Merge the stored statistics in, as ``share`` times as many values as were measured."""
    mean, variance = one.pair
    if isinf(share):
        return mean, variance
    weight = share * moments.count
    # the variance as stored is the best guess of that of the population
    total = moments if share == 0 else moments.merge(Moments(weight, mean, variance * weight))
    return total.mean, total.unbiased_variance if one.unbiased else total.variance


def _check(forward: Any, batches: Any, samples: Any, method: Any, prior: Any, tolerance: Any) -> None:
    check_reading(forward, batches, samples)
    if method not in METHODS:
        raise OptionError(f"method must be 'one-pass' or 'sequential', got {method!r}")
    if prior is not None and not _is_between(prior, 0.0, inf):
        raise OptionError(f"prior must be a number of samples from 0 to infinity, got {prior!r}")
    if tolerance is not None and not (_is_between(tolerance, 0.0, 1.0) and tolerance > 0):
        raise OptionError(f"tolerance must be None or between 0 and 1, got {tolerance!r}")


def _is_between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float | np.number) and bool(low <= value <= high)
