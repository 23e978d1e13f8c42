"""One node of an ONNX graph, as the vocabulary asks about it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from batchnorm.onnx.scopes import Constant, Index, Scope
from batchnorm.onnx.shapes import Shapes

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """A node with everything around it that tells what it does.

    Args:
        node: a ``NodeProto``.
        scope: the graph it is in.
        index: the whole model.
        shapes: the sizes of all values.
        opset: the version of the standard operators.
    """

    node: Any
    scope: Scope
    index: Index
    shapes: Shapes
    opset: int

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """All attributes as Python values; graphs as they are."""
        return {a.name: onnx.helper.get_attribute_value(a) for a in self.node.attribute if not a.ref_attr_name}

    @cached_property
    def name(self) -> str:
        """What a person knows the node by."""
        return self.index.label(self.scope, self.node)

    def text(self, attribute: str, default: str) -> str:
        """Return an attribute that is a word."""
        value = self.attributes.get(attribute, default)
        return str(value.decode(errors="replace")) if isinstance(value, bytes) else str(value)

    def given(self, place: int) -> bool:
        """Whether an optional input is there."""
        return len(self.node.input) > place and bool(self.node.input[place])

    def outputs(self) -> list[str]:
        """Return the outputs that are not left out."""
        return [name for name in self.node.output if name]

    def shape(self, place: int = 0) -> tuple[int, ...] | None:
        """Return the sizes of an input, ``None`` where they are not known."""
        return self.shapes.of(self.scope, self.node.input[place]) if self.given(place) else None

    def result(self) -> tuple[int, ...] | None:
        """Return the sizes of the first output, ``None`` where they are not known."""
        return self.shapes.of(self.scope, self.node.output[0])

    def constant(self, place: int) -> Constant | None:
        """Return an input that is the same in every run, ``None`` for any other."""
        return self.index.constant(self.scope, self.node.input[place]) if self.given(place) else None

    def numbers(self, place: int, attribute: str = "") -> np.ndarray | None:
        """Return what an input (or in older versions an attribute) always is; ``None`` where it may vary or is left out."""
        if attribute and attribute in self.attributes:
            return np.asarray(self.attributes[attribute])
        constant = self.constant(place)
        return None if constant is None or constant.overridable else constant.read()

    def varying(self) -> list[str]:
        """Return the inputs that are not constants, one entry for each use."""
        return [name for place, name in enumerate(self.node.input) if name and self.constant(place) is None]

    def source(self, place: int) -> str:
        """Say where an input comes from, for a sentence on why it may not change."""
        name = self.node.input[place]
        constant = self.constant(place)
        if constant is not None:
            return f"{name} is an input of the model too, which a caller may override" if constant.overridable else ""
        home = self.scope.home(name)
        producer = None if home is None else home.producers.get(name)
        return (
            f"{name} is computed by {producer.op_type}" if producer is not None else f"{name} is an input of the model"
        )
