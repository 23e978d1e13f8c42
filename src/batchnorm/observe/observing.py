"""One pass over the data, judged layer by layer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models import adapt
from batchnorm.moments import Moments
from batchnorm.observe.observation import Observation
from batchnorm.observed import Observed, Part, judged, normalizing, outputs, rounding
from batchnorm.protocol import Measured, Model, Pair, Statistics
from batchnorm.reading import check_reading, gathered, of_two, through
from batchnorm.source import Source
from batchnorm.states import NormState, Rate

__all__ = ["observe"]

USES = ("batch", "running")


def observe(
    model: Any,
    data: Any,
    *,
    forward: Callable[..., Any] | None = None,
    batches: int | None = None,
    samples: int | None = None,
    optimizer: Any = None,
    use: str = "batch",
    device: Any = None,
    progress: bool = True,
) -> Observation:
    """Hold what reaches each batch normalization layer against what the layer stores, in one pass over the data.

    For each channel, with mean M and variance V of the data, and m and v that are stored::

        KL(data ‖ stored) = ½ · (ln((v + ε) / (V + ε)) + ((V + ε) + (M - m)²) / (v + ε) - 1)

    The distance of a layer is the mean over its channels, in nats: 0 where evaluation sees what the statistics promise.
    Everything but batch normalization is in evaluation, and nothing in the model changes. With ``"batch"`` layers whose
    statistics move in training normalize each batch by its own statistics, so that each layer is judged alone; with
    ``"running"`` all normalize by what they store, so that each is judged by what it sees in deployment.

    In a process of a ``torch.distributed`` job each rank gives its own data, and all return what all data has shown; pieces
    of inputs are those of the rank.

    Args:
        model: of PyTorch, Keras or ONNX, or a path of an ONNX or Keras file; it is not changed.
        data: batches, or one array ``(N, ...)``. A mapping or dataclass gives named arguments, a tuple or list its first
            items (Keras: ``(x, y)`` gives x).
        forward: ``forward(model, batch)``, where the model is to be called in another way.
        batches: read at most these batches.
        samples: stop when so many samples were read.
        optimizer: of PyTorch or Keras; adds ``rates``, the effective learning rates lr / ‖w‖² of the linear layers whose
            outputs reach a layer as they are (of all linear layers, where none of these can be seen).
        use: ``"batch"`` or ``"running"``.
        device: where batches are moved to; where the model is, if ``None``.
        progress: show a progress bar.

    Returns:
        `Observation`: an `Observed` for each layer, by name too; prints as a table.

    Raises:
        OptionError: options that can't be, or a model without batch normalization.
        DataError: data that is empty, fails, does not fit the model or is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).eval()
        >>> found = observe(model, torch.tensor([[1.0, 0.0], [3.0, 0.0]]), progress=False)
        >>> found["0"].mean, found["0"].variance, found["0"].dead
        (array([2., 0.]), array([2., 0.]), 0.5)
        >>> found["0"].kl.round(3)
        array([2.153, 5.256])

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167). Kullback, Leibler 1951. Effective learning rate: van
        Laarhoven 2017 (arXiv:1706.05350).
    """
    check_reading(forward, batches, samples)
    if use not in USES:
        raise OptionError(f"use must be 'batch' or 'running', got {use!r}")
    view = adapt(model)
    statistics = view.statistics()
    if optimizer is not None:
        # said before the data is read
        view.rates(optimizer, ())
    source = Source(view.batches(data), batches, repeated=False)
    known = {state.name: state for state in view.states()}
    total = _Total(known, use)
    found: dict[str, Any] | BatchNormError
    try:
        with view.measuring(statistics, of_two(forward), device, watch=True) as measure:
            handed = None if use == "batch" else dict[Statistics, Pair]()
            for measured in through(measure, source, handed, doing="observing", samples=samples, shown=progress):
                total.add(measured)
        found = total.packed()
    except BatchNormError as error:
        found = error
    parts = gathered("observation", statistics, found)
    layers = list(dict.fromkeys([*statistics, *total.layers]))
    if not layers:
        raise OptionError("the model must have batch normalization, none was found")
    return _observation(view, layers, total, parts, known, optimizer)


@dataclass
class _Layer:
    """What this process has seen of a layer so far."""

    calls: list[Moments] = field(default_factory=list)
    within: Any = 0.0
    values: float = np.inf
    shares: tuple[float | None, float | None] = (None, None)
    inputs: np.ndarray | None = None
    linear: str = ""

    def add(self, calls: list[Moments]) -> None:
        self.calls += [Moments.empty()] * (len(calls) - len(self.calls))
        self.calls[: len(calls)] = [old.merge(new) for old, new in zip(self.calls, calls, strict=False)]
        self.within = self.within + Moments.empty().merge(*calls).m2
        self.values = min([self.values, *(float(m.count) for m in calls if m.count > 0)])

    def part(self) -> Part:
        return Part(tuple(self.calls), self.within, self.values, *self.shares, linear=self.linear)


class _Total:
    """What this process has seen.

    Args:
        known: γ, β and ε by name.
        use: what the layers normalize by.
    """

    def __init__(self, known: Mapping[str, NormState], use: str) -> None:
        self.known, self.use = known, use
        self.layers: dict[Statistics, _Layer] = {}
        self.batches = self.samples = 0

    def add(self, measured: Measured) -> None:
        """Take in a batch."""
        self.batches += 1
        self.samples += measured.samples
        for one, calls in measured.calls.items():
            self.layers.setdefault(one, _Layer()).add(calls)
        for one, name in measured.linear.items():
            self.layers[one].linear = name
        for one, inputs in measured.inputs.items():
            self.layers[one].inputs = inputs
            self.layers[one].shares = self._shares(one, inputs, measured.calls[one][0])

    def _shares(self, one: Statistics, inputs: np.ndarray, first: Moments) -> tuple[float | None, float | None]:
        """Return the shares of silent channels and of large outputs, in the piece of the first call."""
        state, used = self.known.get(one.name), normalizing(one, first, by_batch=self.use == "batch")
        gamma, beta, eps = (None, None, one.eps) if state is None else (state.gamma, state.beta, state.eps)
        return outputs(inputs, used, gamma, beta, eps)

    def packed(self) -> dict[str, Any]:
        """Return it by names, for other processes."""
        parts = {one.name: layer.part() for one, layer in self.layers.items()}
        return {"parts": parts, "batches": self.batches, "samples": self.samples}


def _observation(
    view: Model,
    layers: list[Statistics],
    total: _Total,
    packed: list[dict[str, Any]],
    known: Mapping[str, NormState],
    optimizer: Any,
) -> Observation:
    found, ulp = [], rounding(view.precision)
    for one in layers:
        parts = [pack["parts"][one.name] for pack in packed if one.name in pack["parts"]]
        part = _merged(parts)
        if part is not None and any(m.count > 0 for m in part.calls):
            own, state = total.layers.get(one), known.get(one.name)
            found.append(_judged(one, part, ulp, state, None if own is None else own.inputs))
    reached = {one.layer for one in found}
    return Observation(
        tuple(found),
        tuple(one.name for one in layers if one.name not in reached),
        sum(pack["batches"] for pack in packed),
        sum(pack["samples"] for pack in packed),
        total.use,
        () if optimizer is None else _rates(view, optimizer, found),
    )


def _judged(one: Statistics, part: Part, ulp: float, state: NormState | None, inputs: np.ndarray | None) -> Observed:
    if state is None:
        return judged(one, part, ulp=ulp, inputs=inputs)
    return judged(one, part, ulp=ulp, gamma=state.gamma, beta=state.beta, eps=state.eps, inputs=inputs)


def _merged(parts: Iterable[Part]) -> Part | None:
    total = None
    for part in parts:
        total = part if total is None else total.merge(part)
    return total


def _rates(view: Model, optimizer: Any, layers: list[Observed]) -> tuple[Rate, ...]:
    norms = {one.linear: one.layer for one in layers if one.linear}
    return tuple(replace(rate, norm=norms.get(rate.layer, "")) for rate in view.rates(optimizer, tuple(norms)))
