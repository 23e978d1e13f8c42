"""Swap the batch normalization of a whole model, in place: torch's layers for ours, and back."""

import copy
import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormWarning, OptionError
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["as_torchs", "convert", "named_layers", "revert"]

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
# what a layer of ours holds and torch's does not
_STATE = (
    "options",
    "frozen_statistics",
    "_frozen_affine",
    "_collected",
    "_domain",
    "_warned",
    "_skipped",
    "_seen",
    "_seen_again",
    "_agreement",
    "_plain",
    "_followers",
)


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Make every ``torch.nn.BatchNorm`` layer of a model one of ours, in place, as `batchnorm.torch.convert` does.

    Raises:
        OptionError: an option that a layer can't have; then no layer was changed.
    """
    found: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)
    ]
    for name, module in found:
        if isinstance(module, BatchNorm) or type(module) in _OURS:
            _check_options(name, module, options)
    for name, module in found:
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
        if isinstance(module, BatchNorm):
            module.configure(options)
        else:
            warnings.warn(
                f"layer {name or 'itself'!r} is a {type(module).__name__}, with a forward of its own: it was left as it is"
                + (" (sync or unsync makes it ours)" if type(module) is nn.SyncBatchNorm else ""),
                BatchNormWarning,
                # of whoever calls a verb
                stacklevel=3,
            )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every layer of ours ``torch.nn.BatchNorm`` again, in place; the reverse of `convert`.

    Options that matter in training alone are dropped.

    Args:
        model: any module, also a single layer.

    Returns:
        The model itself.

    Raises:
        OptionError: a layer does in evaluation what torch's can't (``activation``, ``example_weight``, ``domains``), or is
            frozen; then no layer was changed.

    Example:
        >>> from torch import nn
        >>> revert(convert(nn.BatchNorm2d(3)))
        BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    layers = list(named_layers(model))
    for name, layer in layers:
        _check_reversible(name, layer)
    for _, layer in layers:
        _revert(layer)
    return model


def as_torchs(layer: BatchNorm) -> nn.Module:
    """Return a copy that is torch's own and shares parameters and statistics."""
    _check_reversible("", layer)
    twin = copy.copy(layer)
    # a shallow copy shares the dicts as well
    twin._buffers = dict(layer._buffers)
    _revert(twin)
    return twin


def named_layers(model: nn.Module) -> list[tuple[str, BatchNorm]]:
    """Return the layers of ours in a model, each once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm)]


def _check_options(name: str, module: Any, options: dict[str, Any]) -> None:
    trial = copy.copy(module)
    trial._buffers = dict(module._buffers)
    trial.__class__ = _OURS.get(type(module), type(module))
    try:
        trial.configure(options)
    except OptionError as error:
        raise OptionError(f"layer {name or 'itself'!r}, {type(module).__name__}: {error}") from None


def _check_reversible(name: str, layer: BatchNorm) -> None:
    changed = layer.options.changed()
    for option in ("activation", "example_weight", "domains"):
        if option in changed:
            raise OptionError(
                f"layer {name or 'itself'!r} has {option}={changed[option]!r}, which torch's layer can't do: "
                f"revert where every layer computes what torch's would"
            )
    if layer.options.process_group is not None or type(layer) not in _TORCHS:
        raise OptionError(
            f"layer {name or 'itself'!r} is {'' if type(layer) in _TORCHS else 'or was '}synchronized, torch's own layer would "
            "not be: unsync(model) first, with an example input if the layer was a torch.nn.SyncBatchNorm"
        )
    if layer.frozen_statistics:
        raise OptionError(f"layer {name or 'itself'!r} is frozen, torch's layer would thaw: unfreeze(model) first")
    if callable(layer.momentum):
        raise OptionError(f"layer {name or 'itself'!r} has a schedule of momenta: set its momentum to a number first")


def _revert(layer: BatchNorm) -> None:
    for name in _STATE:
        layer.__dict__.pop(name, None)
    layer.__class__ = _TORCHS[type(layer)]  # type: ignore[assignment]
