"""Batch normalization through the whole life of a network.

Everything is made of two small things: `Moments` (count, mean, sum of squared deviations), which are merged, and `Affine`
(scale, shift), which is moved. Importing this package loads NumPy and nothing else; PyTorch and the rest are loaded by the
verb that needs them.
"""

from typing import TYPE_CHECKING

from batchnorm.rooms import open_lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batchnorm import functional as functional
    from batchnorm.affine import Affine as Affine
    from batchnorm.check import check as check
    from batchnorm.errors import BatchNormError as BatchNormError
    from batchnorm.fold import fold as fold
    from batchnorm.fold import prune as prune
    from batchnorm.fold import strip_bias as strip_bias
    from batchnorm.lab import compare as compare
    from batchnorm.moments import Moments as Moments
    from batchnorm.observe import observe as observe
    from batchnorm.recalibrate import recalibrate as recalibrate
    from batchnorm.summary import summary as summary
    from batchnorm.translation import transfer as transfer
    from batchnorm.translation import translate as translate

__all__ = [
    "Affine",
    "BatchNormError",
    "Moments",
    "check",
    "compare",
    "fold",
    "functional",
    "observe",
    "prune",
    "recalibrate",
    "strip_bias",
    "summary",
    "transfer",
    "translate",
]

open_lazily(
    __name__,
    {
        "Affine": ("batchnorm.affine", ""),
        "BatchNormError": ("batchnorm.errors", ""),
        "Moments": ("batchnorm.moments", ""),
        "check": ("batchnorm.check", ""),
        "compare": ("batchnorm.lab.compare", "lab"),
        "fold": ("batchnorm.fold", ""),
        "functional": ("batchnorm.functional", ""),
        "observe": ("batchnorm.observe", ""),
        "prune": ("batchnorm.fold", ""),
        "recalibrate": ("batchnorm.recalibrate", ""),
        "strip_bias": ("batchnorm.fold", ""),
        "summary": ("batchnorm.summary", ""),
        "transfer": ("batchnorm.translation", ""),
        "translate": ("batchnorm.translation", ""),
    },
)
