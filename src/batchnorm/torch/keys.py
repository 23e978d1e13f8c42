"""Where in a torch model a layer of the picture stands."""

from typing import Any, NamedTuple

__all__ = ["Site"]


class Site(NamedTuple):
    """The place of a layer.

    Args:
        module: dotted name of the module.
        attribute: name of the weight in it; empty for a normalization.
        bias: dotted name of the bias; empty without one.
        node: the ``torch.fx`` node that calls it, if one does.
    """

    module: str
    attribute: str
    bias: str
    node: Any

    def names(self) -> tuple[str, ...]:
        """Return the dotted names of weight and bias."""
        weight = f"{self.module}.{self.attribute}".strip(".")
        return (weight, self.bias) if self.bias else (weight,)
