"""One layer in another framework."""

import warnings
from typing import Any

from batchnorm.errors import BatchNormWarning, OptionError
from batchnorm.models import layer_wing
from batchnorm.portable import Portable
from batchnorm.rooms import require

__all__ = ["translate"]

_TARGETS = {
    # the room, its function, and which options it takes
    "torch": ("torch", "layer", ("plain",)),
    "keras": ("keras", "layer", ("plain", "axis")),
    "flax": ("flax", "layer", ("axis",)),
    "nnx": ("flax", "nnx_layer", ("axis",)),
    "onnx": ("onnx", "layer", ()),
}


def translate(
    source: Any,
    to: str,
    *,
    plain: bool = False,
    unbiased: bool | None = None,
    axis: int | None = None,
    dims: int | None = None,
) -> Any:
    """Return a batch normalization layer in another framework, with its numbers and its conventions.

    ::

        running = decay · running + (1 - decay) · batch        decay = momentum of Keras, Flax, ONNX = 1 - momentum of torch
        variance of a batch of n values:  m2 / (n - 1) in torch,  m2 / n in Keras, Flax, ONNX

    γ, β, running mean and variance are carried as they are stored, and eps, decay and the convention of the variance with them:
    torch to Keras gives ``batchnorm.keras.BatchNormalization(unbiased=True)``, Keras to torch gives
    ``batchnorm.torch.BatchNorm2d(unbiased=False)``. Where a convention can't be kept, a `BatchNormWarning` says so.

    Args:
        source: a layer. Of torch: ``torch.nn.BatchNorm1d``, ``2d``, ``3d``, ``SyncBatchNorm``, ours, or a frozen one with
            ``running_mean``, ``running_var``, ``weight``, ``bias`` and ``eps``. Of Keras: ``BatchNormalization``, Keras's or
            ours, built. Of Flax: ``(module, variables)`` of ``flax.linen.BatchNorm``, where the arguments of its constructor
            may stand for the module, or a ``flax.nnx.BatchNorm``. Of ONNX: a ``ModelProto`` with one BatchNormalization,
            ``(model, name of the node)``, or ``(node, initializers)``.
        to: ``"torch"``, ``"keras"``, ``"flax"`` (linen), ``"nnx"`` (Flax's other style) or ``"onnx"``.
        plain: for torch and Keras: a layer of the framework's own class, and not of ours.
        unbiased: which running variance the layer keeps from now on: that of n - 1 or that of n; ``None`` for that of the
            source. The stored one is not touched.
        axis: of the channels, for Keras and Flax; ``None`` for that of the source, or -1. In torch and ONNX it is 1.
        dims: axes of places in the data (0 for rows, 2 for images), where the source does not tell; a
            ``torch.nn.BatchNorm1d`` counts as 0.

    Returns:
        The layer: a module of torch, on the CPU and in training mode; a Keras layer, built; a ``FlaxLayer(module, variables)``,
        a tuple; a ``flax.nnx.BatchNorm``; or a ``ModelProto`` of one node, from ``x`` to ``y``.

    Raises:
        OptionError: a source that is no batch normalization alone, or has an option for which the other framework has no
            counterpart.
        MissingDependencyError: the other framework is not installed.

    Example:
        >>> import torch
        >>> layer = translate(torch.nn.BatchNorm2d(3, momentum=0.1), "keras")
        >>> layer.momentum, layer.epsilon, layer.unbiased, layer.axis
        (0.9, 1e-05, True, -1)
        >>> translate(layer, "torch")
        BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)

    Reference:
        Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), section 3.1.
    """
    if to not in _TARGETS:
        raise OptionError(f"to must be one of {', '.join(map(repr, _TARGETS))}, got {to!r}")
    room, function, known = _TARGETS[to]
    asked = {"plain": plain, "axis": axis}
    for name, value in asked.items():
        if name not in known and value:
            raise OptionError(f"{name} is for {_takers(name)}, got {name}={value!r} with to={to!r}")
    given: Portable = layer_wing(source).portable(source)
    _ask(given, unbiased, dims)
    wing = require(f"batchnorm.{room}.translating", room)
    layer = getattr(wing, function)(given, **{name: asked[name] for name in known})
    for note in given.notes:
        warnings.warn(f"{given.named}: {note}", BatchNormWarning, stacklevel=2)
    return layer


def _takers(name: str) -> str:
    return " and ".join(to for to, (_, _, known) in _TARGETS.items() if name in known)


def _ask(given: Portable, unbiased: Any, dims: Any) -> None:
    """Let the user's word stand where the source says something else, or nothing."""
    if unbiased is not None:
        given.norm.unbiased = bool(unbiased)
    if dims is not None:
        if isinstance(dims, bool) or not isinstance(dims, int) or not 0 <= dims <= 3:
            raise OptionError(f"dims must be 0, 1, 2 or 3 axes of places, got {dims!r}")
        given.dims = dims
