"""What mending returns."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Left", "Mended", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was set right.

    Args:
        code: of the rule.
        layers: dotted names of the layers.
        what: what was done, in words.
    """

    code: str
    layers: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        named = ", ".join(self.layers[:3]) + (f" and {len(self.layers) - 3} more" if len(self.layers) > 3 else "")
        return f"{self.code} {named}: {self.what}" if named else f"{self.code} {self.what}"


@dataclass(frozen=True, slots=True)
class Left:
    """One finding that was left as it is.

    Args:
        code: of the rule.
        layer: dotted name of the layer; empty for the whole model.
        reason: why, and what to do.
    """

    code: str
    layer: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Mended:
    """A model after mending; prints as text.

    Args:
        model: the model: the one that was checked, or a new one where its structure had to change.
        done: what was set right.
        left: findings that were left, each with its reason.
    """

    model: Any
    done: tuple[Step, ...] = ()
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        lines = [str(step) for step in self.done] or ["nothing was changed"]
        reasons: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            reasons.setdefault((left.code, left.reason), []).append(left.layer)
        lines += [
            f"{code} left{' in ' + str(len(layers)) + ' layers' if len(layers) > 1 else ''}: {reason}"
            for (code, reason), layers in reasons.items()
        ]
        return "\n".join(lines)
