"""What stands in the place of a batch normalization layer that was folded."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.torch.options import ACTIVATIONS
from batchnorm.torch.weights import Weights

__all__ = ["ChannelPad", "Remainder", "ScaleShift", "tensor_like"]


class ScaleShift(nn.Module):
    """Scale and shift each channel: ``y = weight · x + bias``.

    Args:
        weight: ``(C,)``.
        bias: ``(C,)``.

    Example:
        >>> ScaleShift(torch.tensor([2.0]), torch.tensor([1.0]))(torch.tensor([[3.0]]))
        tensor([[7.]])
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``weight · x + bias`` for ``x`` of shape ``(N, C, *spatial)``, in the dtype of ``x``."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        y = torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Tell the number of channels."""
        return str(len(self.weight))


class ChannelPad(nn.Module):
    """Pad each channel with a value of its own, as ``torch.nn.functional.pad`` pads all with one.

    Args:
        value: ``(C,)``.
        padding: places before and after, the last axis first.

    Example:
        >>> ChannelPad(torch.tensor([5.0]), [1, 0])(torch.tensor([[[3.0]]]))
        tensor([[[5., 3.]]])
    """

    value: Tensor

    def __init__(self, value: Tensor, padding: list[int]) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape ``(N, C, *spatial)`` with the padding around it."""
        ends = [self.padding[2 * i : 2 * i + 2] for i in reversed(range(len(self.padding) // 2))]
        sizes = [n + before + after for n, (before, after) in zip(x.shape[-len(ends) :], ends, strict=True)]
        shape = (*x.shape[: -len(ends)], *sizes)
        padded = (
            self.value.to(x.dtype)
            .view(1, -1, *[1] * (x.ndim - 2))
            .expand(shape)
            .clone(memory_format=torch.contiguous_format)
        )
        inner = padded
        for axis, (before, _) in enumerate(ends, start=x.ndim - len(ends)):
            inner = inner.narrow(axis, before, x.shape[axis])
        inner.copy_(x)
        return padded

    def extra_repr(self) -> str:
        """Tell the number of channels and the padding."""
        return f"{len(self.value)}, padding={self.padding}"


class Remainder(nn.Module):
    """What is left of a layer of this library: masks, the residual and the activation, around ``inner``.

    Args:
        inner: what stands in the place of the normalization itself.
        activation: name of the activation, or ``None``.
    """

    def __init__(self, inner: nn.Module, activation: str | None) -> None:
        super().__init__()
        self.inner = inner
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return ``activation(inner(x) + residual)``, 0 where the mask is false."""
        weights = Weights.read(x, mask, sample_weight, lengths)
        y: Any = self.inner(weights.only_valid(x))
        if residual is not None:
            y = weights.only_valid(y + residual)
        if self.activation is not None:
            y = ACTIVATIONS[self.activation](y)
        return weights.only_valid(y)


def tensor_like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """Return a NumPy array as a tensor with the dtype and the device of another one."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=tensor.device, dtype=tensor.dtype)
