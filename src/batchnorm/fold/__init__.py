"""The verb `fold`: normalization disappears from a trained network, and nothing changes."""

from batchnorm.fold.folding import fold as fold
from batchnorm.fold.result import Folded as Folded
from batchnorm.fold.result import FoldResult as FoldResult
from batchnorm.fold.result import Kept as Kept

__all__ = ["FoldResult", "Folded", "Kept", "fold"]
