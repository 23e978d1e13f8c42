"""This rank's part of a batch that lies on many: measured, normalized by given Moments, and its gradients.

Moments are packed in rows ``(count, mean, m2)`` of 2C + 1 numbers, in float64 where the device has it. The values stay in
their own dtype; where they lie far from zero for their spread, they are shifted first, so that nothing is lost.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.torch.native import dense
from batchnorm.torch.ops import is_eager
from batchnorm.torch.rows import gradient_sums, in_rows, measure_rows, memory_format, over_channels

__all__ = ["Portion", "filled_count", "measure", "narrow_dtype", "packed", "unpacked", "variance_of", "x_hat"]

# |mean| / deviation beyond which float32 loses digits that the dtype has, unless the batch is shifted
FAR = 3.0


def packed(moments: Moments) -> Tensor:
    """Return ``(count, mean, m2)`` as one row."""
    mean = moments.mean
    count = torch.as_tensor(moments.count, dtype=mean.dtype, device=mean.device)
    return torch.cat((count.reshape(1), mean, moments.m2))


def unpacked(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and m2 of ``(..., 2C + 1)``; the count keeps an axis of size 1."""
    channels = rows.shape[-1] // 2
    return rows[..., :1], rows[..., 1 : 1 + channels], rows[..., 1 + channels :]


def filled_count(rows: Tensor) -> Tensor:
    """Return the count to divide by: 1 where there is no value."""
    count = rows[..., :1]
    return count + (count == 0)


def variance_of(rows: Tensor) -> Tensor:
    """Return the biased variance, 0 where there is no value."""
    return unpacked(rows)[2] / filled_count(rows)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def narrow_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that values are worked on in: float64 for float64, float32 for the others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def measure(x: Tensor, w: Tensor | None, eps: float) -> Moments:
    """Return the Moments of this rank's part, in float64 and centred, also far from zero."""
    if w is not None:
        return Moments.of(x, "spatial", w)
    count = x.numel() // max(1, x.shape[1])
    if count == 0:
        return Moments(0, *x.new_zeros((2, x.shape[1]), dtype=_wide(x)))
    if not is_eager(x):
        return _measure_anywhere(x, count)
    x = dense(x)
    if in_rows(x):
        moments, _ = measure_rows(x)
        return Moments(count, torch.from_numpy(moments.mean), torch.from_numpy(moments.m2))
    mean, var = _measure_once(x)
    if not _is_far(mean, var, eps):
        return Moments(count, mean.double(), var.double() * count)
    shift = mean.to(narrow_dtype(x))
    mean, var = _measure_once(x - over_channels(shift, x))
    return Moments(count, mean.double() + shift.double(), var.double() * count)


def _measure_once(x: Tensor) -> tuple[Tensor, Tensor]:
    # half precision would give statistics in half precision, were it not given wider ones to update
    old_mean, old_var = torch.zeros(2, x.shape[1]).unbind() if x.element_size() < 4 else (None, None)
    mean, var = torch.batch_norm_update_stats(x, old_mean, old_var, 0.0)
    return mean, var


def _measure_anywhere(x: Tensor, count: int) -> Moments:
    axes, x = [0, *range(2, x.ndim)], x.to(narrow_dtype(x))
    shift = x.mean(axes)
    d = x - over_channels(shift, x)
    rest = d.sum(axes, dtype=_wide(x)) / count
    m2 = (d * d).sum(axes, dtype=_wide(x)) - count * rest**2
    return Moments(count, shift.to(_wide(x)) + rest, m2)


def _is_far(mean: Tensor, var: Tensor, eps: float) -> bool:
    return bool((mean * mean > FAR**2 * (var + eps)).any())


def x_hat(x: Tensor, row: Tensor, eps: float) -> Tensor:
    """Return ``(x - mean) / √(variance + ε)``, of operations that can be differentiated."""
    _, mean, _ = unpacked(row)
    return (x - over_channels(mean, x)) * over_channels((variance_of(row) + eps).rsqrt(), x)


class Portion(NamedTuple):
    """This rank's values, near zero, and the mean, variance and count of all ranks' from there.

    ``dtype`` is the one that the values came in, and that results have.
    """

    near: Tensor
    mean: Tensor
    variance: Tensor
    values: Tensor
    eps: float
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, row: Tensor, eps: float) -> "Portion":
        """Shift the values towards zero where they lie far from it: ``x - mean`` in two steps rounds once."""
        _, mean, m2 = unpacked(row)
        count = filled_count(row)
        variance = m2 / count
        if not (is_eager(x) and not _is_far(mean, variance, eps)):
            shift = mean.to(narrow_dtype(x))
            return cls(x - over_channels(shift, x), mean - shift.to(mean.dtype), variance, count, eps, x.dtype)
        return cls(x, mean, variance, count, eps, x.dtype)

    def normalized(self, gain: Tensor | None, offset: Tensor | None) -> Tensor:
        """Return ``gain · x̂ + offset``."""
        if self.near.numel() == 0:
            return self.near.new_empty(self.near.shape, dtype=self.dtype)
        mean, variance = torch.stack((self.mean, self.variance)).to(narrow_dtype(self.near))
        return torch.batch_norm(self.near, gain, offset, mean, variance, False, 0.0, self.eps, False).to(self.dtype)

    def sums(self, dy: Tensor) -> Tensor:
        """Return ``Σ dy`` and ``Σ dy·x̂`` over this rank, ``(2, C)``."""
        x = self.near.to(narrow_dtype(self.near))
        dy = dy.to(x.dtype)
        if x.numel() == 0:
            return self.mean.new_zeros((2, x.shape[1]))
        if not (is_eager(x) and is_eager(dy)):
            axes, invstd = [0, *range(2, x.ndim)], (self.variance + self.eps).rsqrt()
            centred = x - over_channels(self.mean.to(x.dtype), x)
            hatted = (dy * centred).sum(axes, dtype=self.mean.dtype) * invstd
            return torch.stack((dy.sum(axes, dtype=self.mean.dtype), hatted))
        x = dense(x)
        if in_rows(x):
            dy = dy.contiguous(memory_format=memory_format(x))
            dgamma, dbeta = gradient_sums(dy, x, self.mean.numpy(), self.variance.numpy(), self.eps)
            return torch.from_numpy(np.stack((dbeta, dgamma)))
        mean, variance = torch.stack((self.mean, self.variance)).to(x.dtype)
        _, hatted, plain = torch.ops.aten.native_batch_norm_backward(
            dy.contiguous(), x, None, mean, variance, None, None, False, self.eps, [False, True, True]
        )
        return torch.stack((plain, hatted)).to(self.mean.dtype)

    def dx(self, dy: Tensor, w: Tensor | None, totals: Tensor, scale: Tensor) -> Tensor:
        """Return ``a·dy + w·(b·x + c)``: three numbers for each channel."""
        x = self.near
        if x.numel() == 0:
            return x.new_empty(x.shape, dtype=self.dtype)
        inv = (self.variance + self.eps).rsqrt()
        plain, hatted = totals / self.values
        a = scale * inv
        b = -a * inv * hatted
        c = -a * plain - b * self.mean
        rows = torch.stack((a, b, c, torch.zeros_like(a), torch.ones_like(a))).to(narrow_dtype(x))
        if w is None and is_eager(x) and x.dtype == dy.dtype == rows.dtype:
            # one reading less than two sums of products
            a, b, c, zeros, ones = rows
            return torch.batch_norm(dy, a, c, zeros, ones, False, 0.0, 0.0, False).addcmul_(x, over_channels(b, x))
        a, b, c, *_ = (over_channels(v, x) for v in rows)
        rest = torch.addcmul(c, x.to(rows.dtype), b)
        return torch.addcmul(rest if w is None else rest * w.to(rows.dtype), dy.to(rows.dtype), a).to(self.dtype)
