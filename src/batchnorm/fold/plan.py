"""Where can this Affine go? The algorithm of folding, on the neutral picture.

A batch normalization layer in evaluation is an Affine. It moves backward, against the edges, into what produced its input, or
forward into everything that reads its output, through all that it commutes with, until linear layers (or other Affines) have
absorbed all of it. What can't be absorbed stays behind as a plain scale and shift.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import namespace
from batchnorm.fold import motion
from batchnorm.fold.moving import Absorption, BlockedError, Mover
from batchnorm.graph import Graph, Linear, Node, Norm, Normalize, Value, Weights
from batchnorm.protocol import Border

__all__ = ["Fate", "Plan", "plan_folding", "why_not_fixed"]

GONE, PLAIN, UNTOUCHED = "gone", "plain", "untouched"


@dataclass(slots=True)
class Fate:
    """What becomes of a batch normalization layer.

    Args:
        affine: what it does, with the Affines of other layers that it took in.
        state: ``"gone"``, ``"plain"`` (a scale and shift is left) or ``"untouched"``.
        into: names of the layers that absorbed it.
        how: in words, for what is gone; the reason, for what is not.
        border: what stands in its place to pad a convolution.
    """

    affine: Affine | None
    state: str = ""
    into: tuple[str, ...] = ()
    how: str = ""
    border: Border | None = None


@dataclass(slots=True)
class Plan:
    """The fate of each norm, and the Affines that each linear layer takes in."""

    norms: dict[Norm, Fate] = field(default_factory=dict)
    before: dict[Weights, Affine] = field(default_factory=dict)
    after: dict[Weights, Affine] = field(default_factory=dict)
    unpadded: set[Weights] = field(default_factory=set)

    def absorbers(self) -> list[Weights]:
        """Linear layers whose weights change."""
        return list({**self.before, **self.after})


def why_not_fixed(norm: Norm) -> str:
    """Return why a layer is no fixed map of each channel, or must not be replaced; empty where it is one and may."""
    if norm.by_batch:
        why = "it normalizes by the statistics of the batch: call .eval() first, or give it running statistics"
        return norm.locked or why
    if norm.mean is None or norm.variance is None:
        return "it has no running statistics: give it some (recalibrate) or leave it as it is"
    held = [v for v in (norm.mean, norm.variance, norm.gamma, norm.beta) if v is not None]
    if not all(np.isfinite(v).all() for v in held):
        return "its parameters or statistics are not finite: recalibrate it, or go back to a checkpoint"
    if (norm.variance < 0).any():
        return f"its running variance is negative ({norm.variance.min():g}): recalibrate it"
    if (norm.variance + norm.eps <= 0).any():
        return "variance + eps is zero in a channel, so its scale is infinite: give it a positive eps"
    return norm.locked


def plan_folding(graph: Graph, closed: dict[Weights | Norm, str] | None = None) -> Plan:
    """Decide for every batch normalization layer of a graph where it goes.

    Args:
        graph: the picture of the network.
        closed: linear layers that must not absorb anything, and norms that must stay, with the reason.
    """
    return _Planner(graph, closed or {}).plan()


class _Planner:
    def __init__(self, graph: Graph, closed: dict[Weights | Norm, str]) -> None:
        self.graph = graph
        self.closed = closed
        self.result = Plan()
        self.mover = Mover(self._take, self._is_gone, drops=graph.training)
        self.calls: dict[Any, list[Node]] = {**graph.norms(), **graph.weights()}

    def plan(self) -> Plan:
        for norm in self.graph.norms():
            reason = why_not_fixed(norm) or self.closed.get(norm, "")
            self.result.norms[norm] = Fate(None, UNTOUCHED, how=reason) if reason else Fate(norm.affine)
        for norm, fate in self.result.norms.items():
            if not fate.state:
                self._place(norm, fate)
        return self.result

    def _place(self, norm: Norm, fate: Fate) -> None:
        reasons = []
        for direction in (self._backward, self._forward, self._border):
            try:
                how = direction(norm, fate)
            except BlockedError as blocked:
                reasons += [str(blocked)] if str(blocked) else []
            else:
                fate.state, fate.how = GONE, how
                return
        fate.state, fate.how = PLAIN, "; ".join(dict.fromkeys(reasons))

    def _backward(self, norm: Norm, fate: Fate) -> str:
        absorptions = [
            absorption
            for node in self.calls[norm]
            for absorption in self.mover.push_back(node.inputs[0], _spread(fate, node), node)
        ]
        return self._commit(fate, absorptions, "backward")

    def _forward(self, norm: Norm, fate: Fate) -> str:
        if any(node.inputs[0].overwritten for node in self.calls[norm]):
            raise BlockedError("its input is written over in place, after it would be read")
        absorptions = [
            absorption
            for node in self.calls[norm]
            for absorption in self.mover.push_forward(node.outputs[0], _spread(fate, node))
        ]
        return self._commit(fate, absorptions, "forward")

    def _commit(self, fate: Fate, absorptions: list[Absorption], direction: str) -> str:
        """Let all absorbers take in their Affines, if each takes the same one in all of its calls."""
        taken: dict[Norm | Weights, list[Absorption]] = {}
        for absorption in absorptions:
            taken.setdefault(_layer(absorption.node), []).append(absorption)
        for layer, own in taken.items():
            self._check_all_calls(layer, own)
        for layer, own in taken.items():
            self._absorb(layer, own[0])
        fate.into = tuple(dict.fromkeys(layer.name for layer in taken))
        return direction

    def _check_all_calls(self, layer: Norm | Weights, own: list[Absorption]) -> None:
        hits = Counter(id(absorption.node) for absorption in own)
        if set(hits) != {id(node) for node in self.calls[layer]} or max(hits.values()) > 1:
            raise BlockedError(f"{layer.name} is used in another place too, where this would change the result")
        first = own[0].affine
        if any(not _equal(first, other.affine) for other in own[1:]):
            raise BlockedError(f"{layer.name} is called several times and would need other weights each time")

    def _absorb(self, layer: Norm | Weights, absorption: Absorption) -> None:
        affine = absorption.affine
        if isinstance(layer, Norm):
            fate = self.result.norms[layer]
            assert fate.affine is not None  # noqa: S101
            fate.affine = fate.affine.then(affine) if absorption.after else affine.then(fate.affine)
        elif absorption.after:
            self.result.after[layer] = self.result.after[layer].then(affine) if layer in self.result.after else affine
        else:
            self.result.before[layer] = (
                affine.then(self.result.before[layer]) if layer in self.result.before else affine
            )

    def _take(self, node: Node, affine: Affine, value: Value, after: bool) -> Absorption:
        """Let a linear node or a norm take in an Affine, or say why it can't."""
        operation = node.operation
        if isinstance(operation, Normalize):
            if self.result.norms[operation.norm].state not in ("", PLAIN):
                raise BlockedError(f"{node.name} beside it can't take it in")
            axis = operation.axis
        else:
            assert isinstance(operation, Linear)  # noqa: S101
            axis = operation.out_axis if after else operation.in_axis
        vectors = motion.along(affine, axis, value.shape[axis])
        if vectors is None:
            raise BlockedError(
                f"it normalizes another axis than the one that {node.name} "
                f"{'writes' if after else 'reads'} its channels to"
            )
        if isinstance(operation, Linear):
            self._check_linear(operation, node, vectors, after=after)
        return Absorption(node, vectors, after)

    def _check_linear(self, operation: Linear, node: Node, affine: Affine, *, after: bool) -> None:
        weights = operation.weights
        shifts = not motion.shift_free(affine)
        if reason := self.closed.get(weights) or weights.locked:
            raise BlockedError(f"the weights of {weights.name} may not change: {reason}")
        if shifts and not weights.has_bias and weights.no_bias:
            raise BlockedError(f"{weights.name} can't be given a bias: {weights.no_bias}")
        if not after and weights in self.result.unpadded:
            raise BlockedError(f"{weights.name} is padded with the values of another layer already")
        if not after and shifts and not operation.every_tap:
            raise BlockedError(
                f"{node.name} is a transposed convolution, a shift before it reaches its outputs unevenly"
            )
        if not after and shifts and operation.padding:
            raise BlockedError(f"{node.name} pads with zeros, which would not be shifted")

    def _is_gone(self, node: Node) -> bool:
        operation = node.operation
        if not isinstance(operation, Normalize):
            return False
        fate = self.result.norms[operation.norm]
        return fate.state == GONE and fate.border is None

    # -- into a padded convolution ---------------------------------------------------------------------------------

    def _border(self, norm: Norm, fate: Fate) -> str:
        """Fold forward into convolutions that pad, by padding with the value that normalization maps to zero."""
        (first_call, *others) = self.calls[norm]
        assert fate.affine is not None  # noqa: S101
        assert isinstance(first_call.operation, Normalize)  # noqa: S101
        value, axis = first_call.outputs[0], first_call.operation.axis
        readers = [(node, node.operation) for node in value.consumers if isinstance(node.operation, Linear)]
        paddings = {operation.padding for _, operation in readers}
        alike = len(readers) == len(value.consumers) and len(paddings) == 1 and paddings != {()}
        if not self.graph.borders or others or value.pinned or not alike:
            raise BlockedError
        border = Border(_maps_to_zero(fate.affine), axis, paddings.pop())
        absorptions = [Absorption(node, fate.affine, after=False) for node, _ in readers]
        for node, operation in readers:
            _check_range(border.value, operation.weights)
            if operation.weights.fixed or operation.in_axis != axis or not operation.every_tap:
                raise BlockedError
            self._check_linear(replace(operation, padding=()), node, fate.affine, after=False)
        self._commit(fate, absorptions, "forward")
        fate.border = border
        self.result.unpadded |= {operation.weights for _, operation in readers}
        return "forward, padding with the value that it maps to zero,"


def _spread(fate: Fate, node: Node) -> Affine:
    assert fate.affine is not None  # noqa: S101
    assert isinstance(node.operation, Normalize)  # noqa: S101
    return motion.spread(fate.affine, node.operation.axis, len(node.inputs[0].shape))


def _layer(node: Node) -> Norm | Weights:
    operation = node.operation
    assert isinstance(operation, Linear | Normalize)  # noqa: S101
    return operation.weights if isinstance(operation, Linear) else operation.norm


def _maps_to_zero(affine: Affine) -> np.ndarray:
    """Return the values that an Affine maps to zero."""
    if (affine.shift[affine.scale == 0] != 0).any():
        raise BlockedError("a channel has γ = 0, so that no padding value stands for zero")
    with np.errstate(all="ignore"):
        value = np.where(affine.scale == 0, 0.0, -affine.shift / np.where(affine.scale == 0, 1.0, affine.scale))
    if not np.isfinite(value).all():
        raise BlockedError("a scale is so small that the padding value that stands for zero is infinite")
    return value


def _check_range(value: np.ndarray, weights: Weights) -> None:
    weight = weights.read()[0]
    if np.abs(value).max() > float(namespace(weight).finfo(weight.dtype).max):
        raise BlockedError(f"the padding value that stands for zero is beyond {weight.dtype}")


def _equal(a: Affine, b: Affine) -> bool:
    return bool(np.array_equal(a.scale, b.scale) and np.array_equal(a.shift, b.shift))
