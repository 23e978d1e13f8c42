"""What has reached one batch normalization layer, held against what the layer stores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.affine import Affine
from batchnorm.moments import Moments
from batchnorm.protocol import Pair, Statistics

__all__ = ["Observed", "Part", "divergence", "json_ready", "judged", "normalizing", "outputs", "rounding"]

ULPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# a spread of so many units in the last place of the mean is rounding
NOISE = 8
SATURATED = 3.0
NEAR_ZERO = 1e-4
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What has reached one layer, and what it stores; arrays in float64, ``(C,)``.

    Args:
        layer: its dotted name.
        count: values of each channel, all batches and calls together (the sum of their weights).
        mean: of the data.
        variance: of the data, ``m2 / (count - 1)`` where the layer stores that, else ``m2 / count``.
        stored_mean: the running mean; ``None`` where the layer keeps none.
        stored_variance: the running variance; ``None`` where the layer keeps none.
        eps: added to the variance under the root.
        unbiased: whether the variance is the unbiased one.
        gamma: the scale; ``None`` for 1, or where nobody knows.
        beta: the shift; ``None`` for 0, or where nobody knows.
        kl: the divergence of the data from what is stored (see `divergence`), in nats; ``None`` where nothing is stored, or a
            single value was seen.
        distance: the mean of ``kl`` over the channels.
        dead_channels: ``(C,)``, whether a channel is always the same in the data, but for rounding.
        dead: share of these channels, 0 to 1.
        off: share of channels whose outputs γ·x̂ + β were never above 0 in ``inputs``: a ReLU behind them never opens.
        saturated: share of outputs with ``|γ·x̂ + β| > 3`` in ``inputs``.
        between: share of the variance that lies between batches, ``1 - Σ m2_b / m2``; the mean over the channels.
        calls: of the data, by the order of the calls within a forward pass.
        values: values of a channel that were normalized together, the fewest that were seen.
        inputs: a piece of what came first, ``(n, C', *spatial)``; ``None`` where the first call was masked or weighted.
        fixed: why the stored statistics do not move in training; empty where they do.
        linear: dotted name of the linear layer whose output came in as it was; empty where nobody knows.
    """

    layer: str
    count: float
    mean: np.ndarray
    variance: np.ndarray
    stored_mean: np.ndarray | None
    stored_variance: np.ndarray | None
    eps: float
    unbiased: bool
    gamma: np.ndarray | None
    beta: np.ndarray | None
    kl: np.ndarray | None
    distance: float | None
    dead_channels: np.ndarray = field(repr=False)
    dead: float
    off: float | None
    saturated: float | None
    between: float
    calls: tuple[Moments, ...] = field(repr=False)
    values: float
    inputs: np.ndarray | None = field(default=None, repr=False)
    fixed: str = ""
    linear: str = ""

    @property
    def channels(self) -> np.ndarray:
        """The channels that ``inputs`` holds, as indices."""
        kept = 0 if self.inputs is None else self.inputs.shape[1]
        return np.arange(0, len(self.mean), -(-len(self.mean) // kept)) if kept else np.arange(0)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but ``inputs``, ready for JSON: arrays as lists, what is not finite as ``None``."""
        names = [name for name in self.__slots__ if name not in ("inputs", "calls")]
        found = {name: json_ready(getattr(self, name)) for name in names}
        found["calls"] = [{name: json_ready(getattr(m, name)) for name in ("count", "mean", "m2")} for m in self.calls]
        return found | {f"{name}_summary": _summary(getattr(self, name)) for name in ("gamma", "beta")}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one process has seen of a layer.

    Args:
        calls: Moments by the order of the calls, all batches together.
        within: ``(C,)``, Σ m2 of the batches, each around its own mean.
        values: of a channel in the smallest call.
        off: share of channels that are never above 0, as in `Observed`.
        saturated: share of large outputs, as in `Observed`.
        linear: the linear layer before, as in `Observed`.
    """

    calls: tuple[Moments, ...]
    within: np.ndarray
    values: float
    off: float | None = None
    saturated: float | None = None
    linear: str = ""

    def merge(self, other: "Part") -> "Part":
        """Return what two processes have seen; of the shares, that of the first that has one."""
        longest = max(len(self.calls), len(other.calls))
        calls = [Moments.empty()] * longest
        for part in (self.calls, other.calls):
            calls[: len(part)] = [total.merge(m) for total, m in zip(calls, part, strict=False)]
        return Part(
            tuple(calls),
            self.within + other.within,
            min(self.values, other.values),
            other.off if self.off is None else self.off,
            other.saturated if self.saturated is None else self.saturated,
            self.linear or other.linear,
        )


def judged(
    one: Statistics,
    part: Part,
    *,
    ulp: float,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    eps: float | None = None,
    inputs: np.ndarray | None = None,
) -> Observed:
    """Hold what was seen of a layer against what it stores.

    Args:
        one: the layer.
        part: what was seen.
        ulp: `rounding` of the model's precision.
        gamma: its scale.
        beta: its shift.
        eps: added to the variance, where ``one`` does not know it.
        inputs: the piece that was kept.
    """
    total = Moments.empty().merge(*part.calls)
    variance = total.unbiased_variance if one.unbiased else total.variance
    eps = one.eps if eps is None else eps
    kl = None
    if one.mean is not None and total.count > 1:
        kl = divergence((total.mean, variance), one.pair, eps)
    dead = (total.variance <= (NOISE * ulp * np.abs(total.mean)) ** 2) & (total.count > 1)
    moving = total.m2 > 0
    between = 1.0 - part.within[moving] / total.m2[moving]
    return Observed(
        one.name, float(total.count), total.mean, variance, one.mean, one.variance, eps, one.unbiased, gamma, beta, kl,
        None if kl is None else float(kl.mean()),
        dead, float(dead.mean()) if dead.size else 0.0,
        part.off, part.saturated,
        float(np.clip(between, 0.0, 1.0).mean()) if between.size else 0.0,
        part.calls, part.values, inputs, one.fixed, part.linear,
    )  # fmt: skip


def divergence(data: Pair, stored: Pair, eps: float) -> np.ndarray:
    """Return KL(data ‖ stored) of two normal distributions, ``(C,)`` in nats.

    With M and V of the data, m and v that are stored::

        KL = ½ · (ln((v + ε) / (V + ε)) + ((V + ε) + (M - m)²) / (v + ε) - 1)

    Example:
        >>> divergence((np.array([1.0]), np.array([1.0])), (np.array([0.0]), np.array([1.0])), 0.0)
        array([0.5])
    """
    (mean, variance), (stored_mean, stored_variance) = data, stored
    wide, own = stored_variance + eps + _TINY, variance + eps + _TINY
    with np.errstate(all="ignore"):
        kl: np.ndarray = 0.5 * (np.log(wide / own) + (own + (mean - stored_mean) ** 2) / wide - 1.0)
    return kl.clip(min=0.0)


def outputs(
    inputs: np.ndarray, used: Pair, gamma: np.ndarray | None, beta: np.ndarray | None, eps: float
) -> tuple[float, float]:
    """Return which share of channels a layer never puts out above 0, and which share of its outputs lies beyond ±3.

    Args:
        inputs: a `protocol.piece` of the layer's input, ``(n, C', *spatial)``.
        used: mean and variance of all C channels that it is normalized by.
        gamma: ``(C,)``.
        beta: ``(C,)``.
        eps: added to the variance.
    """
    mean, variance = used
    gamma = np.ones_like(mean) if gamma is None else gamma
    beta = np.zeros_like(mean) if beta is None else beta
    kept = slice(None, None, -(-len(mean) // inputs.shape[1]))
    affine = Affine.from_statistics(mean[kept], np.maximum(variance[kept], _TINY), gamma[kept], beta[kept], eps)
    places = tuple(axis for axis in range(inputs.ndim) if axis != 1)
    ends = [affine(inputs.max(axis=places)), affine(inputs.min(axis=places))]
    silent = np.maximum(*ends) <= 0
    # where the inputs lie that give outputs within the bounds; looked for in the dtype of the inputs, which is quick
    flat = affine.scale == 0
    scale = np.where(flat, 1.0, affine.scale)
    bounds = np.sort([(-SATURATED - affine.shift) / scale, (SATURATED - affine.shift) / scale], axis=0)
    bounds[:, flat] = np.where(np.abs(affine.shift[flat]) > SATURATED, np.inf, [[-np.inf], [np.inf]])
    with np.errstate(over="ignore"):
        low, high = (bound.reshape(-1, *[1] * (inputs.ndim - 2)).astype(inputs.dtype) for bound in bounds)
    large = np.count_nonzero(inputs > high) + np.count_nonzero(inputs < low)
    return float(silent.mean()), large / inputs.size


def normalizing(one: Statistics, first: Moments, *, by_batch: bool) -> Pair:
    """Return the mean and variance that a call is normalized by, where moving layers do it by the batch or not."""
    # a single value has no variance
    own = one.mean is None or (by_batch and not one.fixed and first.count > 1)
    return (first.mean, first.variance) if own else one.pair


def rounding(precision: str) -> float:
    """Return the distance from 1 to the next number of a dtype."""
    return ULPS.get(precision, ULPS["float32"])


def _summary(v: np.ndarray | None) -> dict[str, float] | None:
    if v is None or not v.size:
        return None
    return {
        "min": float(v.min()),
        "median": float(np.median(v)),
        "max": float(v.max()),
        "near_zero": int((np.abs(v) < NEAR_ZERO).sum()),
    }


def json_ready(value: Any) -> Any:
    """Return numbers and arrays as JSON can hold them: what is not finite becomes ``None``."""
    if isinstance(value, np.ndarray | Sequence) and not isinstance(value, str):
        return [json_ready(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
