"""What `observe` returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchnorm.errors import OptionError
from batchnorm.observed import Observed, json_ready
from batchnorm.states import Rate
from batchnorm.tables import table

__all__ = ["Observation"]


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What has reached the layers of a model; iterates over them, finds one by its name, prints as a table.

    Args:
        layers: those that values have reached, in the order of the model.
        unreached: names of layers that no value has reached, or that can't be seen.
        batches: how many were read, over all processes.
        samples: how many were read, over all processes.
        use: what the layers normalized by: ``"batch"`` or ``"running"``.
        rates: how fast an optimizer turns the weights before the layers; empty without one.
    """

    layers: tuple[Observed, ...]
    unreached: tuple[str, ...]
    batches: int
    samples: int
    use: str
    rates: tuple[Rate, ...] = ()

    def __iter__(self) -> Iterator[Observed]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return any(one.layer == name for one in self.layers)

    def __getitem__(self, name: str) -> Observed:
        """Return a layer by its name.

        Raises:
            OptionError: a layer that is not there, or was not reached.
        """
        for one in self.layers:
            if one.layer == name:
                return one
        why = "was not reached" if name in self.unreached else "is not one of the layers"
        raise OptionError(
            f"the layer must have been reached, {name!r} {why}: {', '.join(one.layer for one in self.layers)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pieces of the inputs, ready for JSON."""
        return {
            "use": self.use,
            "batches": self.batches,
            "samples": self.samples,
            "layers": [one.to_dict() for one in self.layers],
            "unreached": list(self.unreached),
            "rates": [_rate(one) for one in self.rates],
        }

    def __str__(self) -> str:
        head = ("Layer", "Values", "Distance", "Dead", "Off", "Saturated", "Between", "|γ|")
        rows: list[tuple[str, ...]] = [
            (
                one.layer,
                f"{one.count:,.6g}",
                _number(one.distance),
                _percent(one.dead),
                _percent(one.off),
                _percent(one.saturated),
                _percent(one.between),
                "–" if one.gamma is None else f"{abs(one.gamma).min():.2g} to {abs(one.gamma).max():.2g}",
            )
            for one in self.layers
        ]
        rows += [(name, "not reached", *["–"] * 6) for name in self.unreached]
        how = "its own statistics" if self.use == "batch" else "the stored statistics"
        total = f"{self.samples:,} samples in {self.batches:,} batches, each normalized by {how}"
        return "\n".join([table(head, rows, numbers=7), total, *self._told_rates()])

    def _told_rates(self) -> list[str]:
        if not self.rates:
            return []
        rows = [
            (one.layer, f"{one.learning_rate:.3g}", f"{one.size:.3g}", f"{one.effective:.3g}", _number(one.gradient))
            for one in self.rates
        ]
        return ["", table(("Weights", "lr", "‖w‖", "lr/‖w‖²", "‖g‖/‖w‖"), rows, numbers=4)]


def _rate(one: Rate) -> dict[str, Any]:
    names = ("layer", "norm", "learning_rate", "size", "effective", "gradient")
    return {name: json_ready(getattr(one, name)) for name in names}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"
