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

__all__ = [
    "FEW_ROWS",
    "are_near",
    "bound_of",
    "full",
    "gradient_sums",
    "in_rows",
    "measure_rows",
    "memory_format",
    "normalize_rows",
    "over_channels",
]

# up to here ATen's sums are as exact as in its better layout, and one call of it costs less than several
FEW_ROWS = 2048
SHORT_COLUMN = 128
# |mean| / deviation beyond which float32 sums lose digits that the dtype has: over 64 rows, over short columns
FAR_64, FAR_COLUMNS = 10.0, 100.0


def in_rows(x: Tensor) -> bool:
    """Say whether the channels of one place lie side by side in memory."""
    if x.ndim == 2:
        return x.is_contiguous()
    return x.ndim > 3 and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format(x))


def are_near(mean: Tensor, invstd: Tensor, rows: int) -> bool:
    """Say whether every channel lies near enough to zero, for its spread, for ATen's sums over few rows."""
    ratio = mean * invstd
    # a sum of squares bounds the largest; NaN is not near
    bound = bound_of(rows)
    return ratio.dot(ratio).item() <= bound or bool((ratio * ratio).max() <= bound)


def bound_of(rows: int) -> float:
    """Return how large ``(mean / deviation)²`` may be for ATen's sums over few rows: what is lost grows with their root."""
    return FAR_64**2 * 64 / rows


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
        moments, shift = measure_rows(x)
        found.append(moments)
        near, mean = _shifted(x, moments.mean, shift)
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.moments, ctx.shift, ctx.bias = eps, moments, shift, None if bias is None else bias.dtype
        fixed_mean, var = _tensors(near, mean, moments.variance)
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
    dy = dy.to(x.dtype).contiguous(memory_format=memory_format(x))
    variance = moments.variance
    dgamma, dbeta = gradient_sums(dy, x, moments.mean, variance, eps)
    inv = 1 / np.sqrt(variance + eps)
    if not needs_dx:
        dx = None
    elif x.element_size() == 2:
        # a sum of three terms in half precision costs a digit: ATen's own backward rounds once
        mean, invstd = _tensors(x, moments.mean, inv)
        dx, *_ = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, invstd, True, eps, [True, False, False]
        )
    else:
        scale = inv if weight is None else inv * weight.detach().numpy()
        slope = -scale * inv * dgamma / moments.count
        shift = -scale * dbeta / moments.count - slope * moments.mean
        a, b, c, zeros, ones = _tensors(x, scale, slope, shift, 0.0, 1.0)
        dx = torch.batch_norm(dy, a, c, zeros, ones, False, 0.0, 0.0, False).addcmul_(x, over_channels(b, x))
    return dx, torch.from_numpy(dgamma), torch.from_numpy(dbeta)


# inf and NaN are looked for at the end
@np.errstate(all="ignore")
def measure_rows(x: Tensor) -> tuple[Moments, Tensor | None]:
    """Return the Moments, and what the batch was shifted by if it lies far from zero."""
    moments = _moments_of_columns(x)
    if not bool((moments.mean**2 > FAR_COLUMNS**2 * moments.variance).any()):
        return moments, None
    (shift,) = _tensors(x, moments.mean)
    shifted = _moments_of_columns(x - over_channels(shift, x))
    return Moments(shifted.count, shifted.mean + shift.numpy(), shifted.m2), shift


def _moments_of_columns(x: Tensor) -> Moments:
    total = Moments.empty()
    for columns, parts in _short_columns(x):
        # half precision would keep the statistics in half precision, were it not given wider ones to update
        old_mean, old_var = (
            torch.zeros(2, columns.shape[1], device=x.device).unbind() if x.element_size() < 4 else (None, None)
        )
        mean, var = torch.batch_norm_update_stats(columns, old_mean, old_var, 0.0)
        part = _merged(len(columns), mean.numpy().reshape(parts, -1), var.numpy().reshape(parts, -1))
        total = part if total.count == 0 else total.merge(part)
    return total


def _merged(count: int, means: NDArray[Any], variances: NDArray[Any]) -> Moments:
    """Merge parts of ``count`` values each: Chan's formula for all at once."""
    mean = means.mean(0, dtype=np.float64)
    d = means - mean
    m2 = count * (variances.sum(0, dtype=np.float64) + np.einsum("pc,pc->c", d, d))
    return Moments(count * len(means), mean, m2)


def gradient_sums(
    dy: Tensor, x: Tensor, mean: NDArray[np.float64], variance: NDArray[np.float64], eps: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``Σ dy·x̂`` and ``Σ dy`` by ATen's backward for fixed statistics, which takes both in one reading."""
    dgamma, dbeta = np.zeros_like(mean), np.zeros_like(mean)
    statistics = _tensors(x, mean, variance)
    for (dy_columns, parts), (x_columns, _) in zip(_short_columns(dy), _short_columns(x), strict=True):
        repeated = (v.repeat(parts) for v in statistics)
        _, scaled, plain = torch.ops.aten.native_batch_norm_backward(
            dy_columns, x_columns, None, *repeated, None, None, False, eps, [False, True, True]
        )
        dgamma += scaled.numpy().reshape(parts, -1).sum(0, dtype=np.float64)
        dbeta += plain.numpy().reshape(parts, -1).sum(0, dtype=np.float64)
    return dgamma, dbeta


def _short_columns(x: Tensor) -> list[tuple[Tensor, int]]:
    """View M rows of C values as ``(128, parts · C)``, and what is left over as it is."""
    channels = x.shape[1]
    rows = x.numel() // channels
    parts = rows // SHORT_COLUMN
    whole, width = parts * SHORT_COLUMN, parts * channels
    columns = [(x.as_strided((SHORT_COLUMN, width), (width, 1)), parts)] if parts else []
    if whole < rows:
        start = x.storage_offset() + whole * channels
        columns.append((x.as_strided((rows - whole, channels), (channels, 1), start), 1))
    return columns


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout that puts the channels of one place side by side."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)


def full(v: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter in single precision where it shares half precision with ``x``: statistics are never kept in it.

    Another mixture is left to ATen, which refuses it.
    """
    return v.float() if v is not None and v.dtype == x.dtype and v.element_size() == 2 else v


def _tensors(x: Tensor, first: NDArray[Any], *others: NDArray[Any] | float) -> tuple[Tensor, ...]:
    """Return arrays as tensors of the dtype that statistics of ``x`` have, in one piece: each call costs a cold cache."""
    rows = np.empty((1 + len(others), len(first)), np.float64 if x.dtype == torch.float64 else np.float32)
    for row, array in zip(rows, (first, *others), strict=True):
        row[:] = array
    return torch.from_numpy(rows).unbind()
