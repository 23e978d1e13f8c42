"""What becomes of a constant channel: how far its value can be carried, and what can be cut out with it."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import to_numpy
from batchnorm.fold import motion
from batchnorm.fold.moving import BlockedError
from batchnorm.graph import (
    Activation,
    Concat,
    Graph,
    Identity,
    Linear,
    Node,
    Norm,
    Normalize,
    Pad,
    Pool,
    Reshape,
    Transpose,
    Value,
    Weights,
)

__all__ = ["ConstantChannels"]


@dataclass(slots=True)
class Constant:
    """Channels of a value on one axis that all hold the same number.

    Args:
        axis: the axis of the channels.
        gone: ``(C,)``, true for these channels.
        value: the number; ``None`` on the way back, where nobody reads it any more.
    """

    axis: int
    gone: np.ndarray
    value: float | None


class ConstantChannels:
    """The channels that can be cut out of a network, found one after the other.

    Args:
        graph: the network.
        small: the channels of each normalization layer whose γ counts as zero.
        reshapes: whether a reshape takes another number of channels.

    Attributes:
        outputs: output channels that go, for each linear layer.
        inputs: input channels that go, with their constants, for each linear layer.
        norms: channels that go, for each normalization layer.
        depthwise: linear layers that lose whole groups.
    """

    def __init__(self, graph: Graph, small: dict[Norm, set[int]], *, reshapes: bool) -> None:
        self.calls: dict[Any, list[Node]] = {**graph.norms(), **graph.weights()}
        self.small = small
        self.reshapes = reshapes
        self.outputs: dict[Weights, set[int]] = defaultdict(set)
        self.inputs: dict[Weights, dict[int, float]] = defaultdict(dict)
        self.norms: dict[Norm, set[int]] = defaultdict(set)
        self.depthwise: set[Weights] = set()

    def remove(self, norm: Norm, channel: int) -> None:
        """Cut a channel of a normalization whose γ is zero out of the network, all of it or nothing.

        Raises:
            BlockedError: something would change that may not.
        """
        node = self._only_call(norm, norm.name)
        assert isinstance(node.operation, Normalize)  # noqa: S101
        axis, shape = node.operation.axis, node.inputs[0].shape
        gone = np.arange(shape[axis]) == channel
        cut = _Cut(self)
        cut.norms[norm].add(channel)
        cut.backward(node.inputs[0], Constant(axis, gone, None), node)
        cut.forward(node.outputs[0], Constant(axis, gone, self.beta(norm, channel)))
        cut.commit()

    def beta(self, norm: Norm, channel: int) -> float:
        """Return what a channel with γ = 0 is."""
        return 0.0 if norm.beta is None else float(norm.beta[channel])

    def size(self, weights: Weights) -> int:
        """Return the number of output channels of a linear layer."""
        node = self.calls[weights][0]
        assert isinstance(node.operation, Linear)  # noqa: S101
        return node.outputs[0].shape[node.operation.out_axis]

    def in_size(self, weights: Weights) -> int:
        """Return the number of input channels of a linear layer."""
        node = self.calls[weights][0]
        assert isinstance(node.operation, Linear)  # noqa: S101
        return node.inputs[0].shape[node.operation.in_axis]

    def groups_gone(self, weights: Weights) -> set[int]:
        """Return the groups of a depthwise convolution that go."""
        members = self.size(weights) // weights.layout.groups
        return {channel // members for channel in self.outputs[weights]}

    def _only_call(self, layer: Norm | Weights, name: str) -> Node:
        nodes = self.calls[layer]
        if len(nodes) > 1:
            raise BlockedError(f"{name} is called several times")
        return nodes[0]


class _Cut:
    """One channel and all that goes with it."""

    def __init__(self, whole: ConstantChannels) -> None:
        self.whole = whole
        self.outputs: dict[Weights, set[int]] = defaultdict(set)
        self.inputs: dict[Weights, dict[int, float]] = defaultdict(dict)
        self.norms: dict[Norm, set[int]] = defaultdict(set)
        self.depthwise: set[Weights] = set()

    def commit(self) -> None:
        """Join the cut to the others, if every layer keeps a channel."""
        whole = self.whole
        for weights, gone in self.outputs.items():
            if len(whole.outputs[weights] | gone) >= whole.size(weights):
                raise BlockedError(f"{weights.name} would have no channel left")
        for weights, constants in self.inputs.items():
            if len(whole.inputs[weights] | constants) >= whole.in_size(weights):
                raise BlockedError(f"{weights.name} would have no input left")
        for weights, gone in self.outputs.items():
            whole.outputs[weights] |= gone
        for weights, constants in self.inputs.items():
            whole.inputs[weights] |= constants
        for norm, gone in self.norms.items():
            whole.norms[norm] |= gone
        whole.depthwise |= self.depthwise

    # -- what reads the channel ------------------------------------------------------------------------------------

    def forward(self, value: Value, constant: Constant) -> None:
        """Carry a constant to everything that reads it."""
        if value.pinned:
            raise BlockedError(f"its output may not change: {value.pinned}")
        for node in dict.fromkeys(value.consumers):
            operation = node.operation
            if isinstance(operation, Linear):
                self._into_linear(node, operation, constant)
            elif isinstance(operation, Normalize):
                self._through_norm(node, operation, constant)
            elif isinstance(operation, Reshape) and not self.whole.reshapes:
                raise BlockedError(f"{node.name} after it wants the number of channels as it is")
            else:
                self.forward(node.outputs[0], _through(node, value, constant))

    def _into_linear(self, node: Node, operation: Linear, constant: Constant) -> None:
        weights = operation.weights
        self._check(weights)
        if operation.in_axis != constant.axis:
            raise BlockedError(f"{node.name} reads another axis")
        assert constant.value is not None  # noqa: S101
        channels = [int(c) for c in np.flatnonzero(constant.gone)]
        if constant.value != 0 and (operation.padding or not operation.every_tap):
            raise BlockedError(f"{node.name} pads with zeros beside the constant {constant.value:.3g}")
        if weights.layout.groups == 1:
            if constant.value != 0 and not weights.has_bias and weights.no_bias:
                raise BlockedError(f"{weights.name} can't be given a bias: {weights.no_bias}")
            self.inputs[weights] |= dict.fromkeys(channels, constant.value)
            return
        members = self._members(weights)
        weight, bias = weights.read()
        # a depthwise kernel has one row for each output channel, in the order of the groups
        rows = to_numpy(weight).reshape(self.whole.size(weights), -1).sum(axis=1)
        offsets = np.zeros(len(rows)) if bias is None else to_numpy(bias)
        self.depthwise.add(weights)
        for channel in channels:
            for out in range(channel * members, (channel + 1) * members):
                self.outputs[weights].add(out)
                gone = np.arange(len(rows)) == out
                value = float(offsets[out] + constant.value * rows[out])
                self.forward(node.outputs[0], Constant(operation.out_axis, gone, value))

    def _through_norm(self, node: Node, operation: Normalize, constant: Constant) -> None:
        norm = operation.norm
        self._check_norm(norm)
        if operation.axis != constant.axis:
            raise BlockedError(f"{node.name} normalizes another axis")
        assert constant.value is not None  # noqa: S101
        for channel in np.flatnonzero(constant.gone):
            self.norms[norm].add(int(channel))
            value = self._normalized(norm, int(channel), constant.value)
            gone = np.arange(len(constant.gone)) == channel
            self.forward(node.outputs[0], Constant(operation.axis, gone, value))

    def _normalized(self, norm: Norm, channel: int, value: float) -> float:
        if channel in self.whole.small.get(norm, ()):
            return self.whole.beta(norm, channel)
        return float(norm.affine.scale[channel] * value + norm.affine.shift[channel])

    # -- what computes the channel ---------------------------------------------------------------------------------

    def backward(self, value: Value, constant: Constant, reader: Node) -> None:
        """Cut a channel that nobody reads any more out of what computes it."""
        if value.pinned:
            raise BlockedError(f"its input may not change: {value.pinned}")
        if [node for node in value.consumers if node is not reader] or len(value.consumers) > 1:
            raise BlockedError("its input is used in another place too")
        node = value.producer
        if node is None:
            raise BlockedError("nothing of the model computes its input")
        operation = node.operation
        if isinstance(operation, Linear):
            self._out_of_linear(node, operation, constant)
        elif isinstance(operation, Normalize):
            self._out_of_norm(node, operation, constant)
        elif isinstance(operation, Activation | Identity | Pool):
            self.backward(node.inputs[0], constant, node)
        elif isinstance(operation, Concat) and operation.axis == constant.axis:
            self._out_of_pieces(node, constant)
        else:
            raise BlockedError(f"{node.name} computes its input, which no channel can be cut out of")

    def _out_of_norm(self, node: Node, operation: Normalize, constant: Constant) -> None:
        self._check_norm(operation.norm)
        if operation.axis != constant.axis:
            raise BlockedError(f"{node.name} normalizes another axis")
        self.norms[operation.norm] |= {int(c) for c in np.flatnonzero(constant.gone)}
        self.backward(node.inputs[0], constant, node)

    def _out_of_pieces(self, node: Node, constant: Constant) -> None:
        start = 0
        for source in node.inputs:
            stop = start + source.shape[constant.axis]
            if constant.gone[start:stop].any():
                self.backward(source, Constant(constant.axis, constant.gone[start:stop], None), node)
            start = stop

    def _out_of_linear(self, node: Node, operation: Linear, constant: Constant) -> None:
        weights = operation.weights
        self._check(weights)
        if operation.out_axis != constant.axis:
            raise BlockedError(f"{node.name} writes another axis")
        channels = {int(c) for c in np.flatnonzero(constant.gone)}
        if weights.layout.groups > 1:
            if self._members(weights) != 1:
                raise BlockedError(f"{node.name} computes several channels from one")
            self.depthwise.add(weights)
            self.backward(node.inputs[0], Constant(operation.in_axis, constant.gone, None), node)
        self.outputs[weights] |= channels

    # -- checks ----------------------------------------------------------------------------------------------------

    def _members(self, weights: Weights) -> int:
        """Return how many outputs a group of a depthwise convolution has."""
        if weights.layout.groups != self.whole.in_size(weights) or weights.layout.grouped == "in":
            raise BlockedError(f"{weights.name} is a grouped convolution")
        return self.whole.size(weights) // weights.layout.groups

    def _check(self, weights: Weights) -> None:
        self.whole._only_call(weights, weights.name)
        if reason := weights.locked or weights.fixed:
            raise BlockedError(f"{weights.name} may not change: {reason}")

    def _check_norm(self, norm: Norm) -> None:
        self.whole._only_call(norm, norm.name)
        if reason := why_it_stays(norm):
            raise BlockedError(f"{norm.name} may not change: {reason}")


def why_it_stays(norm: Norm) -> str:
    """Return why no channel can be cut out of a normalization."""
    if norm.by_batch or norm.mean is None:
        return "it normalizes by the statistics of the batch"
    return norm.locked or norm.computed


def _through(node: Node, value: Value, constant: Constant) -> Constant:
    """Return what a constant is behind a node that works on each channel alone."""
    assert constant.value is not None  # noqa: S101
    match node.operation:
        case Identity():
            return constant
        case Activation(function=function) if function is not None:
            return Constant(constant.axis, constant.gone, float(function(np.array([constant.value]))[0]))
        case Pool(axes=axes, counted_padding=counted) if constant.axis not in axes and not (counted and constant.value):
            return constant
        case Pad(axes=axes, value=pad) if constant.axis not in axes and pad in (None, constant.value):
            return constant
        case Transpose(order=order):
            return Constant(order.index(constant.axis), constant.gone, constant.value)
        case Concat(axis=axis) if axis == constant.axis:
            return _placed(node, value, constant)
        case Reshape():
            return _reshaped(value.shape, node.outputs[0].shape, constant, node)
    raise BlockedError(f"{node.name} after it can't do without the channel")


def _placed(node: Node, value: Value, constant: Constant) -> Constant:
    pieces = [constant.gone if v is value else np.zeros(v.shape[constant.axis], bool) for v in node.inputs]
    if sum(v is value for v in node.inputs) > 1:
        raise BlockedError(f"{node.name} after it reads it twice")
    return Constant(constant.axis, np.concatenate(pieces), constant.value)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], constant: Constant, node: Node) -> Constant:
    marks = Affine(constant.gone.astype(float), np.arange(len(constant.gone), dtype=float))
    moved = motion.reshaped(motion.spread(marks, constant.axis, len(before)), before, after)
    varying = [] if moved is None else [axis for axis, n in enumerate(moved.shift.shape) if n > 1]
    if moved is None or len(varying) != 1:
        raise BlockedError(f"{node.name} after it mixes the channel with others")
    return Constant(varying[0], moved.scale.reshape(-1) > 0, constant.value)
