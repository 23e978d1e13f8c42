"""Arms: what is compared, declared as data."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_args

from batchnorm.errors import OptionError

__all__ = ["ARMS", "Arm", "resolve"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("none", "batch", "layer", "group"),
    "place": ("before", "after"),
    "activation": ("relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"),
    "input": ("standardized", "raw", "norm"),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to build and feed a network.

    Args:
        name: how tables and plots call it.
        norm: ``"none"``, ``"batch"``, ``"layer"`` or ``"group"``: the normalization of every hidden layer.
        place: ``"before"`` or ``"after"`` the activation.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, ``"tanh"`` or ``"sigmoid"``.
        bias: whether hidden linear layers have one; ``None`` leaves it out exactly where β of a batch norm replaces it.
        input: ``"standardized"`` by the training rows, ``"raw"``, or ``"norm"``: raw through a first batch norm layer.
        batch_size: rows a step; ``None`` takes that of the comparison.

    Example:
        >>> Arm.parse("small: norm=batch, place=after, batch_size=8")
        Arm(name='small', norm='batch', place='after', activation='relu', bias=None, input='standardized', batch_size=8)
    """

    name: str
    norm: str = "none"
    place: str = "before"
    activation: str = "relu"
    bias: bool | None = None
    input: str = "standardized"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise OptionError(
                    f"arm {self.name!r}: {key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}"
                )
        if self.batch_size is not None and self.batch_size < 2:
            raise OptionError(f"arm {self.name!r}: batch_size must be at least 2, got {self.batch_size}")

    @property
    def linear_bias(self) -> bool:
        """Whether hidden linear layers get a bias: batch norm directly after one would take it out again."""
        if self.bias is not None:
            return self.bias
        return not (self.norm == "batch" and self.place == "before")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"name: key=value, key=value"``.

        Raises:
            OptionError: not of that form, an unknown key, or a value that the key can't have.
        """
        name, colon, rest = text.partition(":")
        if not colon or not name.strip():
            raise OptionError(f"an arm is declared as 'name: key=value, key=value', got {text!r}")
        return cls.from_dict({"name": name.strip()} | dict(_pair(p, text) for p in rest.split(",") if p.strip()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make an arm of a dict, such as one of JSON; text values are converted.

        Raises:
            OptionError: an unknown key, or a value that the key can't have.
        """
        known = {f.name: f.type for f in fields(cls)}
        for key in values:
            if key not in known:
                raise OptionError(f"an arm has the keys {', '.join(known)}, got {key!r}")
        return cls(**{key: _converted(key, value, known[key]) for key, value in values.items()})

    def __str__(self) -> str:
        values = ", ".join(f"{key}={value}" for key, value in self.to_dict().items() if key != "name")
        return f"{self.name}: {values}"

    def to_dict(self) -> dict[str, Any]:
        """Return the arm as a dict that `from_dict` reads."""
        return asdict(self)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("none"),
        Arm("before", norm="batch", place="before"),
        Arm("after", norm="batch", place="after"),
        Arm("layer", norm="layer"),
        Arm("group", norm="group"),
        Arm("bias", norm="batch", place="before", bias=True),
        Arm("raw", input="raw"),
        Arm("input-norm", input="norm"),
        Arm("everywhere", norm="batch", place="after", input="norm"),
    )
}
"""The arms that have a name."""


def resolve(arms: Any) -> tuple[Arm, ...]:
    """Return arms given as `Arm`, as the name of one of `ARMS`, or as text for `Arm.parse`.

    Raises:
        OptionError: an unknown arm, fewer than one, or one name twice.
    """
    resolved = tuple(arm if isinstance(arm, Arm) else _named(str(arm)) for arm in arms)
    names = [arm.name for arm in resolved]
    if not names:
        raise OptionError("a comparison needs at least one arm, got none")
    if len(set(names)) < len(names):
        raise OptionError(f"every arm needs a name of its own, got {', '.join(names)}")
    return resolved


def _named(text: str) -> Arm:
    if ":" in text:
        return Arm.parse(text)
    if text not in ARMS:
        raise OptionError(
            f"unknown arm {text!r}: choose from {', '.join(ARMS)}, or declare one as 'name: key=value, key=value'"
        )
    return ARMS[text]


def _pair(text: str, whole: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"an arm is declared as 'name: key=value, key=value', got {whole!r}")
    return key.strip(), value.strip()


def _converted(key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or kind is str:
        return value
    if value.lower() == "none":
        return None
    try:
        if bool in get_args(kind):
            return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[value.lower()]
        return int(value)
    except (KeyError, ValueError):
        wanted = "yes or no" if bool in get_args(kind) else "a whole number"
        raise OptionError(f"{key} of an arm must be {wanted}, got {value!r}") from None
