"""Synchronize the batch normalization of a whole model over the processes that train it."""

import warnings
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormWarning, ShapeError
from batchnorm.torch.collectives import Group
from batchnorm.torch.evaluation import call, copied, untraced
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.surgery import convert, named_layers

__all__ = ["sync", "unsync"]


class BatchNormAny(BatchNorm, _BatchNorm):
    """What ``torch.nn.SyncBatchNorm`` becomes where nothing tells the dimension of its input: any will do."""

    def _check_input_dim(self, x: Any) -> None:
        if x.ndim < 2:
            raise ShapeError(f"expected at least 2D input (got {x.ndim}D input)")


_BY_RANK: dict[int, type[BatchNorm]] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
_AFTER: dict[type[nn.Module], type[BatchNorm]] = {
    nn.Conv1d: BatchNorm1d,
    nn.Conv2d: BatchNorm2d,
    nn.Conv3d: BatchNorm3d,
    nn.ConvTranspose1d: BatchNorm1d,
    nn.ConvTranspose2d: BatchNorm2d,
    nn.ConvTranspose3d: BatchNorm3d,
}


def sync(model: nn.Module, process_group: Any = None, *, example: Any = None) -> nn.Module:
    """Make every batch normalization layer of a model take its statistics from the batches of all ranks, in place.

    ::

        training:    μ = Σ_r n_r·μ_r / N        σ² = Σ_r n_r·(σ²_r + (μ_r - μ)²) / N        N = Σ_r n_r

    for the ``n_r`` values a channel of rank ``r``, which may differ and may be none. The gradients pass through the statistics
    to all ranks; those of γ and β are each rank's share of the sum, which DistributedDataParallel averages. The running
    statistics are those of the whole batch, the same on all ranks. Evaluation asks nobody. Each layer costs one collective in
    the forward, 2C + 1 numbers from each rank, and one in the backward, 2C numbers.

    Layers of torch's own become ours, ``torch.nn.SyncBatchNorm`` too; that does not know how many axes its input has, which is
    seen when the example runs, or by a convolution right before it in a ``Sequential``; else it goes on taking any number.
    The modules stay the same objects, as with `convert`.

    Args:
        model: any module, also a single layer; before DistributedDataParallel or after.
        process_group: ``None`` for the default group, which may be initialized later; a ``ProcessGroup``; or a ``DeviceMesh``
            of one dimension. A ``torch.nn.SyncBatchNorm`` with a group of its own keeps that where ``None`` is given.
        example: an input of the model: a tensor, a tuple of positional or a dict of named arguments.

    Returns:
        The model itself.

    Raises:
        OptionError: something that is no group, or a mesh of several dimensions.
        DistributedError: a group that this process is no member of; and later, in training: no group, ranks that call
            different layers, or a rank that died or did not come.

    Example:
        >>> from torch import nn
        >>> sync(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))[1].options.process_group
        'default'

    Reference:
        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979. Peng et al.:
        MegDet, 2018 (arXiv:1711.07240), section 3.3, cross-GPU batch normalization.
    """
    group = Group.read("default" if process_group is None else process_group)
    kept = {layer: Group.read(layer.process_group) for _, layer in _torchs(model) if layer.process_group is not None}
    convert(_take_over(model, example))
    for _, layer in named_layers(model):
        layer.configure({"process_group": kept.get(layer, group) if process_group is None else group})
    return model


def unsync(model: nn.Module, *, example: Any = None) -> nn.Module:
    """Make every layer take its statistics from the batch of its own process again, in place; the reverse of `sync`.

    ``torch.nn.SyncBatchNorm`` becomes a layer of ours too. `revert` then gives torch's own layers.

    Args:
        model: any module, also a single layer.
        example: an input of the model, as in `sync`.

    Returns:
        The model itself.

    Example:
        >>> from torch import nn
        >>> unsync(sync(nn.BatchNorm2d(3)))
        BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    _take_over(model, example)
    for _, layer in named_layers(model):
        layer.configure({"process_group": None})
    return model


def _torchs(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]


def _take_over(model: nn.Module, example: Any) -> nn.Module:
    """Make layers of ours of torch's synchronized ones, and give those of unknown dimension theirs, if it is known now."""
    unknown: dict[Any, str] = {
        m: name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm | BatchNormAny)
    }
    classes = _by_neighbours(model) | _by_example(model, list(unknown), example) if unknown else {}
    for module, name in unknown.items():
        if type(module) in (nn.SyncBatchNorm, BatchNormAny):
            module.__dict__.pop("process_group", None)
            module.__class__ = classes.get(module, BatchNormAny)
            module.configure({})
        else:
            warnings.warn(
                f"layer {name or 'itself'!r} is a {type(module).__name__}, with a forward of its own: it was left as it is",
                BatchNormWarning,
                stacklevel=3,
            )
    return model


def _by_neighbours(model: nn.Module) -> dict[nn.Module, type[BatchNorm]]:
    """Return the classes of layers that are fed by a convolution, which is certain inside of a ``Sequential`` only."""
    known: dict[nn.Module, type[BatchNorm]] = {}
    for parent in model.modules():
        children = list(parent.children()) if type(parent) is nn.Sequential else []
        for before, layer in pairwise(children):
            if type(before) in _AFTER:
                known[layer] = _AFTER[type(before)]
    return known


def _by_example(model: nn.Module, layers: list[nn.Module], example: Any) -> dict[nn.Module, type[BatchNorm]]:
    """Return the classes of layers whose inputs had one number of axes while the example ran."""
    if example is None:
        return {}
    seen: dict[nn.Module, set[Any]] = {layer: set() for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen[layer].add(_BY_RANK.get(args[0].ndim)))
        for layer in layers
    ]
    try:
        with untraced(model):
            call(model, copied(example))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: kinds.pop() for layer, kinds in seen.items() if len(kinds) == 1 and None not in kinds}
