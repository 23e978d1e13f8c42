"""Affine: scale and shift of a channel, which is all that batch normalization is at inference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from batchnorm.arrays import Array
from batchnorm.errors import NotInvertibleError

if TYPE_CHECKING:
    from batchnorm.moments import Moments

__all__ = ["Affine"]


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """The map ``x -> scale · x + shift``, per channel.

    Only arithmetic is used: Python floats, NumPy, torch and JAX arrays all work, and gradients pass through.

    Args:
        scale: ``(C,)``, unit of the output per unit of the input.
        shift: ``(C,)``, in the unit of the output.

    Example:
        >>> double, add = Affine(2.0, 0.0), Affine(1.0, 3.0)
        >>> double.then(add)
        Affine(scale=2.0, shift=3.0)
        >>> double.then(add).inverse()(13.0)
        5.0
    """

    scale: Array
    shift: Array

    @classmethod
    def from_moments(cls, moments: "Moments", gamma: Array = 1.0, beta: Array = 0.0, eps: float = 1e-5) -> Self:
        """Return batch normalization with fixed statistics as an Affine: `from_statistics` of the biased variance.

        Example:
            >>> from batchnorm import Moments
            >>> Affine.from_moments(Moments(count=4, mean=1.0, m2=16.0), gamma=3.0, beta=5.0, eps=0.0)
            Affine(scale=1.5, shift=3.5)
        """
        return cls.from_statistics(moments.mean, moments.variance, gamma, beta, eps)

    @classmethod
    def from_statistics(
        cls, mean: Array, variance: Array, gamma: Array = 1.0, beta: Array = 0.0, eps: float = 1e-5
    ) -> Self:
        """Return ``scale = γ / √(variance + ε)`` and ``shift = β - mean · scale``.

        Reference:
            Ioffe, Szegedy: Batch Normalization, 2015 (arXiv:1502.03167), Algorithm 2, line 11.
        """
        scale = gamma / (variance + eps) ** 0.5
        return cls(scale, beta - mean * scale)

    def __call__(self, x: Array) -> Array:
        """Return ``scale · x + shift``; ``x`` must broadcast against the scale, so channels come last."""
        return self.scale * x + self.shift

    def then(self, outer: "Affine") -> "Affine":
        """Return the map that applies this one first and ``outer`` to its result."""
        return Affine(outer.scale * self.scale, outer.scale * self.shift + outer.shift)

    def inverse(self) -> "Affine":
        """Return the map that undoes this one: ``y -> (y - shift) / scale``.

        Raises:
            NotInvertibleError: a channel has scale 0.
        """
        zero = self.scale == 0
        if zero if isinstance(zero, bool) else bool(zero.any()):
            raise NotInvertibleError(
                f"an affine map has an inverse where no scale is zero, got scale {self.scale}: "
                "leave out the channels that are constant"
            )
        return Affine(1 / self.scale, -self.shift / self.scale)
