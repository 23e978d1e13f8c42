"""Read what people have: tables, NumPy archives, IDX files, folders of images. Nothing that is read is executed."""

import csv
import gzip
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from PIL import Image, UnidentifiedImageError

from batchnorm.errors import DataError

__all__ = ["Raw", "read_digits", "read_file", "read_folder"]

TABLES = (".csv", ".tsv", ".parquet", ".pq")


class Raw(NamedTuple):
    """Rows and labels as they stand in a source, with a test set where the source brings one.

    Args:
        x: ``(N, features)``, ``(N, H, W)``, ``(N, C, H, W)`` or ``(N, H, W, C)``.
        y: ``(N,)`` labels of any type.
        x_test: like ``x``.
        y_test: like ``y``.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None


def read_digits() -> Raw:
    """Return scikit-learn's handwritten digits: 1,797 images of 8×8 pixels with values 0 to 16, ten classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Raw(x.reshape(-1, 8, 8), y)


def read_file(path: Path, target: str | None, drop: tuple[str, ...]) -> Raw:
    """Read one file by its ending.

    Raises:
        DataError: an unknown ending, an unreadable file, or contents that can't be learned from.
    """
    readers: dict[str, Callable[[], Raw]] = {".npz": lambda: read_npz(path)}
    readers |= dict.fromkeys(TABLES, lambda: read_table(path, target, drop))
    if _is_idx(path):
        return read_idx(path)
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path} must be a .csv, .tsv, .parquet, .npz or IDX file, or a folder; got the ending {path.suffix!r}"
        )
    try:
        return readers[path.suffix.lower()]()
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        pl.exceptions.PolarsError,
        # a damaged Parquet file makes polars' Rust code panic, which is no Exception
        pl.exceptions.PanicException,
    ) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path} can't be read, it may be damaged or cut off: {reason[0]}") from error


def read_folder(path: Path, image_size: tuple[int, int] | None) -> Raw:
    """Read a folder of IDX files as MNIST publishes them, or a folder with one sub-folder of images for each class.

    Raises:
        DataError: neither of the two, an unreadable image, or images of several sizes without ``image_size``.
    """
    images = sorted(f for f in path.iterdir() if f.is_file() and _is_idx(f) and "idx3" in f.name)
    if images:
        train = next((f for f in images if not f.name.startswith(("t10k", "test"))), images[0])
        return read_idx(train)
    classes = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not classes:
        raise DataError(f"{path} must hold a sub-folder of images for each class, or IDX files; it holds neither")
    Image.init()
    files = [
        (f, folder.name)
        for folder in classes
        for f in sorted(folder.iterdir())
        if f.suffix.lower() in Image.EXTENSION and not f.name.startswith(".")
    ]
    if not files:
        raise DataError(f"the sub-folders of {path} must hold images, none was found")
    pixels = _same_size([(f, _read_image(f)) for f, _ in files], image_size)
    return Raw(pixels, np.array([name for _, name in files]))


def read_npz(path: Path) -> Raw:
    """Read ``x`` and ``y``, and ``x_test``, ``y_test`` where they are there; pickled objects are refused."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be an .npz archive, as numpy.savez writes it; it is not, or it is cut off")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        names = set(archive.files)
        if not {"x", "y"} <= names:
            raise DataError(f"{path} must hold the arrays x and y, it holds {', '.join(sorted(names)) or 'none'}")
        test = {"x_test", "y_test"} <= names
        return Raw(
            archive["x"],
            archive["y"],
            archive["x_test"] if test else None,
            archive["y_test"] if test else None,
        )


def read_table(path: Path, target: str | None, drop: tuple[str, ...]) -> Raw:
    """Read a table of numbers with one column of labels.

    Raises:
        DataError: no such target or column to drop, columns that hold text, nothing, one value only, NaN or infinity.
    """
    frame = _read_frame(path)
    for name in drop:
        if name not in frame.columns:
            raise DataError(f"{path} has no column {name!r} to drop; it has {_some(frame.columns)}")
    frame = frame.drop(drop)
    if target is None or target not in frame.columns:
        asked = "no target was named" if target is None else f"it has no column {target!r}"
        raise DataError(f"{path} needs a target column: {asked}; choose one with --target: {_some(frame.columns)}")
    if frame.height == 0:
        raise DataError(f"{path} must have rows, it has a header only")
    features = frame.drop(target)
    if features.width == 0:
        raise DataError(f"{path} must have columns beside the target {target!r}, it has none")
    _check_columns(path, features)
    if missing := frame[target].null_count():
        raise DataError(f"{path}: the target {target!r} must have a value in every row, {missing} are missing")
    return Raw(features.cast(pl.Float64).to_numpy(), frame[target].to_numpy())


def read_idx(images: Path) -> Raw:
    """Read IDX images with the labels beside them, and the t10k pair as test set where it is there."""
    x, y = _read_idx_pair(images)
    others = [f for f in images.parent.iterdir() if f.name.startswith("t10k") and "idx3" in f.name]
    if images.name.startswith("t10k") or not others:
        return Raw(x, y)
    return Raw(x, y, *_read_idx_pair(others[0]))


def _read_frame(path: Path) -> pl.DataFrame:
    if path.suffix.lower() in (".parquet", ".pq"):
        return pl.read_parquet(path)
    head = path.read_bytes()[:65536]
    if b"\0" in head:
        raise DataError(f"{path} must be a text file of comma-separated values, it holds binary data")
    if not head.strip():
        raise DataError(f"{path} must have a header and rows, it is empty")
    first = head.decode("utf-8-sig", errors="replace").splitlines()[0]
    separator = max(",;\t|", key=first.count)
    return pl.read_csv(
        path,
        separator=separator,
        infer_schema_length=None,
        null_values=["", "NA", "N/A", "null"],
        try_parse_dates=False,
        quote_char=csv.excel.quotechar,
    )


def _check_columns(path: Path, features: pl.DataFrame) -> None:
    empty = [c.name for c in features if c.null_count() == len(c)]
    readable = {c.name for c in features if c.dtype.is_numeric() or c.dtype == pl.Boolean}
    text = [name for name in features.columns if name not in readable and name not in empty]
    if text:
        raise DataError(
            f"{path}: columns must hold numbers, but {_some(text)} hold{'s' * (len(text) == 1)} text: "
            f"encode as numbers, or leave out with --drop {','.join(text[:5])}"
        )
    if empty:
        raise DataError(f"{path}: {_some(empty)} hold(s) no value at all: leave out with --drop {','.join(empty[:5])}")
    for column in features:
        values = column.cast(pl.Float64)
        bad = (values.is_null() | ~values.is_finite()).fill_null(True)
        if bad.any():
            raise DataError(
                f"{path}: every value must be a finite number, but column {column.name!r} has {int(bad.sum())} missing, "
                f"NaN or infinite, the first in data row {int(bad.arg_max() or 0) + 1}: fill in or remove"
            )
    constant = [c.name for c in features if c.n_unique() == 1]
    if constant:
        raise DataError(
            f"{path}: a constant column teaches nothing, and {_some(constant)} hold(s) one value only: "
            f"leave out with --drop {','.join(constant[:5])}"
        )


def _is_idx(path: Path) -> bool:
    return "-idx" in path.name or ".idx" in path.name


def _read_idx_pair(images: Path) -> tuple[np.ndarray, np.ndarray]:
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels == images or not labels.is_file():
        raise DataError(f"{images} needs its labels beside it, in {labels.name}, which is not there")
    x, y = _read_idx_array(images), _read_idx_array(labels)
    if len(x) != len(y):
        raise DataError(f"{images} holds {len(x)} images, but {labels.name} holds {len(y)} labels: they must match")
    return x, y


def _read_idx_array(path: Path) -> np.ndarray:
    """Read one IDX file: two zero bytes, type, rank, sizes as big-endian 32-bit numbers, then the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read, it may be damaged or cut off: {error}") from error
    types = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in types:
        raise DataError(f"{path} must begin like an IDX file, it begins with the bytes {content[:4].hex(' ')}")
    rank, dtype = content[3], np.dtype(types[content[2]])
    start = 4 + 4 * rank
    shape = tuple(int(n) for n in np.frombuffer(content[4:start].ljust(4 * rank, b"\0"), ">u4"))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise DataError(f"{path} must hold {expected} bytes for the shape {shape}, it holds {len(content)}: cut off?")
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} can't be read as an image, it may be damaged or cut off: {error}") from error


def _same_size(images: list[tuple[Path, Image.Image]], size: tuple[int, int] | None) -> np.ndarray:
    mode = "RGB" if any(image.mode == "RGB" for _, image in images) else "L"
    if size is None:
        first, size = images[0][0], images[0][1].size
        for path, image in images:
            if image.size != size:
                raise DataError(
                    f"all images must have one size, but {first} is {size[0]}×{size[1]} and {path} is "
                    f"{image.size[0]}×{image.size[1]}: choose one with --image-size"
                )
    converted = (image.convert(mode) for _, image in images)
    pixels = np.stack([np.asarray(image if image.size == size else image.resize(size)) for image in converted])
    return pixels if mode == "L" else pixels.transpose(0, 3, 1, 2)


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
