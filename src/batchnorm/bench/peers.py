"""What else folds normalization, each called as its documentation says: tools for torch modules, and tools for ONNX files."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import batchnorm
from batchnorm.fold import FoldResult
from batchnorm.torch.evaluation import call, tensors_of

__all__ = ["FILE_TOOLS", "MODULE_TOOLS", "PACKAGES", "FileTool", "Flat", "ModuleTool", "Refitted", "tensors_in"]

ModuleTool = Callable[[nn.Module, Any], tuple[nn.Module, int]]
"""Takes a model and an example, returns the folded model and how many norms became a plain scale and shift."""
FileTool = Callable[[Path, Path], int]
"""Reads a file and writes another one, returns how many norms became a plain scale and shift."""


class Flat(nn.Module):
    """A model with tensors for its arguments and a tuple of tensors for its outputs, as tracing and exporting want it."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        leaves, self.spec = tree_flatten(example)
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the output."""
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf for leaf in self.rest]
        return tuple(tensors_of(call(self.model, tree_unflatten(leaves, self.spec))))


# -- tools that are given a module ---------------------------------------------------------------------------------


def _ours(model: nn.Module, example: Any) -> tuple[nn.Module, int]:
    result = batchnorm.fold(model, example)
    return result.model, _plain(result)


def _plain(result: FoldResult) -> int:
    return sum(kept.became != "unchanged" for kept in result.kept)


def _fx_fuse(model: nn.Module, example: Any) -> tuple[nn.Module, int]:
    return import_module("torch.fx.experimental.optimization").fuse(model), 0


def _fuse_fx(model: nn.Module, example: Any) -> tuple[nn.Module, int]:
    return import_module("torch.ao.quantization.quantize_fx").fuse_fx(model), 0


def _freeze(model: nn.Module, example: Any) -> tuple[nn.Module, int]:
    flat = Flat(model, example).eval()
    traced = torch.jit.trace(flat, tuple(tensors_in(example)), check_trace=False)  # type: ignore[no-untyped-call]
    return Refitted(torch.jit.freeze(traced)), 0


class Refitted(nn.Module):
    """A flat program that is called as the model was."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the program returns."""
        return self.program(*tensors_in((args, kwargs)))


MODULE_TOOLS: dict[str, ModuleTool] = {
    "batchnorm.fold": _ours,
    "torch.fx fuse": _fx_fuse,
    "torch.ao fuse_fx": _fuse_fx,
    "torch.jit.trace, freeze": _freeze,
}

# -- tools that are given a file -----------------------------------------------------------------------------------


def _ours_on_a_file(file: Path, out: Path) -> int:
    result = batchnorm.fold(str(file), _inputs_beside(file))
    import_module("onnx").save(result.model, str(out))
    return _plain(result)


def _inputs_beside(file: Path) -> dict[str, Any] | None:
    """Return inputs that lie beside a model, in the order of those of the model."""
    stored = file.with_name("inputs.npz")
    if not stored.exists():
        return None
    model = import_module("onnx").load(str(file))
    held = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in held]
    with np.load(stored) as arrays:
        return dict(zip(names, (arrays[key] for key in arrays.files), strict=False))


def _onnxsim(file: Path, out: Path) -> int:
    onnx = import_module("onnx")
    simplified, _ = import_module("onnxsim").simplify(onnx.load(str(file)))
    onnx.save(simplified, str(out))
    return 0


def _onnxoptimizer(file: Path, out: Path) -> int:
    onnx = import_module("onnx")
    onnx.save(import_module("onnxoptimizer").optimize(onnx.load(str(file))), str(out))
    return 0


def _onnxslim(file: Path, out: Path) -> int:
    onnx = import_module("onnx")
    onnx.save(import_module("onnxslim").slim(onnx.load(str(file))), str(out))
    return 0


def _onnxscript(file: Path, out: Path) -> int:
    onnx = import_module("onnx")
    optimized = import_module("onnxscript.optimizer").optimize(onnx.load(str(file)))
    onnx.save(import_module("onnxscript.rewriter").rewrite(optimized), str(out))
    return 0


def _onnxruntime(file: Path, out: Path) -> int:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return 0


FILE_TOOLS: dict[str, FileTool] = {
    "batchnorm.fold, ONNX": _ours_on_a_file,
    "onnxsim": _onnxsim,
    "onnxoptimizer": _onnxoptimizer,
    "onnxslim": _onnxslim,
    "onnxscript": _onnxscript,
    "onnxruntime, basic": _onnxruntime,
}
PACKAGES: dict[str, tuple[str, ...]] = {
    "batchnorm.fold, ONNX": ("onnx", "onnxruntime"),
    "onnxsim": ("onnxsim",),
    "onnxoptimizer": ("onnxoptimizer",),
    "onnxslim": ("onnxslim",),
    "onnxscript": ("onnxscript.optimizer", "onnxscript.rewriter"),
    "onnxruntime, basic": ("onnxruntime",),
}
"""What the tools for files import."""


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of nested containers."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
