"""Open rooms of the library on demand, so that a framework is loaded by the verb that needs it and by nothing else."""

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from batchnorm.errors import MissingDependencyError, OptionError

__all__ = ["import_named", "made", "open_lazily", "require"]


def require(room: str, extra: str) -> Any:
    """Import a room, or say which extra of this package has what it needs.

    Raises:
        MissingDependencyError: a package that the room needs is not installed.
    """
    try:
        return import_module(room)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{room} needs the package {error.name!r}, which is not installed: pip install 'batchnorm[{extra or 'all'}]'"
        ) from error


def import_named(spec: str) -> Any:
    """Return what ``package.module:name`` names; modules in the current folder are found."""
    module, _, name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return getattr(import_module(module), name)


def made(spec: str) -> Any:
    """Return the model that ``package.module:factory`` makes.

    Raises:
        OptionError: no such factory, or one that fails.
    """
    if ":" not in spec:
        raise OptionError(f"a model is named as package.module:factory, got {spec!r}")
    try:
        return import_named(spec)()
    except Exception as error:
        raise OptionError(f"{spec} must make a model, but failed: {type(error).__name__}: {error}") from error


def open_lazily(package: str, public: dict[str, tuple[str, str]]) -> None:
    """Bind the public names of a package at their first use.

    Args:
        package: its ``__name__``.
        public: for each name the room that it lives in, or that it is, and the extra that the room needs.
    """

    class Package(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in public:
                raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")
            room = require(*public[name])
            value = getattr(room, name, room)
            super().__setattr__(name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            # importing the file compare.py would bind the module to the verb's name
            if not (name in public and isinstance(value, ModuleType) and hasattr(value, name)):
                super().__setattr__(name, value)

        def __dir__(self) -> Iterable[str]:
            return sorted({*super().__dir__(), *public})

    sys.modules[package].__class__ = Package
