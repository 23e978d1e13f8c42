"""Which layer of one network is which of another, read off their pictures."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from batchnorm.errors import OptionError
from batchnorm.graph import Graph, Layout, Linear, Node, Norm, Normalize, Reshape, Transpose, Value, Weights

__all__ = ["Call", "Flat", "calls", "described", "paired", "sizes"]


@dataclass(frozen=True, slots=True)
class Flat:
    """How features came about that were places and channels before.

    Args:
        sizes: of the axes that became one.
        channel: which of them are the channels.
    """

    sizes: tuple[int, ...]
    channel: int


@dataclass(eq=False, slots=True)
class Call:
    """One call of a layer with numbers.

    Args:
        node: in the picture.
        layer: that is called.
        kind: what it is, in numbers that are the same in every framework.
        before: the calls whose outputs it sees, through whatever has no numbers.
        flat: how the features that it reads came about; ``None`` where they are channels.
    """

    node: Node
    layer: Weights | Norm
    kind: tuple[Any, ...]
    before: frozenset[int]
    flat: Flat | None


def sizes(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return the sizes of a weight as outputs, inputs, places of the kernel.

    Example:
        >>> sizes((3, 3, 8, 16), Layout(out_axis=-1, in_axis=-2))
        (16, 8, 3, 3)
    """
    shape = shape if layout.shape is None else layout.shape
    out, into = layout.out_axis % len(shape), layout.in_axis % len(shape)
    return shape[out], shape[into], *(n for axis, n in enumerate(shape) if axis not in (out, into))


def calls(graph: Graph, channel_axis: int | None) -> list[Call]:
    """Return the calls of dense layers, convolutions and batch normalization, in their order.

    Args:
        graph: the picture of a network.
        channel_axis: of the channels in its inputs, where that matters.
    """
    found: list[Call] = []
    # of each value: the calls that it comes from, the axis of its channels, and how its features came about
    seen: dict[int, tuple[frozenset[int], int | None, Flat | None]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            seen.setdefault(id(value), (frozenset(), channel_axis if len(value.shape) > 2 else None, None))
        before = frozenset[int]().union(*(seen[id(value)][0] for value in node.inputs))
        axis, flat = (seen[id(node.inputs[0])][1:]) if node.inputs else (None, None)
        operation = node.operation
        if isinstance(operation, Linear | Normalize):
            layer = operation.weights if isinstance(operation, Linear) else operation.norm
            found.append(Call(node, layer, _kind(layer, node), before, flat))
            before = frozenset([len(found) - 1])
        for value in node.outputs:
            seen[id(value)] = before, *_followed(node, value, axis, flat)
    return found


def _kind(layer: Weights | Norm, node: Node) -> tuple[Any, ...]:
    if isinstance(layer, Norm):
        operation: Any = node.operation
        return "batch normalization", node.inputs[0].shape[operation.axis]
    layout = layer.layout
    grouped = layout.grouped if layout.groups > 1 else ""
    shape = sizes(tuple(layer.read()[0].shape), layout)
    return "convolution" if len(shape) > 2 else "dense", shape, layout.groups, grouped


def _followed(node: Node, value: Value, axis: int | None, flat: Flat | None) -> tuple[int | None, Flat | None]:
    """Return the axis of the channels in what a node writes, and how its features came about."""
    operation, given = node.operation, node.inputs[0] if node.inputs else None
    if isinstance(operation, Linear):
        return operation.out_axis, None
    if given is None:
        return None, None
    if isinstance(operation, Normalize):
        return operation.axis, flat
    if isinstance(operation, Transpose):
        return None if axis is None else operation.order.index(axis), None
    if value.shape == given.shape:
        return axis, flat
    if isinstance(operation, Reshape) and len(given.shape) > 2 and len(value.shape) == 2:
        whole = value.shape[0] == given.shape[0]
        return 1, Flat(given.shape[1:], axis - 1) if whole and axis is not None and axis > 0 else None
    return axis if len(value.shape) == len(given.shape) else None, None


def paired(source: list[Call], target: list[Call]) -> list[tuple[Call, Call]]:
    """Return which call of one network is which of the other.

    Two calls belong together where what comes before them and what follows is the same; those that are alike in this, too, in
    the order of their calls.

    Raises:
        OptionError: the networks differ; names the first two layers that do not fit.
    """
    known: dict[Any, int] = {}
    labels = [_labelled(side, known) for side in (source, target)]
    if Counter(labels[0]) != Counter(labels[1]):
        _check_in_order(source, target)
        return list(zip(source, target, strict=True))
    queues: dict[int, list[Call]] = defaultdict(list)
    for call, label in zip(target, labels[1], strict=True):
        queues[label].append(call)
    return [(call, queues[label].pop(0)) for call, label in zip(source, labels[0], strict=True)]


def _labelled(side: list[Call], known: dict[Any, int]) -> list[int]:
    """Return a number for each call that tells what it is, what it comes from and what follows."""

    def number(*words: Any) -> int:
        return known.setdefault(words, len(known))

    after: list[list[int]] = [[] for _ in side]
    for place, call in enumerate(side):
        for other in call.before:
            after[other].append(place)
    forwards: list[int] = []
    for call in side:
        forwards.append(number("forwards", call.kind, *_all(forwards, call.before)))
    backwards = [0] * len(side)
    for place in reversed(range(len(side))):
        backwards[place] = number("backwards", side[place].kind, *_all(backwards, after[place]))
    return [number(*pair) for pair in zip(forwards, backwards, strict=True)]


def _all(numbers: list[int], places: Iterable[int]) -> list[int]:
    return sorted(numbers[place] for place in places)


def _check_in_order(source: list[Call], target: list[Call]) -> None:
    for a, b in zip_longest(source, target):
        if a is None or b is None or a.kind != b.kind:
            raise OptionError(
                f"both models must have the same layers in the same order, the first that do not fit are {described(a)} of the "
                f"source and {described(b)} of the target"
            )


def described(call: Call | None) -> str:
    """Return a layer in words, with its sizes."""
    if call is None:
        return "no layer"
    kind, first, *rest = call.kind
    if kind == "batch normalization":
        return f"{call.layer.name!r} ({kind} of {first} channels)"
    out, into, *places = first
    kernel = f", kernel {'×'.join(map(str, places))}" if places else ""
    groups = f", {rest[0]} groups" if rest[0] > 1 else ""
    inputs = into if call.kind[3] == "in" else into * rest[0]
    outputs = out * rest[0] if call.kind[3] == "in" else out
    return f"{call.layer.name!r} ({kind} {inputs} → {outputs}{kernel}{groups})"
