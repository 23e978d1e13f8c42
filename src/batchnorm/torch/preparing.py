"""Make a model ready to be rewritten where its modules have a ``forward`` of their own."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.torch.events import Call, Recording
from batchnorm.torch.graphs import own_buffers, structural_copy, trace
from batchnorm.torch.recording import record

__all__ = ["BATCH_NORMS", "Prepared", "drop_biases", "is_stock", "prepare", "replace_module", "replace_modules"]

BATCH_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
)


@dataclass(slots=True)
class Prepared:
    """A model and what was done to it; its parameters and buffers are those of the original.

    Args:
        model: the original, or a copy that shares its tensors.
        recording: of its run.
        traced: modules that became graphs, by dotted name.
        biases: dotted names of modules that were given a bias of zeros.
        outputs: what the original returned, if it was watched with all its hooks.
    """

    model: nn.Module
    recording: Recording
    traced: dict[str, fx.GraphModule] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    outputs: list[torch.Tensor] | None = None


def is_stock(module: nn.Module) -> bool:
    """Whether a module runs the forward of a class of torch's, or of a layer of ours."""
    return str(type(module).forward.__module__).startswith(("torch.nn.", "torch.ao.nn.", "batchnorm.torch."))


def prepare(model: nn.Module, example: Any) -> Prepared:
    """Watch a model, and make a copy ready where normalization is called as a function, or a layer may need a bias.

    Modules that call ``batch_norm`` in a forward of their own become graphs, where they can be traced. Linear layers with a
    forward of their own and no bias get zeros for one, where their forward then reads it.
    """
    recording = record(model, example)
    outputs = recording.outputs
    functional = sorted({call.module for call in recording.calls if _is_functional(model, call)}, key=len, reverse=True)
    biasless = sorted({path for call in recording.calls if (path := _without_bias(model, call)) is not None})
    if not functional and not biasless:
        return Prepared(model, recording, outputs=outputs)
    twin = structural_copy(model)
    for path in biasless:
        owner: Any = twin.get_submodule(path)
        owner.register_parameter("bias", nn.Parameter(torch.zeros_like(_outputs_of(owner)), owner.weight.requires_grad))
    traced = {}
    # a forward that is traced may write to buffers
    scratch = structural_copy(twin, own_buffers)
    for path in functional:
        graph = trace(scratch.get_submodule(path))
        if graph is not None:
            _share_buffers(graph, twin.get_submodule(path))
            traced[path] = graph
            twin = replace_module(twin, path, graph)
            scratch = replace_module(scratch, path, graph)
    try:
        recording = record(twin, example)
    except Exception:
        return Prepared(model, recording, outputs=outputs)
    read = {slot.parameter for call in recording.calls for slot in call.reads}
    useless = [path for path in biasless if f"{path}.bias".strip(".") not in read]
    drop_biases(twin, useless)
    return Prepared(twin, recording, traced, tuple(set(biasless) - set(useless)), outputs)


def _share_buffers(graph: fx.GraphModule, module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        owner, _, attribute = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            holder = graph.get_submodule(owner)
            if attribute in holder._buffers:
                holder._buffers[attribute] = buffer


def drop_biases(model: nn.Module, paths: Any) -> None:
    """Take biases away that nothing was folded into."""
    for path in paths:
        model.get_submodule(path).register_parameter("bias", None)


def _is_functional(model: nn.Module, call: Call) -> bool:
    if call.name not in BATCH_NORMS or call.node is not None:
        return False
    module = model.get_submodule(call.module)
    return not (isinstance(module, _BatchNorm | _InstanceNorm) and is_stock(module))


def _without_bias(model: nn.Module, call: Call) -> str | None:
    """Return the module of a linear call that has a forward of its own, and a bias of ``None``."""
    if call.name not in ("convolution", "mm", "linear") or call.node is not None:
        return None
    module = model.get_submodule(call.module)
    candidate = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not is_stock(module)
    return call.module if candidate and module._parameters.get("bias", 0) is None else None


def _outputs_of(module: Any) -> torch.Tensor:
    """Return a slice of the weight with one number for each output."""
    weight: torch.Tensor = module.weight.detach()
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.flatten()[:1].expand(module.out_channels)
    return weight.flatten(1)[:, 0]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put a module in the place of another one, wherever it stands."""
    return replace_modules(model, {model.get_submodule(path): new})


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, wherever these stand, and return the model."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
    return new.get(model, model)
