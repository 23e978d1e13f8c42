"""What a wing tells about its models, and what it does to them: the one protocol that every verb is written against."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from batchnorm.affine import Affine
from batchnorm.arrays import Array
from batchnorm.graph import Graph, Norm, Weights

__all__ = ["Border", "Changes", "Layer", "Model", "OneByOne", "random_arrays"]


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
    """

    name: str
    kind: str
    output_shape: tuple[int | None, ...] | None
    trainable: int
    frozen: int
    statistics: int

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
        gammas: new scales of batch normalization layers.
        channels: the channels that batch normalization layers keep, as indices.
    """

    weights: Mapping[Weights, tuple[Array, Array | None]] = field(default_factory=dict)
    norms: dict[Norm, Affine | Border | None] = field(default_factory=dict)
    unpadded: set[Weights] = field(default_factory=set)
    biasless: set[Weights] = field(default_factory=set)
    groups: dict[Weights, int] = field(default_factory=dict)
    means: dict[Norm, np.ndarray] = field(default_factory=dict)
    gammas: dict[Norm, np.ndarray] = field(default_factory=dict)
    channels: dict[Norm, np.ndarray] = field(default_factory=dict)


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
