"""What a hook sees of a call that normalizes: its input, which of its values count, and the linear layer that has made it."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.protocol import Statistics, piece
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.weights import Weights

__all__ = ["LinearOutputs", "fits", "input_of", "piece_of", "weights_of"]


class LinearOutputs:
    """Outputs of dense layers and convolutions, recognized as long as nothing has been written over them."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Any, int, str]] = {}

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        """Register a hook on each of these layers, and yield it."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | _ConvNd):

                def note(_: Any, __: Any, y: Any, name: str = name) -> None:
                    if isinstance(y, Tensor) and not y.is_inference():
                        self.made[id(y)] = weakref.ref(y), y._version, name

                yield module.register_forward_hook(note)

    def maker(self, x: Tensor) -> str:
        """Return the dotted name of the layer that has put out exactly this; empty for none."""
        made, version, name = self.made.get(id(x), (lambda: None, 0, ""))
        return name if made() is x and x._version == version else ""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a layer is called on; ``None`` where nothing is given to it."""
    return args[0] if args else kwargs.get("x", kwargs.get("input", next(iter(kwargs.values()), None)))


def fits(one: Statistics, x: Any) -> bool:
    """Whether an input has the channels of a layer on axis 1: modules of others may keep statistics of anything."""
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        return False
    return one.mean is None or one.mean.shape == (x.shape[1],)


def weights_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return mask times weights of a call of a layer of ours; ``None`` where every value counts alike."""
    if not isinstance(layer, BatchNorm):
        return None
    x = input_of(args, kwargs)
    given = dict(zip(("mask", "sample_weight"), args[1:3], strict=False)) | kwargs
    return Weights.read(x, *(given.get(name) for name in ("mask", "sample_weight", "lengths"))).over_places(x)


def piece_of(x: Tensor) -> np.ndarray:
    """Return a copy of the `protocol.piece` of a tensor, in float32 or wider."""
    part = x.detach()[piece(x.shape)]
    return np.array(part.to(torch.promote_types(x.dtype, torch.float32)).cpu().numpy())
