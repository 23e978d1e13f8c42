"""Batch normalization in Keras, measured on the backend that Keras runs on."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from batchnorm.bench.machine import describe, keep
from batchnorm.errors import OptionError

__all__ = ["PARTS", "KerasBench", "run"]

# name of a part: the module that measures it, with `measure(quick)` and `show(measured)`
PARTS = {"applications": "batchnorm.bench.keras_applications"}


@dataclass(frozen=True)
class KerasBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        shown = [_module(part).show(self.facts[part]) for part in PARTS if part in self.facts]
        return "\n\n".join([*shown, f"raw values: {', '.join(map(str, self.files))}"])


def run(out: Path, *parts: str, quick: bool = False) -> KerasBench:
    """Measure some parts (all where none is named), and keep every raw value as JSON in ``out``.

    Raises:
        OptionError: an unknown part.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise OptionError(f"the parts of bench keras are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    measured: dict[str, Callable[[bool], Any]] = {part: _module(part).measure for part in parts or PARTS}
    facts = {"machine": describe(), **{part: measure(quick) for part, measure in measured.items()}}
    backend = import_module("keras").backend.backend()
    return KerasBench(facts, (keep(facts, out, f"keras-{backend}.json"),))


def _module(part: str) -> Any:
    return import_module(PARTS[part])
