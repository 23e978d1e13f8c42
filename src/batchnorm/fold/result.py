"""What `fold` returns."""

from dataclasses import dataclass
from typing import Any

from batchnorm.fold.proof import Error
from batchnorm.tables import table

__all__ = ["FoldResult", "Folded", "Kept"]


@dataclass(frozen=True, slots=True)
class Folded:
    """A normalization layer that is gone.

    Args:
        layer: dotted name of the layer.
        into: names of the layers that absorbed it.
        how: the direction, and what else was done.
    """

    layer: str
    into: tuple[str, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A normalization layer that could not be absorbed.

    Args:
        layer: dotted name of the layer.
        reason: why.
        became: ``"scale and shift"`` (two vectors, no statistics) or ``"unchanged"``.
    """

    layer: str
    reason: str
    became: str


@dataclass(frozen=True, slots=True)
class FoldResult:
    """A model without its batch normalization, and the proof that it computes the same; prints as a table.

    Args:
        model: the folded model, of the type that was given.
        folded: layers that are gone.
        kept: layers that are left, each with its reason.
        error: the measured differences and their bounds.
    """

    model: Any
    folded: tuple[Folded, ...]
    kept: tuple[Kept, ...]
    error: Error

    def __str__(self) -> str:
        rows = [(f.layer, "folded", f"{f.how} into {', '.join(f.into)}") for f in self.folded]
        rows += [(k.layer, k.became, k.reason) for k in self.kept]
        plain = sum(k.became != "unchanged" for k in self.kept)
        total = (
            f"{len(rows)} normalization layers: {len(self.folded)} folded, {plain} became a scale and shift, "
            f"{len(self.kept) - plain} unchanged"
        )
        return "\n".join([table(("Layer", "Became", "How, or why not"), rows), total, str(self.error)])
