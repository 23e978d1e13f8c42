"""Torch models as files: exported programs are read, programs and tensors are written."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from batchnorm.errors import DataError, OptionError
from batchnorm.files import replacing
from batchnorm.torch.archives import checked_archive
from batchnorm.torch.evaluation import positional_and_named

__all__ = ["load", "save"]


def load(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file of ``torch.export.save`` that holds nothing but a program and tensors.

    Raises:
        DataError: a file that can't be read, or one that holds compiled code or objects to be unpickled.
    """
    archive = checked_archive(path)
    try:
        with _silence():
            return torch.export.load(archive)
    except Exception as error:
        raise DataError(f"{path} must be a program saved by torch.export.save, it can't be read: {error}") from error


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
        with _silence():
            return torch.export.export(model, args, kwargs)
    except Exception as error:
        raise OptionError(
            f"the model must be one that torch.export can export (write .safetensors instead), but it failed: {error}"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back what torch prints and logs beside an error: whole graphs, tracebacks."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled)
