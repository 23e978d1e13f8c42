"""Import parts of the library on demand."""

from importlib import import_module
from typing import Any

from batchnorm.errors import MissingDependencyError

__all__ = ["require"]


def require(room: str, extra: str) -> Any:
    """Import a room of the house, or say which extra of this package has what it needs.

    Raises:
        MissingDependencyError: a package that the room needs is not installed.
    """
    try:
        return import_module(room)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{room} needs the package {error.name!r}, which is not installed: pip install 'batchnorm[{extra or 'all'}]'"
        ) from error
