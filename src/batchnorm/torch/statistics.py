"""The running statistics that a torch model stores: which there are, and writing new ones."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from batchnorm.errors import OptionError
from batchnorm.protocol import Pair, Statistics
from batchnorm.torch.layers import BatchNorm

__all__ = ["Buffers", "check_values", "discovered", "statistics_modules", "stored", "unwrapped", "write"]


class Buffers(NamedTuple):
    """Where statistics are: running mean, running variance and number of batches, and the module that holds them."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    module: nn.Module


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers that compile it, or spread it over devices and processes."""
    while True:
        # a compiled module; one in DataParallel or DistributedDataParallel, which would talk to other ranks
        inner: Any = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def stored(model: nn.Module) -> list[Statistics]:
    """List the statistics of every batch normalization layer, and of every module that keeps a running mean and variance.

    Raises:
        OptionError: a layer that does not know its size yet.
    """
    found: dict[int, Statistics] = {}
    for name, module in statistics_modules(model):
        statistics = _statistics(name, module, model.training)
        # two layers may share their statistics
        key = id(module) if statistics.key is None else id(statistics.key.mean)
        found.setdefault(key, statistics)
    return list(found.values())


def statistics_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List batch normalization layers and modules that keep a running mean and variance, with their names."""
    return [
        (name or type(module).__name__, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or _keeps_statistics(module)
    ]


def discovered(model: nn.Module, mean: Tensor, var: Tensor, eps: float) -> Statistics:
    """Return statistics that a program hands to a function, which are buffers of the model under any name."""
    name = next(name for name, buffer in model.named_buffers() if buffer is mean).rpartition(".")[0]
    buffers = Buffers(mean, var, None, model.get_submodule(name))
    return Statistics(name or type(model).__name__, _array(mean), _array(var), eps, unbiased=True, key=buffers)


def write(statistics: Mapping[Statistics, Pair], batches: int) -> None:
    """Copy new statistics into the buffers, all or none.

    Raises:
        OptionError: a dtype that can't hold them.
    """
    pairs = [
        (name.name, buffer, torch.as_tensor(new).to(buffer.device, buffer.dtype))
        for name, pair in statistics.items()
        for buffer, new in zip(name.key[:2], pair, strict=True)
    ]
    for name, buffer, new in pairs:
        if not bool(torch.isfinite(new).all()):
            raise OptionError(
                f"layer {name!r} stores its statistics in {buffer.dtype}, which can't hold the new ones: keep them in "
                "float32 (convert(model, wide_statistics=True) before the model is cast)"
            )
    with torch.no_grad():
        for _, buffer, new in pairs:
            buffer.copy_(new)
        for one in statistics:
            if one.key.batches is not None:
                # training goes on from here, not from the start
                one.key.batches.clamp_(min=batches)


def _keeps_statistics(module: nn.Module) -> bool:
    mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    return mean is not None and var is not None and not isinstance(module, _InstanceNorm)


def _statistics(name: str, module: nn.Module, training: bool) -> Statistics:
    check_values(name, module)
    if isinstance(module, BatchNorm):
        mean, var, batches = module.running()
        unbiased = module.options.unbiased
    else:
        mean, var, batches = (
            module._buffers.get(key) for key in ("running_mean", "running_var", "num_batches_tracked")
        )
        unbiased = True
    if mean is None or var is None:
        return Statistics(
            name, None, None, 0.0, unbiased, "it keeps no running statistics and always uses those of the batch"
        )
    buffers = Buffers(mean, var, batches, module)
    eps = float(getattr(module, "eps", 1e-5))
    return Statistics(name, _array(mean), _array(var), eps, unbiased, _why_fixed(module, training), buffers)


def check_values(name: str, module: nn.Module) -> None:
    """Make sure that a layer holds values.

    Raises:
        OptionError: it does not know its size yet, or is on the meta device.
    """
    if any(is_lazy(tensor) for tensor in _own(module)):
        raise OptionError(f"layer {name!r} must know its size: run the model once on an example first")
    if any(tensor.is_meta for tensor in _own(module)):
        raise OptionError(f"layer {name!r} must hold values, its statistics are on the meta device")


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _why_fixed(module: nn.Module, training: bool) -> str:
    if getattr(module, "frozen_statistics", False):
        return "it is frozen: unfreeze(model) first if it shall move"
    if not isinstance(module, _BatchNorm) and module._buffers.get("weight") is not None:
        return "it is frozen: its γ is a constant"
    if training and not module.training:
        return "it is frozen: it is in evaluation while the model is in training"
    return ""


def _array(v: Tensor) -> np.ndarray:
    return np.asarray(v.detach().cpu().double())
