"""One batch normalization layer on its way between two frameworks: what it stores, and how it goes on."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from batchnorm.errors import OptionError
from batchnorm.graph import Norm

__all__ = ["Portable", "complement", "shortest"]

SHOWN = 60
STILL = 0.9


@dataclass(eq=False, slots=True)
class Portable:
    """A batch normalization layer without a framework.

    Args:
        kind: the framework and class that it comes from, as ``"torch BatchNorm2d"``.
        norm: its numbers, eps, decay and the convention of its variance.
        dtype: of γ and β, as ``"float32"``.
        statistics_dtype: of the running mean and variance.
        computes: the dtype that it casts to before it computes; empty where that follows from its input.
        dims: how many axes of places its data have; ``None`` where nobody knows.
        axis: of the channels, where the framework leaves that open; ``None`` for others.
        frozen: whether its statistics may not move, and γ and β may not be trained.
        updates: batches that its statistics have seen; ``None`` where the framework does not count them.
        options: what it does beyond this, each by its own word; what a framework does by default is not listed.
        notes: what the new layer does in another way.
    """

    kind: str
    norm: Norm
    dtype: str = "float32"
    statistics_dtype: str = "float32"
    computes: str = ""
    dims: int | None = None
    axis: int | None = None
    frozen: bool = False
    updates: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def taken(self, known: set[str], target: str) -> dict[str, Any]:
        """Return the options for a layer that has these.

        Raises:
            OptionError: it has another one too.
        """
        for name, value in self.options.items():
            if name not in known:
                shown = value if isinstance(value, int | float | str) or value is None else repr(value)[:SHOWN]
                raise OptionError(
                    f"{self.named} has {name}={shown!r}, for which {target} has no counterpart: set it back first, or build "
                    "that part in the other framework"
                )
        return dict(self.options)

    @property
    def named(self) -> str:
        """What an error calls it."""
        return f"the {self.kind} layer" + (f" {self.norm.name!r}" if self.norm.name else "")

    @property
    def channels(self) -> int:
        """How many channels it normalizes."""
        held = (self.norm.mean, self.norm.gamma, self.norm.beta)
        return next(len(v) for v in held if v is not None)

    def place(self, default: int = -1) -> int:
        """Return the axis of the channels for a framework that leaves it open."""
        return default if self.axis is None else self.axis

    def rank(self, target: str) -> int:
        """Return how many axes the data have.

        Raises:
            OptionError: nobody knows.
        """
        if self.dims is None:
            raise OptionError(
                f"{target} must know the axes of its data, and {self.named} does not tell: give dims, the number of axes of "
                "places (0 for rows, 1 for sequences, 2 for images, 3 for volumes)"
            )
        return self.dims + 2

    def decay(self, target: str) -> float:
        """Return the weight of the past.

        Raises:
            OptionError: all batches count alike.
        """
        if self.norm.decay is None and self.frozen:
            # which nothing reads
            return STILL
        if self.norm.decay is None:
            raise OptionError(
                f"{self.named} has momentum=None (all batches count alike), for which {target} has no counterpart: give it a "
                "number first"
            )
        return self.norm.decay

    def statistics(self, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the running mean and variance.

        Raises:
            OptionError: it keeps none.
        """
        if self.norm.mean is None or self.norm.variance is None:
            raise OptionError(
                f"{self.named} has track_running_stats=False, for which {target} has no counterpart: it always normalizes "
                "by its running statistics in evaluation"
            )
        return self.norm.mean, self.norm.variance

    def note_variance(self, target: str, cure: str) -> None:
        """Note that the statistics move in the other convention from now on, if they do."""
        if self.norm.unbiased:
            self.notes.append(
                f"{target} keeps the biased running variance, it kept the unbiased one; what is stored is carried as it is, "
                f"what is added by training is smaller by 1/n ({cure})"
            )


def complement(share: float) -> float:
    """Return ``1 - share`` as it is written in decimals: a momentum of 0.1 is a decay of 0.9, and back.

    Example:
        >>> complement(0.9), 1 - 0.9
        (0.1, 0.09999999999999998)
    """
    return float(1 - Decimal(repr(float(share))))


def shortest(value: float) -> float:
    """Return the shortest decimal number that is the same in float32, which a file of float32 was made of.

    Example:
        >>> shortest(0.8999999761581421)
        0.9
    """
    return float(str(np.float32(value)))
