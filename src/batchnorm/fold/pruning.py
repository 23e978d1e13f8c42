"""The verb `prune`: channels that a normalization makes constant leave the network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.arrays import namespace, to_numpy
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.fold.constants import ConstantChannels
from batchnorm.fold.moving import BlockedError
from batchnorm.fold.plan import why_not_fixed
from batchnorm.fold.proof import Error, prove
from batchnorm.fold.result import Kept
from batchnorm.graph import Graph, Norm, Weights
from batchnorm.models import adapt
from batchnorm.protocol import Changes, Model
from batchnorm.tables import table

__all__ = ["PruneResult", "Pruned", "prune"]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Channels of a normalization layer that are gone.

    Args:
        layer: dotted name of the layer.
        channels: their indices.
        of: how many channels it had.
    """

    layer: str
    channels: tuple[int, ...]
    of: int


@dataclass(frozen=True, slots=True)
class PruneResult:
    """A model without its constant channels, and the proof; prints as a table.

    Args:
        model: the model, of the type that was given.
        pruned: the channels that are gone, for each layer.
        kept: layers with channels of small γ that had to stay, each with its reason.
        error: differences from the model whose small γ are exactly zero, and their bounds.
        approximation: largest difference that setting them to zero makes, relative to the largest output.
    """

    model: Any
    pruned: tuple[Pruned, ...]
    kept: tuple[Kept, ...]
    error: Error
    approximation: float

    def __str__(self) -> str:
        rows = [(p.layer, f"{len(p.channels)} of {p.of} channels gone", "") for p in self.pruned]
        rows += [(k.layer, k.became, k.reason) for k in self.kept]
        total = f"{sum(len(p.channels) for p in self.pruned)} channels pruned, approximation {self.approximation:.2g}"
        return "\n".join([table(("Layer", "Became", "Why not"), rows), total, str(self.error)])


def prune(model: Any, example: Any | None = None, *, threshold: float = 0.0, inplace: bool = False) -> PruneResult:
    """Remove the channels whose γ is (near) zero, and carry what they still say on.

    With γ = 0 a channel is the constant β. After an activation f it is f(β), and every linear layer that reads it adds
    ``W[:, c] · f(β[c])`` to all of its outputs: that goes into its bias. Then nothing depends on the channel, and it is cut out
    of the layer that computes it, of the normalization, and of those that read it.

    Args:
        model: as in `fold`, in evaluation mode.
        example: as in `fold`.
        threshold: the largest ``|γ|`` that counts as zero.
        inplace: change ``model`` itself too.

    Returns:
        `PruneResult`: ``model``, ``pruned``, ``kept``, ``error`` and ``approximation``; prints as a table.

    Raises:
        OptionError: a threshold below zero, a model of no known framework, or one that fails on the example.
        VerificationError: the outputs differ; nothing is returned, ``model`` is as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> _ = nn.init.zeros_(net[1].weight[2:5])
        >>> prune(net, torch.randn(2, 3, 16, 16)).pruned
        (Pruned(layer='1', channels=(2, 3, 4), of=8),)

    Reference:
        Liu et al.: Learning Efficient Convolutional Networks through Network Slimming, 2017 (arXiv:1708.06519).
    """
    if not threshold >= 0:
        raise OptionError(f"threshold must be 0 or positive, got {threshold}")
    before = adapt(model)
    graph = before.graph(example)
    inputs = before.inputs(example, None)
    expected = before.outputs(inputs)
    pruner, after = _cut_out(before, graph, threshold, inputs)
    zeroed = before.changed(Changes(gammas=pruner.gammas()))
    error = prove(zeroed, after, lambda wide: wide.change(pruner.changes(exact=True)), example, graph.weights())
    approximation = _distance(expected, zeroed.outputs(inputs))
    if inplace:
        before.change(pruner.changes(exact=False))
        after = before
    return PruneResult(after.model, tuple(pruner.pruned()), tuple(pruner.kept), error, approximation)


def _cut_out(before: Model, graph: Graph, threshold: float, inputs: Any) -> "tuple[_Pruner, Model]":
    """Cut, as far as the model still runs: one with sizes in its program may not, behind a reshape."""
    pruner = _Pruner(graph, threshold, reshapes=True)
    try:
        after = before.changed(pruner.changes(exact=False))
        after.outputs(inputs)
    except BatchNormError:
        pruner = _Pruner(graph, threshold, reshapes=False)
        after = before.changed(pruner.changes(exact=False))
    return pruner, after


class _Pruner:
    def __init__(self, graph: Graph, threshold: float, *, reshapes: bool) -> None:
        self.graph = graph
        self.threshold = threshold
        self.small = {norm: self._small(norm) for norm in graph.norms()}
        self.channels = ConstantChannels(graph, self.small, reshapes=reshapes)
        self.kept: list[Kept] = []
        self._prune()

    def _small(self, norm: Norm) -> set[int]:
        """Return the channels whose γ counts as zero."""
        return set() if norm.gamma is None else {int(c) for c in np.flatnonzero(np.abs(norm.gamma) <= self.threshold)}

    def _prune(self) -> None:
        reasons: dict[Norm, dict[int, str]] = {}
        for norm, small in self.small.items():
            reason = why_not_fixed(norm) or norm.computed
            reasons[norm] = dict.fromkeys(small, reason) if reason else dict(self._remove(norm))
        for norm, small in self.small.items():
            # a channel may go with another one later on
            left = {c: reason for c, reason in reasons[norm].items() if c not in self.channels.norms.get(norm, ())}
            if left:
                why = "; ".join(dict.fromkeys(left.values()))
                self.kept.append(Kept(norm.name, why, f"{len(left)} of {len(small)} small channels kept"))

    def _remove(self, norm: Norm) -> Iterator[tuple[int, str]]:
        """Cut the small channels of a layer, and yield a reason for each that stays."""
        for channel in sorted(self.small[norm]):
            try:
                self.channels.remove(norm, channel)
            except BlockedError as blocked:
                yield channel, str(blocked)

    def pruned(self) -> list[Pruned]:
        """Return what is gone, in the order of the layers."""
        removed = self.channels.norms
        return [
            Pruned(norm.name, tuple(sorted(removed[norm])), len(norm.mean))
            for norm in self.graph.norms()
            if removed.get(norm) and norm.mean is not None
        ]

    def gammas(self) -> dict[Norm, np.ndarray]:
        """Return γ with zeros in the channels that are gone by themselves."""
        gammas = {}
        for norm, removed in self.channels.norms.items():
            small = sorted(removed & self.small[norm])
            if norm.gamma is not None and np.any(norm.gamma[small] != 0):
                gammas[norm] = norm.gamma.copy()
                gammas[norm][small] = 0.0
        return gammas

    def changes(self, *, exact: bool) -> Changes:
        """Return what the wing shall cut, with weights in float64 or in their own dtype."""
        weights = dict.fromkeys((*self.channels.outputs, *self.channels.inputs))
        changes = Changes(weights={each: self._cut(each, exact=exact) for each in weights})
        for norm, removed in self.channels.norms.items():
            assert norm.mean is not None  # noqa: S101
            changes.channels[norm] = np.setdiff1d(np.arange(len(norm.mean)), sorted(removed))
        for each in weights:
            if each in self.channels.depthwise:
                changes.groups[each] = each.layout.groups - len(self.channels.groups_gone(each))
        return changes

    def _cut(self, weights: Weights, *, exact: bool) -> tuple[Any, Any]:
        weight, bias = weights.read()
        xp = namespace(weight)
        layout = weights.layout
        b = np.zeros(self.channels.size(weights)) if bias is None else to_numpy(bias)
        constants = self.channels.inputs.get(weights, {})
        if constants:
            w = np.moveaxis(to_numpy(weight), (layout.out_axis, layout.in_axis), (0, 1))
            for channel, value in constants.items():
                b = b + value * w[:, channel].reshape(len(w), -1).sum(axis=1)
            weight = _without(weight, layout.in_axis, set(constants))
        gone = self.channels.outputs.get(weights, set())
        if gone:
            axis = layout.in_axis if layout.grouped == "in" and weights in self.channels.depthwise else layout.out_axis
            weight = _without(weight, axis, gone)
            b = np.delete(b, sorted(gone))
        has_bias = bias is not None or any(constants.values())
        dtype = (weight if bias is None else bias).dtype
        new = xp.asarray(b, device=weight.device) if has_bias else None
        if exact:
            weight = xp.astype(weight, xp.float64)
        elif new is not None:
            new = xp.astype(new, dtype)
        return weight, new


def _without(array: Any, axis: int, indices: set[int]) -> Any:
    xp = namespace(array)
    keep = np.setdiff1d(np.arange(array.shape[axis]), sorted(indices))
    return xp.take(array, xp.asarray(keep, device=array.device), axis=axis)


def _distance(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    pairs = zip(expected, actual, strict=True)
    return max(
        (float(np.abs(a - e).max(initial=0.0) / (np.abs(e).max(initial=0.0) or 1.0)) for e, a in pairs), default=0.0
    )
