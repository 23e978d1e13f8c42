"""Data of the command line: files of arrays and factories of batches, shared out among the processes of ``torchrun``."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, OptionError
from batchnorm.models import joined
from batchnorm.rooms import import_named

__all__ = ["BATCH_SIZE", "Share", "cut", "processes", "read"]

BATCH_SIZE = 64


def cut(data: Any, batch_size: int) -> Any:
    """Return batches of arrays; what yields batches already is returned as it is.

    Args:
        data: what `read` returns, or an array ``(N, ...)``.
        batch_size: samples of a batch.

    Raises:
        OptionError: batches without samples.
    """
    if batch_size < 1:
        raise OptionError(f"the batch size must be at least 1, got {batch_size}")
    arrays = {"": data} if isinstance(data, np.ndarray) else data
    return Batches(arrays, batch_size) if isinstance(arrays, Mapping) else arrays


def read(source: str) -> Any | None:
    """Return the arrays of a ``.npy`` or ``.npz`` file by name, or what ``package.module:factory`` makes.

    Returns:
        Arrays by name (empty: the only input), or an iterable of batches; ``None`` for a source of another kind.

    Raises:
        DataError: a file that can't be read, or arrays of different lengths.
        OptionError: a factory that fails.
    """
    path = Path(source)
    if path.suffix in (".npy", ".npz"):
        return _arrays(path)
    if ":" not in source or path.exists():
        return None
    try:
        return import_named(source)()
    except Exception as error:
        raise OptionError(
            f"{source} must make an iterable of batches, it failed: {type(error).__name__}: {error}"
        ) from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            held = np.load(file, allow_pickle=False)
            # labels are of no use here
            arrays = {"": held} if path.suffix == ".npy" else {n: held[n] for n in held.files if n.split("_")[0] != "y"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} must hold arrays as numpy.save or numpy.savez write them, it can't be read: {error}"
        ) from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(
            f"{path} must hold arrays of one length, with a sample in each row, it holds {lengths or 'none'}"
        )
    return arrays if len(arrays) > 1 else {"": next(iter(arrays.values()))}


class Batches:
    """Arrays by name, cut into batches of as many rows."""

    def __init__(self, arrays: Mapping[str, np.ndarray], size: int) -> None:
        self.arrays, self.size = arrays, size

    def __len__(self) -> int:
        return len(range(0, len(next(iter(self.arrays.values()))), self.size))

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            rows = slice(number * self.size, (number + 1) * self.size)
            batch = {name: _floats(array[rows]) for name, array in self.arrays.items()}
            yield batch.get("", batch)


def _floats(array: np.ndarray) -> np.ndarray:
    """Return pixels as numbers; what is wider than float32 is no input of a network."""
    return array.astype(np.float32) if array.dtype.kind == "f" or array.dtype == np.uint8 else array


class Share:
    """Every so many-th batch: those of one process."""

    def __init__(self, batches: Any, rank: int, ranks: int) -> None:
        self.batches, self.rank, self.ranks = batches, rank, ranks

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.rank, None, self.ranks)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.batches), self.ranks))


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Join the job that ``torchrun`` has started, if it has, and yield this process's rank and how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with joined() as place:
            yield place
    else:
        yield 0, 1
