"""Torch models as files: exported programs are read, programs and tensors are written."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from batchnorm.errors import DataError, OptionError
from batchnorm.files import replacing
from batchnorm.torch.evaluation import positional_and_named

__all__ = ["load", "save"]

# what a program may call: operators of torch, and Python's arithmetic on sizes
_CALLS = re.compile(r"torch\.ops\.[\w.]+|_operator\.\w+|math\.\w+|torch\.(_?sym_\w+)|\w+::[\w.]+")
# what the size of an axis may be written with: symbols and arithmetic; sympy evaluates the text
_WORDS = (
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Mod|Max|Min|Abs|Eq|Ne|Le|Lt|Ge|Gt|And|Or|Not|Piecewise|FloorDiv|CleanDiv|"
    "CeilDiv|IntTrueDiv|PythonMod|ModularIndexing|ToFloat|TruncToInt|positive|negative|nonnegative|integer|real|zero|"
    "nonzero|True|False|oo|int_oo|evaluate"
)
_EXPRESSION = re.compile(rf"(?:(?:{_WORDS}|[suz]\w*\d+|\d+)\b|[\s+\-*/(),.<>=!&|~%'])*")


def load(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file of ``torch.export.save`` that holds nothing but a program and tensors.

    Raises:
        DataError: a file that can't be read, or one that holds compiled code or objects to be unpickled.
    """
    try:
        _check_archive(path)
        return torch.export.load(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} must be a program saved by torch.export.save, it can't be read: {error}") from error


def _check_archive(path: Path) -> None:
    """Refuse whatever torch would execute or unpickle into objects."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if (
                "/aotinductor/" in name
                or "/custom_obj" in name
                or "/opaque_obj" in name
                or name.endswith((".so", ".cpp"))
            ):
                raise DataError(f"{path} must hold a program and tensors, it holds {name}, which would be executed")
            if name.endswith(".json"):
                _check_json(path, json.loads(archive.read(name)))
            elif name.endswith(".pt"):
                _check_tensors(path, name, archive.read(name))


def _check_json(path: Path, document: Any) -> None:
    for key, value in _entries(document):
        allowed: Any = {"target": _CALLS, "expr_str": _EXPRESSION}.get(key)
        if key == "use_pickle" and value:
            raise DataError(f"{path} must hold tensors as plain numbers, some are pickled: save it again on a CPU")
        if allowed is not None and isinstance(value, str) and not allowed.fullmatch(value):
            raise DataError(f"{path} must call operators of torch only, got {value[:80]!r}")


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict):
        yield from document.items()
    for item in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _entries(item)


def _check_tensors(path: Path, name: str, data: bytes) -> None:
    try:
        torch.load(BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{path} must hold tensors in {name}, it holds something else: {error}") from error


def save(model: Any, path: Path, example: Any) -> None:
    """Write a model by the ending of the file: ``.pt2`` a program, ``.safetensors`` and ``.pt`` its tensors.

    Args:
        model: a module or an exported program.
        path: the file, which is written whole or not at all.
        example: what a module is exported with: an input, a tuple of inputs, or a dict of named ones.

    Raises:
        OptionError: a module that can't be exported.
        OutputError: the file can't be written.
    """
    program = _program(model, example) if path.suffix == ".pt2" else None
    tensors = (
        {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
        if program is None
        else {}
    )
    with replacing(path) as partial:
        if program is not None:
            torch.export.save(program, partial)
        elif path.suffix == ".pt":
            torch.save(tensors, partial)
        else:
            from safetensors.torch import save_file

            save_file(tensors, partial)


def _program(model: nn.Module | ExportedProgram, example: Any) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    args, kwargs = positional_and_named(example)
    try:
        return torch.export.export(model, args, kwargs)
    except Exception as error:
        raise OptionError(
            f"the model must be one that torch.export can export, but it failed: {error}: write .safetensors instead"
        ) from error
