"""Pairs of models for the rules of `check`: one that has the fault, and a look-alike that has not."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A model and what `check` is given with it; ``layer`` is the one that must be found."""

    model: Any
    layer: str = ""
    given: dict[str, Any] = {}  # noqa: RUF012 - never written to


class Pairs:
    """Functions that return a sick model for ``True``, and a healthy look-alike for ``False``, by the codes of the rules."""

    def __init__(self) -> None:
        self.found: dict[str, list[Callable[[bool], Case]]] = {}

    def __call__(self, code: str) -> Callable[[Any], Any]:
        def enter(make: Callable[[bool], Case]) -> Callable[[bool], Case]:
            self.found.setdefault(code, []).append(make)
            return make

        return enter

    def cases(self) -> list[tuple[str, str, Callable[[bool], Case], bool]]:
        """Return for each model its rule, a name, what makes it, and whether it is sick."""
        return [
            (code, f"{code}-{number}-{'sick' if sick else 'healthy'}", make, sick)
            for code, makes in sorted(self.found.items())
            for number, make in enumerate(makes)
            for sick in (True, False)
        ]
