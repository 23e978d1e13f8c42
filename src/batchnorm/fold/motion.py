"""How an Affine moves along an array: through reshapes, transposes, concatenations.

The arrays of an Affine are spread here over the axes of the data that it acts on: one axis for each axis of the data, of
size 1 where the Affine does not vary.
"""

from itertools import accumulate

import numpy as np

from batchnorm.affine import Affine

__all__ = ["along", "part", "placed", "reshaped", "shift_free", "spread", "transposed"]


def spread(affine: Affine, axis: int, ndim: int) -> Affine:
    """Lay ``(C,)`` arrays along one axis of the data."""
    shape = [1] * ndim
    shape[axis] = -1
    return Affine(affine.scale.reshape(shape), affine.shift.reshape(shape))


def along(affine: Affine, axis: int, size: int) -> Affine | None:
    """Return the ``(size,)`` arrays along one axis; ``None`` where the Affine varies along another one."""
    if any(n > 1 for i, n in enumerate(affine.scale.shape) if i != axis):
        return None
    return Affine(*(np.broadcast_to(v.reshape(-1), (size,)) for v in (affine.scale, affine.shift)))


def shift_free(affine: Affine) -> bool:
    """Whether the Affine scales and does nothing else."""
    return not affine.shift.any()


def transposed(affine: Affine, order: tuple[int, ...]) -> Affine:
    """Return what the Affine is after a transpose: output axis i is input axis ``order[i]``."""
    return Affine(affine.scale.transpose(order), affine.shift.transpose(order))


def part(affine: Affine, axis: int, start: int, stop: int) -> Affine:
    """Return the piece of the Affine that acts on ``start:stop`` of one axis."""
    if affine.scale.shape[axis] == 1:
        return affine
    cut = (*[slice(None)] * axis, slice(start, stop))
    return Affine(affine.scale[cut], affine.shift[cut])


def placed(affine: Affine, axis: int, sizes: list[int], position: int) -> Affine:
    """Return the Affine on a concatenation that acts on the piece at ``position`` and leaves the others alone."""
    start = list(accumulate(sizes, initial=0))[position]
    shape = list(affine.scale.shape)
    shape[axis] = sum(sizes)
    scale, shift = np.ones(shape), np.zeros(shape)
    cut = (*[slice(None)] * axis, slice(start, start + sizes[position]))
    scale[cut], shift[cut] = affine.scale, affine.shift
    return Affine(scale, shift)


def reshaped(affine: Affine, before: tuple[int, ...], after: tuple[int, ...]) -> Affine | None:
    """Return what the Affine is after a reshape, channels repeated for all their places; ``None`` for empty data."""
    blocks = _blocks(before, after)
    if blocks is None:
        return None
    scale, shift = (_reshaped(v, before, after, blocks) for v in (affine.scale, affine.shift))
    # collapsed together, so that both vary along the same axes
    for axis in range(len(after)):
        first = (*[slice(None)] * axis, slice(0, 1))
        if (scale == scale[first]).all() and (shift == shift[first]).all():
            scale, shift = scale[first], shift[first]
    return Affine(scale, shift)


def _reshaped(
    v: np.ndarray, before: tuple[int, ...], after: tuple[int, ...], blocks: list[tuple[slice, slice]]
) -> np.ndarray:
    full = list(v.shape)
    shape: list[int] = []
    for old, new in blocks:
        if any(n > 1 for n in v.shape[old]):
            full[old] = before[old]
            shape += after[new]
        else:
            shape += [1] * len(after[new])
    return np.broadcast_to(v, full).reshape(shape)


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[slice, slice]] | None:
    """Cut two shapes into the shortest runs of axes that hold equally many values."""
    if 0 in before:
        return None
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        start, old, new = (i, j), 1, 1
        if i < len(before):
            old, i = before[i], i + 1
        if j < len(after):
            new, j = after[j], j + 1
        while old != new:
            if old < new:
                old, i = old * before[i], i + 1
            else:
                new, j = new * after[j], j + 1
        blocks.append((slice(start[0], i), slice(start[1], j)))
    return blocks
