"""What a layer can do beyond torch's own: options, checked once, when the layer is made."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.functional import Renorm
from batchnorm.torch.collectives import Group

__all__ = ["ACTIVATIONS", "Options", "RenormSchedule", "read_domains"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "relu6": nn.functional.relu6,
    "leaky_relu": nn.functional.leaky_relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "hardswish": nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class RenormSchedule:
    """Bounds of batch renormalization by the number of steps: plain at first, then relaxed linearly.

    The defaults are a fiftieth of the paper's (5,000, 25,000 and 40,000 steps of a training on ImageNet), so that a short
    training uses them too.

    Args:
        rmax: final bound of the ratio of deviations.
        dmax: final bound of the difference of means, in deviations.
        start: steps of plain batch normalization, while the running statistics settle.
        dmax_at: step at which ``dmax`` is reached.
        rmax_at: step at which ``rmax`` is reached.

    Raises:
        OptionError: ``rmax`` below 1, ``dmax`` below 0, or steps that are out of order.

    Example:
        >>> RenormSchedule(rmax=3.0, dmax=5.0, start=0, dmax_at=10, rmax_at=10).bounds(5)
        Renorm(rmax=2.0, dmax=2.5)

    Reference:
        Ioffe: Batch renormalization, 2017 (arXiv:1702.03275), section 4.1.
    """

    rmax: float = 3.0
    dmax: float = 5.0
    start: int = 100
    dmax_at: int = 500
    rmax_at: int = 800

    def __post_init__(self) -> None:
        if not (self.rmax >= 1 and self.dmax >= 0):
            raise OptionError(f"renorm must have rmax of at least 1 and dmax of at least 0, got {asdict(self)}")
        if not 0 <= self.start <= min(self.dmax_at, self.rmax_at):
            raise OptionError(f"renorm must have 0 ≤ start ≤ dmax_at and start ≤ rmax_at, got {asdict(self)}")

    def bounds(self, step: int) -> Renorm:
        """Return the bounds after ``step`` updates of the running statistics."""
        return Renorm(
            1 + self._progress(step, self.rmax_at, self.rmax - 1), self._progress(step, self.dmax_at, self.dmax)
        )

    def bounds_branch_free(self, step: torch.Tensor) -> Renorm:
        """Return the same bounds as tensors, where a look at ``step`` would break a graph."""

        def progress(end: int, full: float) -> torch.Tensor:
            part = ((step - self.start) / max(1, end - self.start)).clamp(0, 1)
            return torch.where(step >= end, full, 0.0 if math.isinf(full) else part * full)

        return Renorm(1 + progress(self.rmax_at, self.rmax - 1), progress(self.dmax_at, self.dmax))

    def _progress(self, step: int, end: int, full: float) -> float:
        if step >= end:
            return full
        # a bound of infinity is reached at once, at the end
        return 0.0 if step <= self.start or math.isinf(full) else full * (step - self.start) / (end - self.start)


@dataclass(frozen=True)
class Options:
    """All options of a layer that torch's own does not have."""

    activation: str | None = None
    virtual_batch_size: int | None = None
    renorm: RenormSchedule | None = None
    on_single: str = "error"
    unbiased: bool = True
    debias: bool = False
    total_variance: bool = False
    example_weight: float = 0.0
    domains: tuple[str, ...] = ()
    wide_statistics: bool = False
    process_group: Group | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Options":
        """Return the options that a user gave.

        Raises:
            OptionError: an unknown name or a value that can't be.
        """
        unknown = sorted(set(given) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise OptionError(f"unknown option {', '.join(unknown)}: the options are {known}")
        checked = {
            "renorm": _renorm(given.get("renorm")),
            "domains": read_domains(given.get("domains", ())),
            "process_group": Group.read(given.get("process_group")),
        }
        return cls(**{**given, **checked})

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise OptionError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        size = self.virtual_batch_size
        if size is not None and type(size) is not int:
            raise OptionError(f"virtual_batch_size must be None or an integer, got {size!r}")
        if size is not None and size < 2:
            raise OptionError(f"virtual_batch_size must be at least 2 samples, got {size}")
        if self.on_single not in ("error", "running", "skip"):
            raise OptionError(f"on_single must be 'error', 'running' or 'skip', got {self.on_single!r}")
        if not 0 <= self.example_weight <= 1:
            raise OptionError(f"example_weight must be between 0 and 1, got {self.example_weight}")
        for name in self.domains:
            if not (isinstance(name, str) and name.isidentifier()) or self.domains.count(name) > 1:
                raise OptionError(f"domains must be different names like 'target', got {self.domains}")

    def check(self, *, track_running_stats: bool, momentum: Any) -> None:
        """Refuse options that exclude each other.

        Raises:
            OptionError: naming them.
        """
        if not track_running_stats:
            need = {
                "renorm": self.renorm is not None,
                "on_single='running'": self.on_single == "running",
                "unbiased=False": not self.unbiased,
                "debias": self.debias,
                "total_variance": self.total_variance,
                "example_weight": self.example_weight > 0,
                "domains": bool(self.domains),
                "wide_statistics": self.wide_statistics,
            }
            for name, given in need.items():
                if given:
                    raise OptionError(f"{name} works with running statistics: it excludes track_running_stats=False")
        if self.debias and callable(momentum):
            raise OptionError("debias needs a constant momentum: give debias or a schedule of momenta, not both")

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, in order."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def read_domains(names: Any) -> tuple[str, ...]:
    """Return the names of domains as a tuple.

    Raises:
        OptionError: a single word, which would be read letter by letter.
    """
    if isinstance(names, str):
        raise OptionError(f"domains must be a list of names, got {names!r}: write [{names!r}]")
    return tuple(names)


def _renorm(given: Any) -> RenormSchedule | None:
    if given is None or given is False:
        return None
    if given is True:
        return RenormSchedule()
    if isinstance(given, RenormSchedule):
        return given
    names = [field.name for field in fields(RenormSchedule)]
    if not isinstance(given, Mapping) or set(given) - set(names):
        raise OptionError(f"renorm must be True, None or a dict with keys from {', '.join(names)}, got {given!r}")
    return RenormSchedule(**given)
