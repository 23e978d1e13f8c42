"""A framework-neutral picture of a network.

A `Graph` is a list of `Node` in the order they run; each reads and writes `Value`. What a node does is one word of a small
closed vocabulary (`Linear`, `Normalize`, `Activation`, ...): whatever a wing can't say in it is `Other`, through which
nothing passes. Layers with numbers of their own (`Weights`, `Norm`) are objects that several nodes may share, as a module may
be called several times.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import Array

__all__ = [
    "Activation",
    "Add",
    "Concat",
    "Graph",
    "Identity",
    "Layout",
    "Linear",
    "Node",
    "Norm",
    "Normalize",
    "Operation",
    "Other",
    "Pad",
    "Pool",
    "Reshape",
    "Transpose",
    "Value",
    "Weights",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels are in an array of weights.

    Args:
        out_axis: axis of the output channels.
        in_axis: axis of the input channels.
        groups: of a grouped convolution; 1 for everything else.
        grouped: the axis that holds the channels of all groups: ``"out"``, or ``"in"`` in a transposed convolution. The other
            axis holds the channels of one group.
        shape: reshape the array to this first, so that the above holds (a depthwise kernel that keeps two channel axes).
    """

    out_axis: int
    in_axis: int
    groups: int = 1
    grouped: str = "out"
    shape: tuple[int, ...] | None = None


@dataclass(eq=False, slots=True)
class Weights:
    """The weights of a linear layer, which several nodes may use.

    Args:
        name: dotted name of the layer.
        layout: where the channels are in the weight.
        read: returns the weight and the bias (``None`` without one) as they are stored.
        has_bias: whether a bias is there.
        no_bias: why the layer can't be given a bias; empty where it can.
        locked: why the weights may not change; empty where they may.
        fixed: why the layer can't be given another padding or other sizes; empty where it can.
        key: what the wing knows the layer by.
    """

    name: str
    layout: Layout
    read: Callable[[], tuple[Array, Array | None]]
    has_bias: bool
    no_bias: str = ""
    locked: str = ""
    fixed: str = ""
    key: Any = None


@dataclass(eq=False, slots=True)
class Norm:
    """A batch normalization layer, which several nodes may use; arrays in float64, ``(C,)``.

    Args:
        name: dotted name of the layer.
        mean: the running mean; ``None`` without statistics.
        variance: the running variance; ``None`` without statistics.
        gamma: the scale; ``None`` for 1.
        beta: the shift; ``None`` for 0.
        eps: added to the variance under the root.
        by_batch: whether it normalizes by the statistics of the batch, as in training.
        locked: why the layer may not be replaced; empty where it may.
        computed: why the running mean and the parameters are not stored as they are used; empty where they are.
        plain: whether it is a scale and shift in the model already, which is no news where it stays one.
        holder: dotted name of what keeps the statistics, where that is not ``name``; empty where it is.
        decay: weight of the past in the running statistics; ``None`` where all batches count alike, or nobody knows.
        unbiased: whether the running variance is that of n - 1; ``None`` where nobody knows.
        key: what the wing knows the layer by.
    """

    name: str
    mean: np.ndarray | None
    variance: np.ndarray | None
    gamma: np.ndarray | None
    beta: np.ndarray | None
    eps: float
    by_batch: bool = False
    locked: str = ""
    computed: str = ""
    plain: bool = False
    holder: str = ""
    decay: float | None = None
    unbiased: bool | None = None
    key: Any = None

    @property
    def affine(self) -> Affine:
        """What the layer does to each channel with its stored statistics."""
        assert self.mean is not None  # noqa: S101
        assert self.variance is not None  # noqa: S101
        gamma = np.ones_like(self.mean) if self.gamma is None else self.gamma
        beta = np.zeros_like(self.mean) if self.beta is None else self.beta
        return Affine.from_statistics(self.mean, self.variance, gamma, beta, self.eps)


@dataclass(frozen=True, slots=True)
class Linear:
    """Dense layers and convolutions: a weighted sum over input channels (and places), plus a bias.

    Args:
        weights: the layer.
        in_axis: axis of the input channels in the data.
        out_axis: axis of the output channels in the data.
        padding: zeros that are put around the data, ``(axis, before, after)`` for each padded axis.
        every_tap: whether each output sees all weights of its channel; in a transposed convolution it does not.
    """

    weights: Weights
    in_axis: int
    out_axis: int
    padding: tuple[tuple[int, int, int], ...] = ()
    every_tap: bool = True


@dataclass(frozen=True, slots=True)
class Normalize:
    """Batch normalization of the channels on ``axis`` by the layer ``norm``."""

    norm: Norm
    axis: int


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of each value.

    Args:
        homogeneous: whether ``f(s · x) = s · f(x)`` for every positive s (ReLU, leaky ReLU).
        monotone: whether it never falls.
        function: computes it on an array in float64; ``None`` where it is not the same for each channel, or not known.
    """

    homogeneous: bool = False
    monotone: bool = False
    function: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """The sum of its inputs, all of one shape."""


@dataclass(frozen=True, slots=True)
class Concat:
    """Its inputs, one after the other along ``axis``."""

    axis: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Averages or maxima over places, channel by channel; also interpolation, which is an average.

    Args:
        kind: ``"average"`` (weights that sum to 1) or ``"max"``.
        axes: the axes of the places.
        counted_padding: whether zeros around the data are averaged too.
    """

    kind: str
    axes: tuple[int, ...]
    counted_padding: bool = False


@dataclass(frozen=True, slots=True)
class Pad:
    """More places around the data: copies of its own values (``value=None``), or a constant."""

    axes: tuple[int, ...]
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same values in the same order in another shape."""


@dataclass(frozen=True, slots=True)
class Transpose:
    """The same values, output axis i is input axis ``order[i]``."""

    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """Nothing, as dropout in evaluation.

    Args:
        rate: the share of the values that training sets to zero here.
    """

    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Other:
    """Anything else; ``kind`` says what, for a sentence."""

    kind: str


Operation = Linear | Normalize | Activation | Add | Concat | Pool | Pad | Reshape | Transpose | Identity | Other


@dataclass(eq=False, slots=True)
class Value:
    """An array that flows through the network.

    Args:
        shape: with the sizes of the example.
        producer: the node that writes it; ``None`` for an input of the network.
        consumers: the nodes that read it, one entry for each use.
        pinned: why it may not change: it is an output, a hook sees it; empty where it may.
        overwritten: whether something is written over it, in place, after it was read.
    """

    shape: tuple[int, ...]
    producer: "Node | None" = field(default=None, repr=False)
    consumers: "list[Node]" = field(default_factory=list, repr=False)
    pinned: str = ""
    overwritten: bool = False

    def pin(self, reason: str) -> None:
        """Forbid a change of the value; the first reason stands."""
        self.pinned = self.pinned or reason


@dataclass(eq=False, slots=True)
class Node:
    """One operation: what it does, what it reads and writes, the layer that it belongs to, whether it writes in place."""

    operation: Operation
    inputs: list[Value]
    outputs: list[Value]
    name: str
    in_place: bool = False


class Graph:
    """The picture of a network on one example.

    Args:
        uncalled: batch normalization layers that the model holds and did not call.
        borders: whether the wing can put a value of its own around each channel (`Border`).

    Attributes:
        training: whether the model is in training mode.

    Example:
        >>> graph = Graph()
        >>> x = Value((2, 3, 8, 8))
        >>> (y,) = graph.add(Activation(homogeneous=True), [x], [(2, 3, 8, 8)], "relu")
        >>> y.pin("it is an output of the model")
        >>> [node.name for node in x.consumers], y.producer.name
        (['relu'], 'relu')
    """

    def __init__(self, uncalled: tuple[Norm, ...] = (), *, borders: bool = False) -> None:
        self.nodes: list[Node] = []
        self.uncalled = uncalled
        self.borders = borders
        self.training = False

    def add(
        self, operation: Operation, inputs: list[Value], output_shapes: list[tuple[int, ...]], name: str
    ) -> list[Value]:
        """Append a node that runs after all others, and return the values that it writes."""
        node = Node(operation, inputs, [], name)
        node.outputs = [Value(shape, node) for shape in output_shapes]
        for value in inputs:
            value.consumers.append(node)
        self.nodes.append(node)
        return node.outputs

    def norms(self) -> dict[Norm, list[Node]]:
        """Return the batch normalization layers in the order of their first calls, with their calls."""
        return _grouped((node.operation.norm, node) for node in self.nodes if isinstance(node.operation, Normalize))

    def weights(self) -> dict[Weights, list[Node]]:
        """Return the linear layers in the order of their first calls, with their calls."""
        return _grouped((node.operation.weights, node) for node in self.nodes if isinstance(node.operation, Linear))


def _grouped(pairs: Iterator[tuple[Any, Node]]) -> dict[Any, list[Node]]:
    groups: dict[Any, list[Node]] = {}
    for key, node in pairs:
        groups.setdefault(key, []).append(node)
    return groups
