"""Read and write ``.onnx`` files; nothing in a file is executed, and nothing outside of its folder is read."""

import math
import os
import stat
from pathlib import Path
from typing import Any

import onnx

from batchnorm.errors import DataError
from batchnorm.files import replacing
from batchnorm.onnx.tensors import is_external, tensors

__all__ = ["load", "save", "weight_bytes"]

LIMIT = 2**31 - 2**20
"""Bytes that one protobuf message can hold, less room for what is not weights."""
_MAGIC = {
    b"PK\x03\x04": "a zip archive, as torch and Keras write: give it its own ending",
    b"\x80": "a pickle: load it in its framework and export it",
    b"\x89HDF": "an HDF5 file",
}


def load(path: Path) -> Any:
    """Return the ``onnx.ModelProto`` of a file, with the weights that it keeps in files beside it.

    Args:
        path: the file.

    Raises:
        DataError: it is missing, cut off, no ONNX model, or its weights are missing or outside of its folder.

    Example:
        >>> load(Path("model.onnx"))  # doctest: +SKIP
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} must be an ONNX model that can be read: {error.strerror}") from error
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "")
    if kind:
        raise DataError(f"{path} must be an ONNX model, it is {kind}")
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:
        # protobuf's own error, wherever it lives in this version
        raise DataError(f"{path} must be an ONNX model, it is something else, damaged or cut off: {error}") from error
    if not model.HasField("graph") or not model.ir_version or not model.opset_import:
        raise DataError(f"{path} must be an ONNX model, it holds no graph with a version: it may be cut off")
    for tensor in tensors(model):
        if is_external(tensor):
            _load_external(tensor, path)
    return model


def save(model: Any, path: Path) -> None:
    """Write a model, whole or not at all; weights beyond the 2 GB of one message go to ``<name>.data`` beside it.

    Args:
        model: an ``onnx.ModelProto``.
        path: the file, replaced where it exists.

    Raises:
        OutputError: it can't be written there.

    Example:
        >>> model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
        >>> save(model, Path("model.onnx"))  # doctest: +SKIP
    """
    path, data = Path(path), Path(path).name + ".data"
    with replacing(path) as partial:
        if weight_bytes(model) < LIMIT:
            partial.write_bytes(model.SerializeToString(deterministic=True))
        else:
            _save_external(model, partial, data)
            partial.with_name(data).replace(path.with_name(data))


def weight_bytes(model: Any) -> int:
    """Return about how many bytes the tensors of a model take."""
    return sum(_bytes(tensor) for tensor in tensors(model))


def _bytes(tensor: Any) -> int:
    return len(tensor.raw_data) or 8 * math.prod(tensor.dims)


def _save_external(model: Any, path: Path, data: str) -> None:
    # it moves the weights out of the message that it is given
    copy = type(model)()
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=True, location=data)


def _load_external(tensor: Any, path: Path) -> None:
    """Read the numbers of a tensor from a file in the model's folder, and from nowhere else."""
    about = {entry.key: entry.value for entry in tensor.external_data}
    where = f"the weights {tensor.name!r} of {path}"
    file = _inside(path.parent, about.get("location", ""), where)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{where} must be in an ordinary file, {file.name} is none")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            offset, length = _span(about, size, where)
            expected = _expected_bytes(tensor, length)
            if offset < 0 or not 0 <= length <= size - offset or expected != length:
                raise DataError(
                    f"{where} must be {expected:,} bytes, {file.name} has {size:,} and {length:,} of them at offset "
                    f"{offset:,} are asked for: the file is damaged, cut off or another one"
                )
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
    except OSError as error:
        raise DataError(f"{where} must be in {file.name}: {error.strerror}") from error
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _span(about: dict[str, str], size: int, where: str) -> tuple[int, int]:
    """Return the offset and length that a tensor asks for; without a length, all that follows."""
    try:
        offset = int(about.get("offset") or 0)
        return offset, int(about["length"]) if about.get("length") else size - offset
    except ValueError as error:
        raise DataError(f"{where} must have whole numbers as offset and length, got {about}") from error


def _inside(folder: Path, location: str, where: str) -> Path:
    """Return the file that a model names, if it is one in the model's own folder."""
    named = Path(location)
    refused = not location or named.is_absolute() or "\\" in location or ".." in named.parts or "\0" in location
    folder = folder.resolve()
    file = folder / named
    if refused or file.resolve() != file or not file.is_relative_to(folder):
        raise DataError(
            f"{where} must be in a file in its own folder, got the location {location!r}: it was not opened"
        )
    return file


def _expected_bytes(tensor: Any, length: int) -> int:
    """Return how many bytes a tensor takes by its shape; what is packed into less than a byte is believed."""
    try:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError):
        return -1
    if any(d < 0 for d in tensor.dims) or name == "STRING":
        return -1
    return length if name.endswith(("INT4", "INT2", "4E2M1")) else int(math.prod(tensor.dims)) * int(itemsize)
