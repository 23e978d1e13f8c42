"""What a wing tells about its models, and what it does to them: the one protocol that every verb is written against."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import Array
from batchnorm.errors import DataError
from batchnorm.graph import Graph, Norm, Weights
from batchnorm.moments import Moments
from batchnorm.states import BatchSizes, Mend, NormState, Optimization, Rate, Rehearsal

__all__ = [
    "PIECE",
    "Border",
    "Changes",
    "Layer",
    "Measure",
    "Measured",
    "Model",
    "OneByOne",
    "Pair",
    "Statistics",
    "note",
    "piece",
    "random_arrays",
]

PIECE, SAMPLES, CHANNELS = 2**18, 64, 16
"""Numbers and samples of a `piece` at most, and its channels at least, where the layer has them and there is room."""

Pair = tuple[np.ndarray, np.ndarray]
"""A mean and a variance in float64, as a layer stores them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a network, as a summary shows it.

    Args:
        name: dotted name in the model.
        kind: class of the layer.
        output_shape: of its last call, ``None`` in place of the batch; ``None`` where it was not called.
        trainable: numbers that an optimizer moves (weights, biases, γ, β).
        frozen: numbers that nothing moves: parameters without gradient, constants.
        statistics: numbers that a forward pass moves (running mean and variance).
        norm: what a batch normalization layer holds, by the field's names, as ``{"γ": 784, "mean": 784}``; empty for others.
        moves: whether forward passes of training move its statistics.
    """

    name: str
    kind: str
    output_shape: tuple[int | None, ...] | None
    trainable: int
    frozen: int
    statistics: int
    norm: Mapping[str, int] = field(default_factory=dict)
    moves: bool = True

    @property
    def parameters(self) -> int:
        """All numbers of the layer, as ``model.summary()`` of Keras counts them."""
        return self.trainable + self.frozen + self.statistics


@dataclass(frozen=True, slots=True)
class Border:
    """Put ``value``, one for each channel on ``axis``, around the data: ``(axis, before, after)`` for each padded axis."""

    value: np.ndarray
    axis: int
    padding: tuple[tuple[int, int, int], ...]


class OneByOne(Mapping[Weights, tuple[Array, Array | None]]):
    """New weights of layers, computed when they are asked for: those of a whole network at once would fill the memory.

    Args:
        layers: which layers.
        compute: returns the new weight and bias of one.
    """

    def __init__(self, layers: Iterable[Weights], compute: Callable[[Weights], tuple[Array, Array | None]]) -> None:
        self.layers = dict.fromkeys(layers)
        self.compute = compute

    def __getitem__(self, layer: Weights) -> tuple[Array, Array | None]:
        return self.compute(layer)

    def __iter__(self) -> Iterator[Weights]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(slots=True)
class Changes:
    """What a wing shall change in a model, all of it or nothing.

    Args:
        weights: new weight and bias of linear layers, in the dtype of the old weight; a bias of ``None`` stays missing.
        norms: what stands in the place of a batch normalization layer: ``None`` for nothing at all, an `Affine` in float64, or
            a `Border`.
        unpadded: linear layers that no longer pad.
        biasless: linear layers that lose their bias.
        groups: new numbers of groups of convolutions that lose channels.
        means: new running means of batch normalization layers.
        variances: new running variances of batch normalization layers (ONNX).
        gammas: new scales of batch normalization layers.
        channels: the channels that batch normalization layers keep, as indices.
        numbers: batch normalization layers that take γ, β, mean, variance and eps from another, and decay and the convention of
            the variance where they can; they go on in their own place.
    """

    weights: Mapping[Weights, tuple[Array, Array | None]] = field(default_factory=dict)
    norms: dict[Norm, Affine | Border | None] = field(default_factory=dict)
    unpadded: set[Weights] = field(default_factory=set)
    biasless: set[Weights] = field(default_factory=set)
    groups: dict[Weights, int] = field(default_factory=dict)
    means: dict[Norm, np.ndarray] = field(default_factory=dict)
    variances: dict[Norm, np.ndarray] = field(default_factory=dict)
    gammas: dict[Norm, np.ndarray] = field(default_factory=dict)
    channels: dict[Norm, np.ndarray] = field(default_factory=dict)
    numbers: dict[Norm, Norm] = field(default_factory=dict)


def random_arrays(shapes: list[tuple[str, tuple[int, ...]]]) -> Any | None:
    """Return float32 noise of these shapes: a dict where all have names, a tuple otherwise, ``None`` for none.

    Example:
        >>> random_arrays([("x", (2, 3))])["x"].shape
        (2, 3)
    """
    rng = np.random.default_rng(0)
    arrays = [(name, rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes]
    if not arrays:
        return None
    return dict(arrays) if all(name for name, _ in arrays) else tuple(array for _, array in arrays)


@dataclass(eq=False, slots=True)
class Statistics:
    """The running statistics of one batch normalization layer, as they are stored; arrays in float64, ``(C,)``.

    Args:
        name: dotted name of the layer.
        mean: the running mean; ``None`` where the layer keeps none.
        variance: the running variance; ``None`` where the layer keeps none.
        eps: added to the variance under the root.
        unbiased: whether the variance is ``m2 / (count - 1)``, as in torch, or ``m2 / count``, as in Keras.
        fixed: why they may not move; empty where they may.
        key: what the wing knows them by.
    """

    name: str
    mean: np.ndarray | None
    variance: np.ndarray | None
    eps: float
    unbiased: bool
    fixed: str = ""
    key: Any = None

    @property
    def pair(self) -> Pair:
        """The mean and the variance of a layer that keeps them."""
        assert self.mean is not None  # noqa: S101
        assert self.variance is not None  # noqa: S101
        return self.mean, self.variance


@dataclass(frozen=True, slots=True)
class Measured:
    """What one batch has shown.

    Args:
        samples: how many there were.
        calls: of the inputs of each layer that was called, in the order of its calls; NumPy arrays in float64.
        inputs: a `piece` of what has reached layers in their first call, ``(n, C', *spatial)``; of the first batch and where
            layers are watched only. A layer that was called with a mask or weights has none.
        linear: dotted names of the linear layers whose outputs have reached layers as they were; where layers are watched.
    """

    samples: int
    calls: dict[Statistics, list[Moments]]
    inputs: dict[Statistics, np.ndarray] = field(default_factory=dict)
    linear: dict[Statistics, str] = field(default_factory=dict)

    @property
    def moments(self) -> dict[Statistics, Moments]:
        """Of the inputs of each layer, all its calls together."""
        return {one: Moments.empty().merge(*calls) for one, calls in self.calls.items()}


def note(found: dict[Statistics, list[Moments]], one: Statistics, moments: Moments) -> None:
    """Add what has reached a layer to what its calls have ``found`` in the same batch.

    Raises:
        DataError: it is not finite.
    """
    if not np.isfinite(moments.mean + moments.m2).all():
        raise DataError(
            f"what reaches layer {one.name!r} must be finite, it holds inf or NaN: look for them in the data, or in the "
            "weights of the layers before"
        )
    found.setdefault(one, []).append(moments)


def piece(shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the piece of an array ``(N, C, *spatial)`` that is kept to be looked at: at most 64 samples and 2¹⁸ numbers.

    Channels are taken at equal distances, every ⌈C / C'⌉-th; places too, but only where those of a single channel are too many.

    Example:
        >>> piece((32, 256, 56, 56))
        (slice(None, 5, None), slice(None, None, 16), slice(None, None, 1), slice(None, None, 1))
    """
    n, channels, *places = (max(1, size) for size in shape)
    stride = 1
    while (area := prod(-(-size // stride) for size in places)) > PIECE:
        stride += 1
    samples = min(n, SAMPLES, max(1, PIECE // (min(channels, CHANNELS) * area)))
    kept = min(channels, PIECE // (samples * area))
    return slice(samples), slice(None, None, -(-channels // kept)), *(slice(None, None, stride) for _ in places)


Measure = Callable[[Any, Mapping[Statistics, Pair] | None], Measured]
"""Runs a batch in evaluation; layers normalize by the given statistics, or where none are given by those of the batch."""


class Model(Protocol):
    """What a wing tells about a model of its framework, and does to it."""

    def layers(self, example: Any | None) -> list[Layer]:
        """List the layers in the order of their calls on ``example``, or of definition without one."""
        ...

    def graph(self, example: Any | None) -> Graph:
        """Return the picture of the model in evaluation on ``example``, without touching it."""
        ...

    def changed(self, changes: Changes) -> "Model":
        """Return a copy with all changes made; the model itself stays as it is."""
        ...

    def change(self, changes: Changes) -> None:
        """Make all changes in the model itself."""
        ...

    def example(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Any | None:
        """Return random inputs of these names (empty: by position) and shapes; ``None`` for none."""
        ...

    def inputs(self, example: Any | None, seed: int | None) -> Any:
        """Return the inputs of ``example``, or random ones of the same shapes."""
        ...

    def outputs(self, inputs: Any) -> list[np.ndarray]:
        """Run in evaluation and return all output arrays in a fixed order."""
        ...

    def cast(self, precision: str) -> "Model | None":
        """Return a copy that computes in ``precision`` throughout; ``None`` where the model can't."""
        ...

    @property
    def precision(self) -> str:
        """The floating dtype of the weights, as ``"float32"``."""
        ...

    @property
    def model(self) -> Any:
        """The model, of its framework's type."""
        ...

    def statistics(self) -> list[Statistics]:
        """List the running statistics of all batch normalization layers, each once."""
        ...

    def batches(self, data: Any) -> Any:
        """Return what yields batches, where ``data`` is a data set of the framework that yields something else."""
        ...

    def measuring(
        self, statistics: list[Statistics], forward: Any | None, device: Any, *, watch: bool = False
    ) -> AbstractContextManager[Measure]:
        """Run the model in evaluation and measure the inputs of layers; on exit everything is as it was.

        Args:
            statistics: of the layers to measure; the others stay as they are.
            forward: runs the model on a batch, ``forward(model, batch)``; ``None`` for the framework's usual call.
            device: where batches are moved to; ``None`` for where the model is.
            watch: measure layers too whose statistics are fixed, or that keep none; they normalize as they would anyway.
                And keep a piece of what reaches each layer in the first batch.
        """
        ...

    def write(self, statistics: Mapping[Statistics, Pair], batches: int) -> None:
        """Store new statistics in the model itself, all or none.

        Args:
            statistics: the new mean and variance of layers.
            batches: how many they were measured on.
        """
        ...

    # -- how its normalization stands, for `check` -------------------------------------------------------------------

    @property
    def training(self) -> bool | None:
        """Whether the model is in training mode; ``None`` for one that has no modes, and ``False`` for one that only infers."""
        ...

    @property
    def learns(self) -> bool:
        """Whether any parameter of the model gets a gradient."""
        ...

    def states(self) -> list[NormState]:
        """List the batch normalization layers in the order of definition, each once."""
        ...

    def example_of(self, batch: Any) -> Any:
        """Return what a batch of a data set calls the model with, as an example."""
        ...

    def rehearse(self, example: Any) -> Rehearsal:
        """Make one step of training on an example, in a copy, and tell what was seen.

        Raises:
            OptionError: the model can't be trained, or fails on the example in training.
        """
        ...

    def batch_sizes(self, loader: Any) -> BatchSizes:
        """Return the sizes of the batches of a loader, without reading a sample where that is possible.

        Raises:
            OptionError: a loader that does not tell.
        """
        ...

    def optimization(self, optimizer: Any) -> Optimization:
        """Return what an optimizer does to the batch normalization of the model.

        Raises:
            OptionError: an optimizer of another framework, or one that does not hold the model's parameters.
        """
        ...

    def rates(self, optimizer: Any, layers: Sequence[str]) -> list[Rate]:
        """Return how fast an optimizer turns the weights of these linear layers, or of all where none is named.

        Raises:
            OptionError: an optimizer of another framework, or one that does not hold the model's parameters.
        """
        ...

    def mend(self, mends: Mapping[str, Mend]) -> None:
        """Set layers of the model right, in place, all or none.

        Args:
            mends: by the name of the layer.

        Raises:
            OptionError: something that can't be mended in place.
        """
        ...

    def spare(self, optimizer: Any) -> int:
        """Take the weight decay off γ and β in an optimizer, in place, and return how many parameters it was.

        Raises:
            OptionError: an optimizer that can't be changed.
        """
        ...
