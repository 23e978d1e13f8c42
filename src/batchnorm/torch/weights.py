"""Which values of a batch count, and how much: a mask, lengths and sample weights, checked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.arrays import reduced_axes
from batchnorm.errors import OptionError, ShapeError
from batchnorm.functional.groups import only_valid, over_axes, valid_weights
from batchnorm.torch.ops import is_eager

__all__ = ["Weights"]


class Weights(NamedTuple):
    """A mask and sample weights, or nothing; false where every value counts alike."""

    mask: Tensor | None
    sample_weight: Tensor | None

    @classmethod
    def read(
        cls, x: Tensor, mask: Tensor | None, sample_weight: Tensor | None, lengths: Tensor | None, *, alone: bool = True
    ) -> "Weights":
        """Check what a user gave; weights may all be zero where this is not the whole batch.

        Raises:
            ShapeError: what does not fit ``x``.
            OptionError: weights that are negative, not finite or all zero; lengths beyond the last axis.
        """
        if mask is not None and mask.ndim == 1 and x.ndim > 2:
            raise ShapeError(
                f"mask must have the axes (N, *spatial) of an input of shape {tuple(x.shape)}, got {tuple(mask.shape)}: "
                f"for whole samples give mask.view(-1{', 1' * (x.ndim - 2)})"
            )
        if mask is not None:
            over_axes(mask, x, reduced_axes("spatial", x.ndim), "mask")
        if lengths is not None:
            valid = _mask_of_lengths(lengths, x)
            mask = valid if mask is None else mask & valid
        weights = cls(mask, sample_weight)
        if sample_weight is not None and is_eager(sample_weight) and x.numel():
            weights._check_values(x, alone)
        return weights

    def __bool__(self) -> bool:
        """Say whether anything was given."""
        return self.mask is not None or self.sample_weight is not None

    def _check_values(self, x: Tensor, alone: bool) -> None:
        w = self.sample_weight
        assert w is not None  # noqa: S101 - the caller has looked
        if not bool(((w >= 0) & torch.isfinite(w)).all()):
            raise OptionError(f"sample_weight must be finite and not negative, got values from {w.min()} to {w.max()}")
        masked_out = self.mask is not None and not bool(self.mask.any())
        if alone and not masked_out and not bool((self._over_places(x) > 0).any()):
            raise OptionError("sample_weight must be positive somewhere (where the mask is true), got zeros only")

    def _over_places(self, x: Tensor) -> Any:
        return valid_weights(x, reduced_axes("spatial", x.ndim), self.mask, self.sample_weight)

    def valid_places(self, x: Tensor) -> int | None:
        """Return how many values of a channel count, or ``None`` where their values can't be looked at."""
        if not self:
            return x.numel() // x.shape[1]
        if not is_eager(x):
            return None
        return int((self._over_places(x) > 0).sum())

    def over_places(self, x: Tensor) -> Tensor | None:
        """Return mask times weights, shaped to meet ``x``."""
        return self._over_places(x) if self else None

    def only_valid(self, y: Tensor) -> Tensor:
        """Put 0 where the mask is false."""
        return y if self.mask is None else only_valid(y, self.mask, reduced_axes("spatial", y.ndim))


def _mask_of_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    if x.ndim < 3:
        raise ShapeError(f"lengths count places along a last axis, but the input has none: shape {tuple(x.shape)}")
    if lengths.shape != x.shape[:1] or lengths.dtype.is_floating_point or lengths.dtype is torch.bool:
        raise ShapeError(
            f"lengths must be integers, one for each of the {len(x)} samples, got shape {tuple(lengths.shape)} of "
            f"{lengths.dtype}"
        )
    places = x.shape[-1]
    if is_eager(lengths) and len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= places:
        raise OptionError(
            f"lengths must lie between 0 and {places}, the places of the last axis, got {lengths.tolist()}"
        )
    mask = torch.arange(places, device=lengths.device) < lengths[:, None]
    return mask.view(len(x), *[1] * (x.ndim - 3), places)
