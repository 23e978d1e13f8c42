"""Read and write ``.keras`` files; nothing that a file brings along is executed."""

from pathlib import Path
from typing import Any

import keras

from batchnorm.errors import DataError, OptionError
from batchnorm.files import replacing
from batchnorm.keras.internals import quietly, safely, told
from batchnorm.keras.layers import ScaleShift as ScaleShift

__all__ = ["load", "save"]


def load(path: Path) -> Any:
    """Return the model that a ``.keras`` file holds, not compiled.

    Raises:
        DataError: no such file, one that is cut off or holds something else, or one that holds code.
    """
    if path.suffix != ".keras":
        raise DataError(f"a Keras model is read from a .keras file, got {path.name}: save it with model.save()")
    if not path.is_file():
        raise DataError(f"{path} must be a file that model.save() has written, there is none")
    try:
        with safely(), quietly():
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise DataError(f"{path} must hold a whole Keras model: {_why(error)}") from error
    if not isinstance(model, keras.Model):
        raise DataError(f"{path} must hold a keras.Model, it holds a {type(model).__name__}")
    return model


def _why(error: Exception) -> str:
    text = str(error)
    if "lambda" in text.lower() or "unsafe" in text.lower():
        return "it holds Python code (a Lambda layer), which is not executed; use layers and keras.ops instead"
    if "Could not locate" in text:
        return f"{text.split('. ')[0]}; import the module that registers it first"
    return f"it may be damaged, cut off or something else ({type(error).__name__}: {told(error)})"


def save(model: Any, path: Path) -> None:
    """Write a model as a ``.keras`` file, whole or not at all.

    Raises:
        OptionError: another ending.
        OutputError: a place that can't be written to.
    """
    if path.suffix != ".keras":
        raise OptionError(f"a Keras model is written to a .keras file, got {path.name}")
    with replacing(path) as partial, quietly():
        keras.saving.save_model(model, partial)
