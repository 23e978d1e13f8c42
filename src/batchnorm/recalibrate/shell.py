"""Recalibrate a model from file to file, for the command line; in the processes of torchrun too."""

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
from batchnorm.models import adapt, check_ending, joined, load, save
from batchnorm.recalibrate.recalibration import recalibrate
from batchnorm.rooms import import_named

__all__ = ["BATCH_SIZE", "cut", "read", "run"]

BATCH_SIZE = 64


def run(
    model: str, data: Any, out: Path, *, weights: Path | None = None, batch_size: int = BATCH_SIZE, **options: Any
) -> str:
    """Recalibrate a model, write it to a file, and return the result as text.

    Started by ``torchrun``, each process measures its share of the batches, and the first one writes.

    Args:
        model: a file, or ``package.module:factory``.
        data: what `read` returns, or an array ``(N, ...)``.
        out: the file to write, whole or not at all.
        weights: tensors for the model of a factory.
        batch_size: samples of a batch, where the data is arrays.
        options: of `recalibrate`.

    Raises:
        BatchNormError: whatever `models.load`, `recalibrate` or `models.save` raise; then nothing was written.
    """
    if not out.parent.is_dir():
        raise OptionError(f"the result must go into a folder that is there, {out.parent} is not")
    batches = cut(data, batch_size)
    loaded = load(model, weights)
    check_ending(loaded, out)
    # what a factory makes is in training mode
    view = adapt(loaded.eval() if hasattr(loaded, "eval") else loaded)
    with _processes() as (rank, ranks):
        found = recalibrate(view.model, _Share(batches, rank, ranks), progress=rank == 0, **options)
    if rank > 0:
        return ""
    save(view.model, out, _example(batches))
    return f"{found}\nwritten to {out}"


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
    return _Batches(arrays, batch_size) if isinstance(arrays, Mapping) else arrays


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


class _Batches:
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


class _Share:
    """Every so many-th batch: those of one process."""

    def __init__(self, batches: Any, rank: int, ranks: int) -> None:
        self.batches, self.rank, self.ranks = batches, rank, ranks

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.rank, None, self.ranks)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.batches), self.ranks))


def _example(batches: Any) -> Any:
    batch = next(iter(batches))
    return batch[0] if isinstance(batch, tuple | list) else batch


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Join the job that ``torchrun`` has started, if it has, and yield this process's rank and how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with joined() as place:
            yield place
    else:
        yield 0, 1
