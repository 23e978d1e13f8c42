"""The verbs `fold`, `strip_bias` and `prune`: normalization disappears from a trained network, and nothing changes."""

from batchnorm.fold.bias import Stripped as Stripped
from batchnorm.fold.bias import StripResult as StripResult
from batchnorm.fold.bias import strip_bias as strip_bias
from batchnorm.fold.folding import fold as fold
from batchnorm.fold.proof import Error as Error
from batchnorm.fold.proof import Measured as Measured
from batchnorm.fold.pruning import Pruned as Pruned
from batchnorm.fold.pruning import PruneResult as PruneResult
from batchnorm.fold.pruning import prune as prune
from batchnorm.fold.result import Folded as Folded
from batchnorm.fold.result import FoldResult as FoldResult
from batchnorm.fold.result import Kept as Kept

__all__ = [
    "Error",
    "FoldResult",
    "Folded",
    "Kept",
    "Measured",
    "PruneResult",
    "Pruned",
    "StripResult",
    "Stripped",
    "fold",
    "prune",
    "strip_bias",
]
