"""Pieces of knowledge that are found out when they are asked for, once, and say what they lack."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from batchnorm.errors import BatchNormError

__all__ = ["MissingError", "Piece", "piece"]

T = TypeVar("T")


class MissingError(Exception):
    """A rule needs something that is not there; says what."""


class Piece(Generic[T]):
    """An attribute that is found out at its first use; what has failed once is not tried again.

    Args:
        needs: what the user must have given, in words.
        find: finds it out.
        told: whether a failure is a problem of what the user has given.
    """

    def __init__(self, needs: str, find: Callable[[Any], T], *, told: bool) -> None:
        self.needs, self.find, self.told = needs, find, told
        self.__doc__ = find.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, subject: Any, owner: type | None = None) -> T:
        if self.name not in subject.found:
            subject.found[self.name] = self._try(subject)
        found = subject.found[self.name]
        if isinstance(found, MissingError):
            raise MissingError(str(found))
        return found  # type: ignore[no-any-return]

    def _try(self, subject: Any) -> T | MissingError:
        if subject.lacks(self.needs):
            return MissingError(f"needs {self.needs}")
        try:
            return self.find(subject)
        except MissingError as missing:
            return missing
        except BatchNormError as error:
            if self.told and subject.lacks(self.needs, failed=True):
                return MissingError(f"needs {self.needs}")
            problem = " ".join(str(error).split())
            if self.told and problem not in subject.problems:
                subject.problems.append(problem)
            return MissingError(problem)


def piece(needs: str, *, told: bool = True) -> Callable[[Callable[[Any], T]], Piece[T]]:
    """Make a method a `Piece`."""
    return lambda find: Piece(needs, find, told=told)
