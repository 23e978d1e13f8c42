"""Exact Moments of a tensor in one reading, block by block in cache, for statistics of whole data sets."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["moments_of"]

# numbers of a block: what is computed from it stays in cache
BLOCK = 2**18
# |mean - centre| / deviation from which on a sum of squares loses digits
FAR = 1.5


def moments_of(x: Tensor, centre: np.ndarray | None = None, weights: Tensor | None = None) -> Moments:
    """Measure the channels of ``(N, C, *spatial)``, to float64 means and the last digit of ``x`` in the variances.

    ``mean = c + Σ(x - c) / n`` and ``m2 = Σ(x - c)² - (Σ(x - c))² / n`` with a centre ``c`` near the mean, so that nothing
    cancels: the first block's mean where none is given, the batch's own where that was too far away. Partial sums are short,
    in float32 or wider, and are added up in float64.

    Args:
        x: any layout, dtype and device; only read.
        centre: ``(C,)``, a guess of the mean, like that of the batches before.
        weights: frequencies of the values, broadcastable to ``x``; in float64 then, in two passes.

    Returns:
        Moments of NumPy arrays in float64.

    Example:
        >>> moments_of(torch.tensor([[1e4], [1e4 + 2]]))
        Moments(count=2, mean=array([10001.]), m2=array([2.]))
    """
    x = x.detach()
    if weights is not None:
        found = Moments.of(x, "spatial", weights)
        return Moments(torch.as_tensor(found.count).max().item(), found.mean.cpu().numpy(), found.m2.cpu().numpy())
    count = x.numel() // max(1, x.shape[1])
    if count == 0 or x.shape[1] == 0:
        return Moments(0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
    wide = torch.promote_types(x.dtype, torch.float32)
    guess = _first_mean(x, wide) if centre is None else torch.from_numpy(centre).to(x.device, wide)
    moments = _centred(x, guess, count)
    off = moments.mean - _array(guess)
    if bool((off * off * count > FAR**2 * moments.m2).any()):
        moments = _centred(x, torch.from_numpy(moments.mean).to(x.device, wide), count)
    return moments


def _centred(x: Tensor, centre: Tensor, count: int) -> Moments:
    total, squares, column = np.zeros(len(centre)), np.zeros(len(centre)), centre[:, None]
    for block, in_rows in _blocks(x):
        if in_rows:
            d = block - centre
            total += _array(d.sum(0))
            squares += _array(d.square_().sum(0))
        else:
            d = block - column
            total += _array(d.sum(-1)).sum(0)
            squares += _array(d.square_().sum(-1)).sum(0)
    off = total / count
    return Moments(count, _array(centre) + off, np.maximum(squares - off * total, 0.0))


def _blocks(x: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Cut a tensor into blocks ``(rows, C)`` or ``(N, C, places)``, whichever is how it lies in memory."""
    channels_last = x.movedim(1, -1)
    in_rows = x.ndim == 2 or channels_last.is_contiguous()
    parts = channels_last.reshape(-1, x.shape[1]) if in_rows else x.flatten(2)
    size = max(1, BLOCK // max(1, parts[0].numel())) if x.is_cpu else len(parts)
    for start in range(0, len(parts), size):
        yield parts[start : start + size], in_rows


def _first_mean(x: Tensor, wide: torch.dtype) -> Tensor:
    block, in_rows = next(_blocks(x))
    block = block.to(wide)
    return block.mean(0) if in_rows else block.mean((0, -1))


def _array(v: Tensor) -> np.ndarray:
    # some devices know no float64
    return np.asarray(v.cpu().double())
