"""Networks by name, and the factories that users write."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from batchnorm.errors import OptionError
from batchnorm.lab.arms import Arm
from batchnorm.rooms import import_named

__all__ = ["Factory", "called", "digest_of", "factory_of"]

Factory = Callable[[tuple[int, ...], int, Arm], Any]


def factory_of(model: str, networks: Mapping[str, Factory], prefix: str = "") -> Factory:
    """Return the factory ``(shape, classes, arm) -> network`` of a named network or of ``package.module:factory``.

    Args:
        model: what the user wrote, without ``prefix``.
        networks: those that have a name.
        prefix: what names of this framework begin with, for messages.

    Raises:
        OptionError: no such network, module or factory, or one that does not take these arguments.
    """
    if model in networks:
        return networks[model]
    said = prefix + model
    if ":" not in model:
        choices = ", ".join(prefix + name for name in networks)
        raise OptionError(
            f"unknown model {said!r}: choose from {choices}, or name your own as {prefix}package.module:factory"
        )
    try:
        factory: Any = import_named(model)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"model {said!r} can't be loaded: {error}") from error
    try:
        inspect.signature(factory).bind((1,), 2, None)
    except TypeError as error:
        raise OptionError(f"{said} must take the arguments (shape, classes, arm): {error}") from None
    return factory  # type: ignore[no-any-return]


def called(factory: Factory, said: str, shape: tuple[int, ...], classes: int, arm: Arm, kind: str) -> Any:
    """Return what a factory makes.

    Args:
        factory: see `factory_of`.
        said: how the user calls it.
        shape: of one row.
        classes: how many.
        arm: the arm.
        kind: what it must return, in words.

    Raises:
        OptionError: it fails.
    """
    try:
        return factory(shape, classes, arm)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(
            f"{said}(shape={shape}, classes={classes}, arm={arm.name!r}) must return {kind}, but raised "
            f"{type(error).__name__}: {error}"
        ) from error


def digest_of(factory: Factory) -> str | None:
    """Return a digest of the file that a user's factory stands in: rows of an older version are not mixed in."""
    file = getattr(sys.modules.get(factory.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
