"""Batches that lie in memory row by row, ``(N, C)`` and channels-last, on ATen's kernels but with exact sums.

ATen adds such rows one after another in float32. Here they are viewed as many short columns, each a channel of its own, in
the same reading; the columns of a channel are then merged as Moments in float64. A batch far from zero is shifted first.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.functional import batch_norm_backward
from batchnorm.moments import Moments

__all__ = ["FEW_ROWS", "are_near", "full", "in_rows", "normalize_rows", "over_channels"]

# up to here ATen's sums are as exact as in its better layout, and one call of it costs less than several
FEW_ROWS = 2048
SHORT_COLUMN = 128
# |mean| / deviation beyond which float32 sums lose digits that the dtype has: over 64 rows, over short columns
FAR_64, FAR_COLUMNS = 10.0, 100.0


def in_rows(x: Tensor) -> bool:
    """Say whether the channels of one place lie side by side in memory."""
    if x.ndim == 2:
        return x.is_contiguous()
    return x.ndim > 3 and not x.is_contiguous() and x.is_contiguous(memory_format=_memory_format(x))


def are_near(mean: Tensor, invstd: Tensor, rows: int) -> bool:
    """Say whether every channel lies near enough to zero, for its spread, for ATen's sums over few rows."""
    ratio = mean * invstd
    # a sum of squares bounds the largest; what is lost grows with the root of the rows; NaN is not near
    bound = FAR_64**2 * 64 / rows
    return ratio.dot(ratio).item() <= bound or bool((ratio * ratio).max() <= bound)


def normalize_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """Normalize a batch of rows; the Moments are NumPy arrays."""
    found: list[Moments] = []
    y: Tensor = _NormalizeRows.apply(x, weight, bias, eps, found)  # type: ignore[no-untyped-call]
    return y, found[0]


def over_channels(v: Tensor, x: Tensor) -> Tensor:
    """View ``(C,)`` so that it meets ``x``."""
    return v.view(1, -1, *[1] * (x.ndim - 2))


class _NormalizeRows(torch.autograd.Function):
    @staticmethod
    @np.errstate(all="ignore")
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, found: list[Moments]
    ) -> Tensor:
        moments, shift = _moments(_rows(x))
        found.append(moments)
        near, mean = _shifted(x, moments.mean, shift)
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.moments, ctx.shift, ctx.bias = eps, moments, shift, None if bias is None else bias.dtype
        fixed_mean, var = _tensors(_wide(x), mean, moments.variance)
        return torch.batch_norm(near, full(weight, x), full(bias, x), fixed_mean, var, False, 0.0, eps, False).to(
            x.dtype
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dgamma, dbeta = batch_norm_backward(dy, x, weight, eps=ctx.eps)
        else:
            near, mean = _shifted(x, ctx.moments.mean, ctx.shift)
            moments = Moments(ctx.moments.count, mean, ctx.moments.m2)
            dx, dgamma, dbeta = _backward(dy, near, full(weight, x), moments, ctx.eps, ctx.needs_input_grad[0])
            dx = None if dx is None else dx.to(x.dtype)
        dgamma = None if weight is None else dgamma.to(weight.dtype)
        return dx, dgamma, None if ctx.bias is None else dbeta.to(ctx.bias), None, None


def _shifted(x: Tensor, mean: NDArray[Any], shift: Tensor | None) -> tuple[Tensor, NDArray[Any]]:
    """Return the batch and its mean nearer to zero, where it was found to lie far."""
    return (x, mean) if shift is None else (x - over_channels(shift, x), mean - shift.numpy())


@np.errstate(all="ignore")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, moments: Moments, eps: float, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return dx, dγ and dβ: sums over short columns, then ``dx = a·dy + b·x + c`` for each channel."""
    dy = dy.to(x.dtype).contiguous(memory_format=_memory_format(x))
    dgamma, dbeta = _gradient_sums(_rows(dy), _rows(x), moments, eps)
    if not needs_dx:
        dx = None
    elif x.element_size() == 2:
        # a sum of three terms in half precision costs a digit: ATen's own backward rounds once
        mean, invstd = _tensors(torch.float32, moments.mean, 1 / np.sqrt(moments.variance + eps))
        dx, *_ = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, invstd, True, eps, [True, False, False]
        )
    else:
        inv = 1 / np.sqrt(moments.variance + eps)
        scale = inv if weight is None else inv * weight.detach().numpy()
        slope = -scale * inv * dgamma / moments.count
        a, b, c = _tensors(x.dtype, scale, slope, -scale * dbeta / moments.count - slope * moments.mean)
        zeros, ones = torch.zeros_like(a), torch.ones_like(a)
        dx = torch.batch_norm(dy, a, c, zeros, ones, False, 0.0, 0.0, False).addcmul_(x, over_channels(b, x))
    return dx, torch.from_numpy(dgamma), torch.from_numpy(dbeta)


# inf and NaN are looked for at the end
@np.errstate(all="ignore")
def _moments(rows: Tensor) -> tuple[Moments, Tensor | None]:
    """Return the Moments, and what the rows were shifted by if they lie far from zero."""
    moments = _moments_of_columns(rows)
    if not bool((moments.mean**2 > FAR_COLUMNS**2 * moments.variance).any()):
        return moments, None
    (shift,) = _tensors(_wide(rows), moments.mean)
    shifted = _moments_of_columns(rows - shift)
    return Moments(shifted.count, shifted.mean + shift.numpy(), shifted.m2), shift


def _moments_of_columns(rows: Tensor) -> Moments:
    total = Moments.empty()
    for columns, parts in _short_columns(rows):
        # half precision would keep the statistics in half precision, were it not given wider ones to update
        old_mean, old_var = torch.zeros(2, columns.shape[1]).unbind() if rows.element_size() < 4 else (None, None)
        mean, var = (v.numpy() for v in torch.batch_norm_update_stats(columns, old_mean, old_var, 0.0))
        total = total.merge(_merged(len(columns), mean.reshape(parts, -1), var.reshape(parts, -1)))
    return total


def _merged(count: int, means: NDArray[Any], variances: NDArray[Any]) -> Moments:
    """Merge parts of ``count`` values each: Chan's formula for all at once."""
    mean = means.mean(0, dtype=np.float64)
    d = means - mean
    return Moments(count * len(means), mean, count * (variances.sum(0, dtype=np.float64) + np.einsum("pc,pc->c", d, d)))


def _gradient_sums(
    dy: Tensor, x: Tensor, moments: Moments, eps: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``Σ dy·x̂`` and ``Σ dy`` by ATen's backward for fixed statistics, which takes both in one reading."""
    dgamma, dbeta = np.zeros_like(moments.mean), np.zeros_like(moments.mean)
    mean, var = _tensors(_wide(x), moments.mean, moments.variance)
    for (dy_columns, parts), (x_columns, _) in zip(_short_columns(dy), _short_columns(x), strict=True):
        _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
            dy_columns, x_columns, None, mean.repeat(parts), var.repeat(parts), None, None, False, eps, [False, True, True]
        )  # fmt: skip
        dgamma += scaled.numpy().reshape(parts, -1).sum(0, dtype=np.float64)
        dbeta += plain.numpy().reshape(parts, -1).sum(0, dtype=np.float64)
    return dgamma, dbeta


def _short_columns(rows: Tensor) -> list[tuple[Tensor, int]]:
    """View ``(M, C)`` as ``(128, parts · C)``, and what is left over as it is."""
    parts = len(rows) // SHORT_COLUMN
    whole = parts * SHORT_COLUMN
    columns = [(rows[:whole].view(SHORT_COLUMN, -1), parts)] if parts else []
    return columns if whole == len(rows) else [*columns, (rows[whole:], 1)]


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _memory_format(x: Tensor) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 else x.dtype


def full(v: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter in single precision where it shares half precision with ``x``: statistics are never kept in it.

    Another mixture is left to ATen, which refuses it.
    """
    return v.float() if v is not None and v.dtype == x.dtype and v.element_size() == 2 else v


def _tensors(dtype: torch.dtype, *arrays: NDArray[Any]) -> list[Tensor]:
    kind = np.float64 if dtype == torch.float64 else np.float32
    return [torch.from_numpy(array.astype(kind)) for array in arrays]
