"""The batches of a data set: how many, how often, and what is said where they fail."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from batchnorm.errors import DataError, OptionError

__all__ = ["Source"]

ROWS = 64


class Source:
    """Batches, read once or several times.

    Args:
        data: an iterable of batches, or one array ``(N, ...)``, which is cut into batches.
        batches: read no more than these; ``None`` for all.
        repeated: whether it will be read several times.

    Raises:
        OptionError: it is no iterable, or one that can be read only once.
    """

    def __init__(self, data: Any, batches: int | None, *, repeated: bool) -> None:
        self.data, self.limit = data, batches
        if hasattr(data, "shape") and hasattr(data, "ndim"):
            if data.ndim < 2:
                raise OptionError(f"data must be batches, or one array (N, ...), got one of shape {tuple(data.shape)}")
            self.data = _Rows(data)
        if isinstance(data, str | bytes | dict) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise OptionError(
                f"data must be an iterable of batches, as a DataLoader or a list, got a {type(data).__name__}: "
                "put a single batch into a list"
            )
        if repeated and hasattr(data, "__next__"):
            raise OptionError(
                "method='sequential' reads the data several times, this iterator can be read only once: give a list, a "
                "loader, or an object whose __iter__ starts anew"
            )

    @property
    def total(self) -> int | None:
        """How many batches there will be; ``None`` where nobody knows."""
        try:
            size = len(self.data)
        except TypeError:
            return self.limit
        return size if self.limit is None else min(size, self.limit)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            DataError: the data fails.
        """
        for number in count():
            if number == self.limit:
                return
            try:
                if number == 0:
                    batches = iter(self.data)
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(
                    f"the data must give its batches, it failed after {number} of them: {type(error).__name__}: {error}"
                ) from error
            yield batch


class _Rows:
    """An array, cut into batches."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(range(0, len(self.array), ROWS))

    def __iter__(self) -> Iterator[Any]:
        return (self.array[start : start + ROWS] for start in range(0, len(self.array), ROWS))
