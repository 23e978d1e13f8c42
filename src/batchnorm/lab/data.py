"""Data sets to learn from: checked, labelled 0, 1, 2, …, split by seed."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from batchnorm.errors import DataError
from batchnorm.lab.readers import Raw, read_digits, read_file, read_folder

__all__ = ["Dataset", "Split", "load_data"]

ARRAYS = "arrays"
MOST_CLASSES = 1000
FEWEST_IN_CLASS = 5


@dataclass(frozen=True)
class Dataset:
    """Rows with class labels.

    Args:
        source: where it came from, as the user wrote it.
        x: ``(N, features)`` or ``(N, C, H, W)``, float32.
        y: ``(N,)`` class numbers, int64.
        classes: name of each class.
        x_test: like ``x``, where the source brings its own test set.
        y_test: like ``y``.
    """

    source: str
    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.x.shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the values, so that results of other data are never mixed in."""
        digest = hashlib.sha256(repr((self.x.shape, self.classes)).encode())
        for values in (self.x, self.y, self.x_test, self.y_test):
            if values is not None:
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def split(self, seed: int) -> "Split":
        """Split into training, validation and test rows, stratified: 60 / 20 / 20, or 80 / 20 beside a given test set."""
        rows = np.arange(len(self.y))
        if self.x_test is not None and self.y_test is not None:
            train, val = train_test_split(rows, test_size=0.2, random_state=seed, stratify=self.y)
            return Split(self.x[train], self.y[train], self.x[val], self.y[val], self.x_test, self.y_test)
        train, rest = train_test_split(rows, test_size=0.4, random_state=seed, stratify=self.y)
        val, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=self.y[rest])
        return Split(self.x[train], self.y[train], self.x[val], self.y[val], self.x[test], self.y[test])


@dataclass(frozen=True)
class Split:
    """Training, validation and test rows of one seed."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_data(
    source: Any,
    *,
    target: str | None = None,
    drop: tuple[str, ...] = (),
    image_size: tuple[int, int] | None = None,
) -> Dataset:
    """Load a data set for classification.

    Args:
        source: ``"digits"``; a ``.csv``, ``.tsv``, ``.parquet``, ``.npz`` or IDX file; a folder of IDX files or of class
            folders with images; a pair of arrays ``(x, y)``; or a `Dataset`.
        target: the column of labels, for tables.
        drop: columns to leave out, for tables.
        image_size: ``(width, height)`` to scale images to, for folders of images.

    Raises:
        DataError: what was found can't be read or learned from; the message says what to do.

    Example:
        >>> data = load_data("digits")
        >>> data.x.shape, len(data.classes)
        ((1797, 1, 8, 8), 10)
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, tuple):
        name, raw = ARRAYS, Raw(*(np.asarray(v) for v in source))
    else:
        name, raw = str(source), _read(str(source), target, drop, image_size)
    return _checked(name, raw)


def _read(source: str, target: str | None, drop: tuple[str, ...], image_size: tuple[int, int] | None) -> Raw:
    if source == "digits":
        return read_digits()
    path = Path(source)
    if path.is_dir():
        return read_folder(path, image_size)
    if not path.is_file():
        raise DataError(f"no such file or folder: {path} (the built-in data set is 'digits')")
    return read_file(path, target, drop)


def _checked(name: str, raw: Raw) -> Dataset:
    x = _features(name, raw.x)
    classes, y = _labels(name, raw.y, len(x))
    if raw.x_test is None or raw.y_test is None:
        return Dataset(name, x, y, classes)
    x_test = _features(f"{name} (test)", raw.x_test)
    if x_test.shape[1:] != x.shape[1:]:
        raise DataError(f"{name}: test rows must have the shape {x.shape[1:]} of the others, got {x_test.shape[1:]}")
    known = {label: i for i, label in enumerate(classes)}
    labels = [str(label) for label in raw.y_test]
    if unknown := sorted(set(labels) - known.keys()):
        raise DataError(f"{name}: every class of the test set must be in the training set, {unknown[0]!r} is not")
    return Dataset(name, x, y, classes, x_test, np.array([known[label] for label in labels]))


def _features(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim not in (2, 3, 4) or values.dtype.kind not in "fiub" or 0 in values.shape:
        raise DataError(
            f"{name}: x must be numbers of shape (N, features), (N, H, W), (N, C, H, W) or (N, H, W, C), "
            f"got {values.dtype} of shape {values.shape}"
        )
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and values.shape[3] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        values = values.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0][0])
        raise DataError(
            f"{name}: every value of x must be finite in float32, the first that is not is in row {row + 1}"
        )
    if (x == x[:1]).all():
        raise DataError(f"{name}: the rows of x must differ, all {len(x)} are the same")
    return x


def _labels(name: str, values: np.ndarray, rows: int) -> tuple[tuple[str, ...], np.ndarray]:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or len(values) != rows:
        raise DataError(f"{name}: y must be one label for each of the {rows} rows, got the shape {values.shape}")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise DataError(f"{name}: every label must be finite, {int((~np.isfinite(values)).sum())} are not")
        if (values != np.round(values)).any():
            raise DataError(
                f"{name}: labels must be classes, but y holds fractions such as {values[values % 1 != 0][0]}"
            )
        values = values.astype(np.int64)
    found, y, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(found) == 1:
        raise DataError(f"{name}: there must be at least two classes, all {rows} rows are of class {found[0]!s}")
    if len(found) > MOST_CLASSES:
        raise DataError(f"{name}: labels must be classes, but y holds {len(found)} distinct values: is it a quantity?")
    if counts.min() < FEWEST_IN_CLASS:
        raise DataError(
            f"{name}: every class needs at least {FEWEST_IN_CLASS} rows to be split, class {found[counts.argmin()]!s} has "
            f"{counts.min()}: merge it with another or remove it"
        )
    return tuple(str(label) for label in found), y.astype(np.int64)
