"""Find the wing that knows a model, by the model's type or the name of its file, and load it on demand."""

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchnorm.errors import OptionError
from batchnorm.protocol import Model
from batchnorm.rooms import made, require

__all__ = [
    "adapt",
    "check_ending",
    "choose_backend",
    "framework_of",
    "gather",
    "joined",
    "layer_wing",
    "load",
    "processes",
    "save",
    "unwrapped",
]

# framework, class that its models have, the view of them; a Keras model on torch is a torch module too, and comes first
_WINGS = (
    ("keras", "Model", "batchnorm.keras.model:KerasModel"),
    ("torch", "nn.Module", "batchnorm.torch.model:TorchModel"),
    ("torch", "export.ExportedProgram", "batchnorm.torch.exported:ExportedModel"),
    ("onnx", "ModelProto", "batchnorm.onnx.model:OnnxModel"),
)
# the same for single layers; a Keras layer on torch is a torch module too, and comes first
_LAYERS = (
    ("keras", "layers.Layer"),
    ("flax", "linen.Module"),
    ("flax", "nnx.Module"),
    ("onnx", "ModelProto"),
    ("onnx", "NodeProto"),
    ("torch", "nn.Module"),
)
# how files end, the room that reads them, the extra that it needs
_READERS = {
    ".onnx": ("batchnorm.onnx.files", "onnx"),
    ".keras": ("batchnorm.keras.files", "keras"),
    ".pt2": ("batchnorm.torch.files", "torch"),
}


_ENDINGS = {"keras": (".keras",), "onnx": (".onnx",), "torch": (".pt2", ".safetensors", ".pt")}


def save(model: Any, path: Path, example: Any) -> None:
    """Write a model in the format that the ending of the file names, whole or not at all.

    Args:
        model: of any framework.
        path: ``.onnx`` and ``.keras`` for models of theirs; ``.pt2``, ``.safetensors`` or ``.pt`` for torch.
        example: what a torch module is exported with.

    Raises:
        OptionError: a format that the model can't be written in.
        OutputError: a place that can't be written to.
    """
    check_ending(model, path)
    module = import_module(f"batchnorm.{framework_of(model)}.files")
    module.save(model, path, *([example] if framework_of(model) == "torch" else []))


def check_ending(model: Any, path: Path) -> None:
    """Refuse a file whose ending names a format that a model can't be written in.

    Raises:
        OptionError: such an ending.
    """
    endings = _ENDINGS[framework_of(model)]
    if path.suffix not in endings:
        raise OptionError(
            f"a model of {framework_of(model)} is written to a file that ends in {' or '.join(endings)}, got {path}"
        )


def framework_of(model: Any) -> str:
    """Return the name of the framework that a model is of, as ``"torch"``."""
    return next(framework for framework, base, _ in _WINGS if _is(model, framework, base))


def _is(model: Any, framework: str, base: str) -> bool:
    known: Any = sys.modules.get(framework)
    for part in base.split("."):
        known = getattr(known, part, None)
    return known is not None and isinstance(model, known)


def adapt(model: Any) -> Model:
    """Return the `Model` view of a network.

    Only frameworks that are loaded already are asked: who holds a torch module has imported torch.

    Raises:
        OptionError: no wing knows the type of ``model``.
    """
    for framework, base, room in _WINGS:
        if _is(model, framework, base):
            module, name = room.split(":")
            return getattr(import_module(module), name)(model)  # type: ignore[no-any-return]
    if isinstance(model, str | Path) and Path(model).suffix in _READERS:
        return adapt(load(str(model)))
    raise OptionError(
        "a model must be a torch.nn.Module, a torch.export.ExportedProgram, a keras.Model, an onnx.ModelProto or a file, "
        f"got {type(model).__module__}.{type(model).__name__}"
    )


def layer_wing(layer: Any) -> Any:
    """Return the module that translates layers of a framework.

    Args:
        layer: a layer, or a tuple of a layer and its numbers.

    Raises:
        OptionError: no wing knows its type.
    """
    first = layer[0] if isinstance(layer, tuple) and len(layer) == 2 else layer
    framework = next((name for name, base in _LAYERS if _is(first, name, base)), None)
    if framework is None and isinstance(first, Mapping) and first is not layer:
        # arguments of a constructor, and variables
        framework = "flax"
    if framework is None:
        raise OptionError(
            "a layer must be a torch module, a Keras layer, (module, variables) or an nnx module of Flax, or a node of ONNX in "
            f"its model, got {type(layer).__module__}.{type(layer).__name__}"
        )
    return require(f"batchnorm.{framework}.translating", framework)


def unwrapped(model: Any) -> Any:
    """Return the model inside of wrappers that compile it, or spread it over devices and processes."""
    if not _is(model, "torch", "nn.Module"):
        return model
    return import_module("batchnorm.torch.statistics").unwrapped(model)


def gather(part: Any) -> list[Any]:
    """Return the parts of all processes of a distributed job, in the order of their ranks; alone, ``[part]``.

    Raises:
        DistributedError: another process is missing.
    """
    if "torch.distributed" not in sys.modules:
        return [part]
    return list(import_module("batchnorm.torch.collectives").gather_objects(part))


def processes() -> int:
    """Return how many processes the distributed job has that this one is in; alone, 1."""
    distributed: Any = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return int(distributed.get_world_size())


def joined() -> AbstractContextManager[tuple[int, int]]:
    """Join the job that the environment describes, as ``torchrun`` sets it; gives rank and number of processes.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    return require("batchnorm.torch.collectives", "torch").joined()  # type: ignore[no-any-return]


def load(spec: str, weights: Path | None = None) -> Any:
    """Return the model that a file holds, or that ``package.module:factory`` makes; nothing from a file is executed.

    Args:
        spec: a ``.onnx``, ``.keras`` or ``.pt2`` file, or ``package.module:factory``.
        weights: tensors for the model that a factory makes, ``.safetensors`` or ``.pt``.

    Raises:
        OptionError: no such factory, or a name that is neither.
        DataError: a file that can't be read.
        MissingDependencyError: the framework of the file is not installed.
    """
    reader = _READERS.get(Path(spec).suffix)
    if reader is None:
        model = made(spec)
        if not _is(model, "keras", "Model"):
            return require("batchnorm.torch.loading", "torch").checked(spec, model, weights)
    if weights is not None:
        raise OptionError(f"weights are given for a torch module of package.module:factory, {spec} holds its own")
    if reader is None:
        return model
    if reader[1] == "keras":
        choose_backend()
    return require(*reader).load(Path(spec))


def choose_backend() -> None:
    """Let Keras run on a backend that is installed, where nobody has chosen one: its own choice is TensorFlow."""
    if "keras" not in sys.modules and find_spec("tensorflow") is None:
        installed = next((name for name in ("torch", "jax") if find_spec(name) is not None), "tensorflow")
        os.environ.setdefault("KERAS_BACKEND", installed)
