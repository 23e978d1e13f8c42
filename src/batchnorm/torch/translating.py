"""A torch layer as one without a framework, and back."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import OptionError
from batchnorm.graph import Norm
from batchnorm.portable import Portable, complement
from batchnorm.torch.freezing import freeze
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.preparing import is_stock
from batchnorm.torch.replacements import tensor_like
from batchnorm.torch.statistics import check_values

__all__ = ["layer", "portable"]

_OURS: tuple[type[BatchNorm], ...] = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_PLAIN: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DIMS = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_OPTIONS = {
    "activation", "debias", "example_weight", "on_single", "renorm", "synchronized", "total_variance", "virtual_batch_size"
}  # fmt: skip
EXACT = 1e-9


def portable(module: Any) -> Portable:
    """Return what a layer stores and does.

    Raises:
        OptionError: no batch normalization, or one that computes something else.
    """
    name = type(module).__name__
    check_values(name, module)
    if not isinstance(module, _BatchNorm):
        return _frozen(module)
    if not is_stock(module):
        raise OptionError(f"a torch layer must be batch normalization alone, {name} has a forward of its own")
    vectors = (module.running_mean, module.running_var, module.weight, module.bias)
    if all(v is None for v in vectors):
        raise OptionError(
            f"a {name} with affine=False and track_running_stats=False holds no numbers: there is nothing to translate"
        )
    mean, variance, gamma, beta = (None if v is None else _array(v) for v in vectors)
    ours = module.options if isinstance(module, BatchNorm) else None
    batches, options = module.num_batches_tracked, _options(module)
    return Portable(
        f"torch {name}",
        Norm(
            "", mean, variance, gamma, beta, float(module.eps),
            decay=None if module.momentum is None or callable(module.momentum) else complement(module.momentum),
            unbiased=True if ours is None else ours.unbiased,
        ),
        _dtype(module.weight, module.bias, module.running_mean),
        _dtype(module.running_mean, module.weight),
        dims=next((dims for known, dims in _DIMS.items() if isinstance(module, known)), None),
        frozen=_is_frozen(module),
        updates=None if batches is None else int(batches),
        options=options,
    )  # fmt: skip


def _options(module: Any) -> dict[str, Any]:
    ours = isinstance(module, BatchNorm)
    options: dict[str, Any] = module.options.changed() if ours else {}
    # elsewhere the default is another one
    options["on_single"] = module.options.on_single if ours else "error"
    options.pop("unbiased", None)
    options.pop("wide_statistics", None)
    if options.get("process_group") is not None and options["process_group"].given is None:
        del options["process_group"]
        options["synchronized"] = True
    if isinstance(module, nn.SyncBatchNorm):
        group: Any = module.process_group
        options |= {"synchronized": True} if group is None else {"process_group": group}
    if callable(module.momentum):
        options["momentum"] = module.momentum
    if getattr(module, "frozen_statistics", False) and not _is_frozen(module):
        options["frozen_statistics"] = True
    return options


def _is_frozen(module: Any) -> bool:
    """Whether neither statistics nor γ and β move."""
    learned = any(p.requires_grad for p in module.parameters(recurse=False))
    return bool(getattr(module, "frozen_statistics", False)) and not learned


def _frozen(module: Any) -> Portable:
    """Return what a module does that keeps its numbers as constants, as in torchvision."""
    name = type(module).__name__
    names = ("running_mean", "running_var", "weight", "bias")
    vectors: list[Any] = [getattr(module, key, None) for key in names]
    eps = getattr(module, "eps", None)
    if not all(isinstance(v, Tensor) and v.ndim == 1 for v in vectors) or not isinstance(eps, float):
        raise OptionError(
            f"a torch layer must be batch normalization, or keep running_mean, running_var, weight, bias and eps, got a {name}"
        )
    mean, variance, gamma, beta = (_array(v) for v in vectors)
    norm = Norm("", mean, variance, gamma, beta, eps, unbiased=True)
    dims = next((n for n in (2, 3, 1, 0) if f"{max(n, 1)}d" in name), 2)
    _prove(module, norm, dims)
    held = _dtype(vectors[2]), _dtype(vectors[0])
    return Portable(f"torch {name}", norm, *held, dims=dims, frozen=True)


def _prove(module: Any, norm: Norm, dims: int) -> None:
    """Make sure that a forward of its own is a scale and shift by the statistics."""
    twin = copy.deepcopy(module).double().eval()
    x = torch.randn((4, len(norm.affine.scale)) + (2,) * dims, generator=torch.Generator().manual_seed(0)).double()
    scale, shift = (torch.as_tensor(v).reshape((-1,) + (1,) * dims) for v in (norm.affine.scale, norm.affine.shift))
    try:
        with torch.no_grad():
            difference = (twin(x) - (x * scale + shift)).abs().max()
    except Exception as error:
        raise OptionError(f"a {type(module).__name__} must run on an array of {dims + 2} axes: {error}") from error
    if not difference <= EXACT * (1 + shift.abs().max() + scale.abs().max()):
        raise OptionError(
            f"a {type(module).__name__} must be batch normalization alone, with its running statistics: it computes something "
            "else"
        )


def layer(given: Portable, *, plain: bool) -> nn.Module:
    """Return a new layer, on the CPU.

    Args:
        given: what it shall store and do.
        plain: of torch's own class, and not of ours.

    Raises:
        OptionError: torch has no such layer.
    """
    options = given.taken({"on_single"} if plain else _OPTIONS, "torch's own layer" if plain else "the torch layer")
    norm, dims = given.norm, given.rank("a torch layer") - 2
    if plain and norm.unbiased is False:
        given.notes.append(
            "torch.nn keeps the unbiased running variance, it kept the biased one; what is stored is carried as it is, what is "
            "added by training is larger by 1/n (plain=False keeps the convention)"
        )
    if plain:
        options = {}
    else:
        options |= {} if norm.unbiased is not False or norm.mean is None else {"unbiased": False}
        options |= {"wide_statistics": True} if _is_wider(given) else {}
        options |= {"process_group": "default"} if options.pop("synchronized", False) else {}
    affine, bias = norm.gamma is not None or norm.beta is not None, norm.beta is not None
    made: Any = (_PLAIN if plain else _OURS)[dims](
        given.channels, norm.eps, None if norm.decay is None else complement(norm.decay), affine, norm.mean is not None,
        dtype=getattr(torch, given.dtype), bias=bias, **options,
    )  # fmt: skip
    if bias and norm.gamma is None:
        given.notes.append("torch has no β without γ: the new layer has a γ of ones, which is trained")
    if _is_wider(given) and norm.mean is not None:
        for name in ("running_mean", "running_var"):
            made._buffers[name] = made._buffers[name].to(getattr(torch, given.statistics_dtype))
    _fill(made, norm, given.updates or 0)
    return _as_frozen(made, given, plain) if given.frozen else made


def _fill(made: Any, norm: Norm, updates: int) -> None:
    pairs = (
        (made.running_mean, norm.mean), (made.running_var, norm.variance), (made.weight, norm.gamma), (made.bias, norm.beta)
    )  # fmt: skip
    with torch.no_grad():
        for tensor, values in pairs:
            if tensor is not None and values is not None:
                tensor.copy_(tensor_like(values, tensor))
        if made.num_batches_tracked is not None:
            made.num_batches_tracked.fill_(updates)


def _as_frozen(made: nn.Module, given: Portable, plain: bool) -> nn.Module:
    if not plain:
        return freeze(made)
    given.notes.append("it is frozen, torch's own layer can't be: it is in evaluation, until someone calls .train()")
    return made.eval().requires_grad_(False)


def _is_wider(given: Portable) -> bool:
    return getattr(torch, given.statistics_dtype).itemsize > getattr(torch, given.dtype).itemsize  # type: ignore[no-any-return]


def _array(v: Tensor) -> np.ndarray:
    return np.asarray(v.detach().cpu().double())


def _dtype(*held: Tensor | None) -> str:
    return next(str(v.dtype) for v in held if v is not None).removeprefix("torch.")
