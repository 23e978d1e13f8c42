"""What `transfer` returns."""

from dataclasses import dataclass
from typing import Any

from batchnorm.tables import table
from batchnorm.translation.agreement import Agreement

__all__ = ["Carried", "Transfer"]


@dataclass(frozen=True, slots=True)
class Carried:
    """The numbers of one layer.

    Args:
        source: dotted name of the layer that they are from.
        target: dotted name of the layer that has them now.
        what: what was carried.
        note: what could not be, and what was added; empty where everything is the same.
        eps: of a batch normalization layer, that of the source and the one that the target had; ``None`` for other layers.
    """

    source: str
    target: str
    what: str
    note: str = ""
    eps: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """A model with the numbers of another one, and the proof that both compute the same; prints as a table.

    Args:
        model: a copy of the target.
        carried: the layers, in the order of their calls.
        error: how far the outputs of both are apart.
        example: what ``model`` was called with.
    """

    model: Any
    carried: tuple[Carried, ...]
    error: Agreement
    example: Any

    def __str__(self) -> str:
        rows = [(one.source, one.target, one.what, one.note) for one in self.carried]
        return "\n".join([table(("Source", "Target", "Carried", "Note"), rows), str(self.error)])
