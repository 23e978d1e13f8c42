"""Where in a torch model a layer of the picture stands."""

from dataclasses import dataclass, field

__all__ = ["Site"]


@dataclass(slots=True)
class Site:
    """The place of a layer.

    Args:
        module: dotted name of the module.
        attribute: name of the weight in it; empty for a normalization.
        bias: dotted name of the bias; empty without one.
        nodes: the calls in ``torch.fx`` graphs, ``(dotted name of the graph's module, name of the node)``; empty for a module
            that is called as such.
        arguments: how many arguments the module is called with.
    """

    module: str
    attribute: str = ""
    bias: str = ""
    nodes: list[tuple[str, str]] = field(default_factory=list)
    arguments: int = 1

    def names(self) -> tuple[str, ...]:
        """Return the dotted names of weight and bias."""
        weight = f"{self.module}.{self.attribute}".strip(".")
        return (weight, self.bias) if self.bias else (weight,)
