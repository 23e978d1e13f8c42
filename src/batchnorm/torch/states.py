"""How the normalization of a torch model stands and is trained, for `check`; and setting it right, in place."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from batchnorm.errors import OptionError
from batchnorm.states import BatchSizes, Mend, NormState, Optimization
from batchnorm.torch.batches import samples_of
from batchnorm.torch.freezing import freeze
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.statistics import check_values, statistics_modules
from batchnorm.torch.surgery import convert

__all__ = ["batch_sizes", "mend", "optimization", "spare", "states"]


def states(model: nn.Module) -> list[NormState]:
    """List the batch normalization layers, and everything else that keeps a running mean and variance, each once.

    Raises:
        OptionError: a layer that does not know its size yet, or holds no values.
    """
    found = dict(statistics_modules(model))
    for name, module in found.items():
        check_values(name, module)
    holders: dict[int, list[str]] = {}
    for name, module in found.items():
        mean = _running(module)[0]
        if mean is not None:
            holders.setdefault(id(mean), []).append(name)
    return [_state(name, module, holders) for name, module in found.items()]


def _running(module: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if isinstance(module, BatchNorm):
        return module.running()
    mean, var, batches = (module._buffers.get(key) for key in ("running_mean", "running_var", "num_batches_tracked"))
    return mean, var, batches


def _state(name: str, module: nn.Module, holders: dict[int, list[str]]) -> NormState:
    mean, var, batches = _running(module)
    # those of a frozen layer may be buffers
    gamma, beta = (getattr(module, key, None) for key in ("weight", "bias"))
    learned = [p for p in (gamma, beta) if isinstance(p, nn.Parameter)]
    lasting = bool(getattr(module, "frozen_statistics", False)) or not isinstance(module, _BatchNorm)
    options = getattr(module, "options", None) if isinstance(module, BatchNorm) else None
    momentum = getattr(module, "momentum", None)
    return NormState(
        name,
        type(module).__name__,
        _array(mean),
        _array(var),
        _array(gamma),
        _array(beta),
        float(getattr(module, "eps", 1e-5)),
        decay=1.0 - momentum if isinstance(momentum, int | float) else None,
        updates=None if batches is None else int(batches),
        dtype=str((var if var is not None else torch.empty(0)).dtype).removeprefix("torch."),
        by_batch=_normalizes_by_batch(module),
        training=module.training and not lasting,
        moves=mean is not None and not lasting,
        trainable=any(p.requires_grad for p in learned) if learned else None,
        frozen=lasting,
        debiased=options is not None and options.debias,
        synchronized=isinstance(module, nn.SyncBatchNorm)
        or (options is not None and options.process_group is not None),
        ghost=None if options is None else options.virtual_batch_size,
        shared=() if mean is None else tuple(other for other in holders[id(mean)] if other != name),
    )


def _normalizes_by_batch(module: nn.Module) -> bool:
    if isinstance(module, BatchNorm):
        return module.normalizes_by_batch()
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _array(v: Any) -> np.ndarray | None:
    return np.asarray(v.detach().cpu().double()) if isinstance(v, Tensor) else None


# -- how it is trained ---------------------------------------------------------------------------------------------------


def batch_sizes(loader: Any) -> BatchSizes:
    """Return the sizes of the batches of a ``DataLoader`` or of a list of batches; no sample is read.

    Raises:
        OptionError: anything else.
    """
    if isinstance(loader, DataLoader):
        return _of_loader(loader)
    if hasattr(loader, "__len__") and hasattr(loader, "__getitem__") and len(loader):
        sizes = samples_of(loader[0]), samples_of(loader[len(loader) - 1])
        return BatchSizes(*sizes, samples=sizes[0] * (len(loader) - 1) + sizes[1])
    raise OptionError(
        f"loader must be a DataLoader, or a list of batches, that tells how large its batches are, got a "
        f"{type(loader).__name__}"
    )


def _of_loader(loader: Any) -> BatchSizes:
    try:
        if loader.batch_size is None and loader.batch_sampler is not None:
            sizes = [len(indices) for indices in loader.batch_sampler]
            return BatchSizes(max(sizes), sizes[-1], sum(sizes))
        samples = None if loader.sampler is None else len(loader.sampler)
    except TypeError:
        samples = None
    if loader.batch_size is None:
        raise OptionError("loader must tell the size of its batches, it has neither batch_size nor batch_sampler")
    if samples is None:
        return BatchSizes(loader.batch_size)
    rest = 0 if loader.drop_last else samples % loader.batch_size
    return BatchSizes(loader.batch_size, rest or min(loader.batch_size, samples), samples)


def _groups(optimizer: Any) -> Any:
    """Return the optimizer inside of wrappers that share out its work."""
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    return optimizer


def optimization(model: nn.Module, optimizer: Any) -> Optimization:
    """Return the weight decay of γ and β, and how many steps an optimizer has made.

    Raises:
        OptionError: no optimizer, or one of other parameters.
    """
    optimizer = _groups(optimizer)
    decays = {p: float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for p in group["params"]}
    if not any(p in decays for p in model.parameters()):
        raise OptionError(
            "optimizer must hold parameters of the model, it holds none of them: give the one that trains it"
        )
    decayed = {
        name: max(decays.get(p, 0.0) for p in own)
        for name, module in statistics_modules(model)
        if (own := [p for p in module.parameters(recurse=False) if p.requires_grad])
    }
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return Optimization({name: decay for name, decay in decayed.items() if decay}, max(steps, default=None))


def spare(model: nn.Module, optimizer: Any) -> int:
    """Move γ and β that are decayed into a group without weight decay; return how many."""
    optimizer = _groups(optimizer)
    vectors = {p for _, module in statistics_modules(model) for p in module.parameters(recurse=False)}
    moved = 0
    for group in list(optimizer.param_groups):
        hit = [p for p in group["params"] if p in vectors] if group.get("weight_decay", 0.0) else []
        if hit:
            group["params"] = [p for p in group["params"] if p not in vectors]
            optimizer.param_groups.append({**group, "params": hit, "weight_decay": 0.0})
            moved += len(hit)
    return moved


# -- setting it right ----------------------------------------------------------------------------------------------------


def mend(model: nn.Module, mends: Mapping[str, Mend]) -> None:
    """Set layers right, in place, all or none.

    Raises:
        OptionError: a layer that is no batch normalization of torch's or of ours.
    """
    modules = dict(statistics_modules(model))
    for name, what in mends.items():
        _check(name, modules[name], what)
    for name, what in mends.items():
        _mend(modules[name], what)


def _check(name: str, module: nn.Module, what: Mend) -> None:
    becomes_ours = what.freeze or what.count_once or what.wide
    stock = isinstance(module, BatchNorm) or type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not isinstance(module, _BatchNorm) or (becomes_ours and not stock):
        raise OptionError(
            f"layer {name!r} must be a batch normalization layer of torch's, got a {type(module).__name__}"
        )


def _mend(module: Any, what: Mend) -> None:
    if what.training is not None:
        module.train(what.training)
    if what.decay is not None:
        module.momentum = 1.0 - what.decay
    if what.eps is not None:
        module.eps = what.eps
    if what.wide:
        convert(module, wide_statistics=True)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.float()
    elif what.count_once:
        convert(module)
    if what.freeze:
        freeze(module, affine=False)
