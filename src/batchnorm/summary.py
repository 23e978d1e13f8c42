"""The table of a network: what each layer puts out, what of it is trained, and what is only measured."""

from dataclasses import dataclass
from typing import Any

from batchnorm.models import adapt
from batchnorm.protocol import Layer
from batchnorm.tables import table

__all__ = ["Summary", "summary"]


@dataclass(frozen=True, slots=True)
class Summary:
    """The layers of a network; prints as a table."""

    layers: tuple[Layer, ...]

    @property
    def trainable(self) -> int:
        """Numbers that an optimizer moves."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def statistics(self) -> int:
        """Numbers that a forward pass moves: running means and variances."""
        return sum(layer.statistics for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All numbers: trainable, frozen, statistics."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        head = ("Layer (type)", "Output shape", "Params", "Trainable", "Statistics")
        missing = "not called" if any(layer.output_shape for layer in self.layers) else "unknown"
        rows = [
            (
                f"{layer.name} ({layer.kind})",
                missing if layer.output_shape is None else _shape(layer.output_shape),
                f"{layer.parameters:,}",
                f"{layer.trainable:,}",
                f"{layer.statistics:,}",
            )
            for layer in self.layers
        ]
        total = (
            f"{self.parameters:,} parameters: {self.trainable:,} trainable, {self.statistics:,} running statistics, "
            f"{self.parameters - self.trainable - self.statistics:,} frozen"
        )
        return "\n".join([table(head, rows, numbers=3), total, *filter(None, map(_words, self.layers))])


def summary(model: Any, example: Any | None = None) -> Summary:
    """Tell for each layer its output shape and parameters, and which of them are trained.

    Of the four numbers that batch normalization keeps for a feature, two are trainable (γ, β) and two are not (running mean
    and variance): they are statistics, moved by forward passes and not by the optimizer.

    Args:
        model: of any framework, or the file of one; it is run once on ``example`` in evaluation and left as it was. Of a Keras
            model each batch normalization layer is told in words, too.
        example: an input, or a tuple of inputs; without one the output shapes of a torch module are not known.

    Returns:
        `Summary`: iterate over ``.layers``, or print it.

    Raises:
        OptionError: ``model`` is of no known framework, or fails on ``example``.

    Example:
        >>> import torch
        >>> from batchnorm.torch import BatchNorm1d
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), BatchNorm1d(784), torch.nn.Linear(784, 300))
        >>> print(summary(net, torch.zeros(1, 28, 28)))
        Layer (type)     Output shape   Params  Trainable  Statistics
        ─────────────────────────────────────────────────────────────
        0 (Flatten)      (None, 784)         0          0           0
        1 (BatchNorm1d)  (None, 784)     3,136      1,568       1,568
        2 (Linear)       (None, 300)   235,500    235,500           0
        ─────────────────────────────────────────────────────────────
        238,636 parameters: 237,068 trainable, 1,568 running statistics, 0 frozen
    """
    return Summary(tuple(adapt(model).layers(example)))


def _words(layer: Layer) -> str:
    """Return in words what a batch normalization layer trains and what it updates; empty for any other layer."""
    if not layer.norm:
        return ""
    sizes = set(layer.norm.values())
    count = (
        f"{len(layer.norm)} × {sizes.pop():,}"
        if len(sizes) == 1
        else " + ".join(map("{:,}".format, layer.norm.values()))
    )
    trained = [name for name in layer.norm if name in ("γ", "β")]
    updated = [name for name in layer.norm if name not in trained]
    how = "trained" if layer.trainable else "frozen"
    then = "updated by forward passes" if layer.moves else "not updated"
    said = [
        _sentence(names, how, sum(layer.norm[name] for name in names))
        for names, how in ((trained, how), (updated, then))
        if names
    ]
    return f"{layer.name}: {count} = {sum(layer.norm.values()):,}: {', '.join(said)}"


def _sentence(names: list[str], how: str, numbers: int) -> str:
    listed = " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
    return f"{listed} {'are' if names[1:] else 'is'} {how} ({numbers:,})"


def _shape(sizes: tuple[int | None, ...]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
