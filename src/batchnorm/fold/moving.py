"""How an Affine moves along the edges of a network, and where it stops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from batchnorm.affine import Affine
from batchnorm.fold import motion
from batchnorm.graph import (
    Activation,
    Add,
    Concat,
    Identity,
    Linear,
    Node,
    Normalize,
    Pad,
    Pool,
    Reshape,
    Transpose,
    Value,
)

__all__ = ["Absorption", "BlockedError", "Mover"]


class BlockedError(Exception):
    """An Affine can't pass; the text says why."""


@dataclass(slots=True)
class Absorption:
    """A node takes in an Affine, before what it does or after it."""

    node: Node
    affine: Affine
    after: bool


Take = Callable[[Node, Affine, Value, bool], Absorption]


class Mover:
    """Moves Affines through whatever they commute with, until linear nodes or norms take them in.

    Args:
        take: lets a linear node or a norm take in an Affine of its output (last argument true) or of its input, or raises
            `BlockedError`.
        is_gone: whether nothing is left of a node.
        drops: whether dropout drops, as in training.
    """

    def __init__(self, take: Take, is_gone: Callable[[Node], bool], *, drops: bool = False) -> None:
        self.take = take
        self.is_gone = is_gone
        self.drops = drops

    def push_back(self, value: Value, affine: Affine, reader: Node) -> Iterator[Absorption]:
        """Make ``affine(value)`` what flows along the edges from ``value`` on."""
        if value.pinned:
            raise BlockedError(f"{_what(value)} before it may not change: {value.pinned}")
        if others := [node.name for node in value.consumers if node is not reader]:
            raise BlockedError(f"{_what(value)} before it is used by {_names(others)} too")
        if len(value.consumers) > 1:
            raise BlockedError(f"{_what(value)} before it is used twice by {reader.name}")
        node = value.producer
        if node is None:
            raise BlockedError("nothing of the model comes before it")
        if isinstance(node.operation, Linear | Normalize) and not self.is_gone(node):
            yield self.take(node, affine, value, True)
        else:
            for source, moved in self._sources(node, affine, value):
                yield from self.push_back(source, moved, node)

    def _sources(self, node: Node, affine: Affine, value: Value) -> Iterator[tuple[Value, Affine]]:
        """Yield the inputs of a node that an Affine of its output commutes with, and what it becomes there."""
        operation = node.operation
        if isinstance(operation, Concat):
            ends = accumulate((source.shape[operation.axis] for source in node.inputs), initial=0)
            for source, (start, stop) in zip(node.inputs, pairwise(ends), strict=True):
                yield source, motion.part(affine, operation.axis, start, stop)
        elif isinstance(operation, Add):
            for i, source in enumerate(node.inputs):
                yield source, affine if i == 0 else Affine(affine.scale, np.zeros_like(affine.shift))
        elif isinstance(operation, Reshape):
            yield node.inputs[0], _reshape(affine, value.shape, node.inputs[0].shape, node)
        elif isinstance(operation, Transpose):
            yield node.inputs[0], motion.transposed(affine, tuple(np.argsort(operation.order)))
        else:
            yield node.inputs[0], self._commuted(node, affine)

    def push_forward(self, value: Value, affine: Affine) -> Iterator[Absorption]:
        """Make everything that reads ``value`` do so through ``affine``."""
        if value.pinned:
            raise BlockedError(f"{_what(value)} after it may not change: {value.pinned}")
        if not value.consumers:
            raise BlockedError(f"nothing reads {_what(value)} after it")
        for node in dict.fromkeys(value.consumers):
            if isinstance(node.operation, Linear | Normalize) and not self.is_gone(node):
                yield self.take(node, affine, value, False)
            else:
                yield from self.push_forward(node.outputs[0], self._through(node, affine, value))

    def _through(self, node: Node, affine: Affine, value: Value) -> Affine:
        """Return what an Affine of an input becomes at the output of a node."""
        operation = node.operation
        if node.in_place:
            raise BlockedError(f"{node.name} after it writes in place, into what would then be the input of the norm")
        if isinstance(operation, Concat):
            places = [i for i, source in enumerate(node.inputs) if source is value]
            if len(places) > 1:
                raise BlockedError(f"{node.name} after it reads it twice")
            sizes = [source.shape[operation.axis] for source in node.inputs]
            return motion.placed(affine, operation.axis, sizes, places[0])
        if isinstance(operation, Add):
            if (affine.scale != 1).any():
                raise BlockedError(f"{node.name} after it adds something that is not scaled")
            times = sum(source is value for source in node.inputs)
            return Affine(affine.scale, times * affine.shift)
        if isinstance(operation, Reshape):
            return _reshape(affine, value.shape, node.outputs[0].shape, node)
        if isinstance(operation, Transpose):
            return motion.transposed(affine, operation.order)
        return self._commuted(node, affine)

    def _commuted(self, node: Node, affine: Affine) -> Affine:
        """Return the Affine on the other side of an operation that works on each channel alone."""
        operation = node.operation
        if self.drops and isinstance(operation, Identity) and operation.rate:
            raise BlockedError(f"{node.name} drops values, and what was added to them")
        if isinstance(operation, Identity) or self.is_gone(node):
            return affine
        if isinstance(operation, Pool | Pad) and any(affine.scale.shape[axis] > 1 for axis in operation.axes):
            raise BlockedError(f"{node.name} works along the axis that is normalized")
        reason = self._why_it_does_not_commute(node, affine)
        if reason:
            raise BlockedError(reason)
        return affine

    def _why_it_does_not_commute(self, node: Node, affine: Affine) -> str:
        match node.operation:
            case Activation(homogeneous=True):
                passes = motion.shift_free(affine) and (affine.scale > 0).all()
                return "" if passes else f"{node.name} passes nothing but a positive scale"
            case Pool(kind="max"):
                return "" if (affine.scale > 0).all() else f"{node.name} passes positive scales only"
            case Pool(counted_padding=True):
                passes = motion.shift_free(affine)
                return "" if passes else f"{node.name} averages zeros from outside, which would not be shifted"
            case Pool():
                return ""
            case Pad(value=value):
                passes = value is None or (value == 0 and motion.shift_free(affine))
                return "" if passes else f"{node.name} pads with a constant, which would not be shifted"
        return f"{node.name} ({_kind(node)}) is neither linear nor commutes with a scale and shift"


def _reshape(affine: Affine, before: tuple[int, ...], after: tuple[int, ...], node: Node) -> Affine:
    moved = motion.reshaped(affine, before, after)
    if moved is None:
        raise BlockedError(f"{node.name} reshapes an empty array")
    return moved


def _kind(node: Node) -> str:
    return getattr(node.operation, "kind", type(node.operation).__name__.lower())


def _what(value: Value) -> str:
    return "the input" if value.producer is None else f"the output of {value.producer.name}"


def _names(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (", ..." if len(unique) > 3 else "")
