"""A framework-neutral picture of a network, and the protocol by which a wing shows its models."""

from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Layer", "Model"]


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


class Model(Protocol):
    """What a wing tells about a model of its framework."""

    def layers(self, example: Any | None) -> list[Layer]:
        """List the layers in the order of their calls on ``example``, or of definition without one."""
        ...
