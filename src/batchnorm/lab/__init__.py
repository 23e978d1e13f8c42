"""The laboratory: compare networks with and without batch normalization, with evidence."""

from typing import TYPE_CHECKING

from batchnorm.rooms import open_lazily

if TYPE_CHECKING:
    from batchnorm.lab.arms import ARMS as ARMS
    from batchnorm.lab.arms import Arm as Arm
    from batchnorm.lab.compare import compare as compare
    from batchnorm.lab.data import Dataset as Dataset
    from batchnorm.lab.data import load_data as load_data
    from batchnorm.lab.deploy import load_model as load_model
    from batchnorm.lab.networks import hidden as hidden
    from batchnorm.lab.results import Best as Best
    from batchnorm.lab.results import Comparison as Comparison
    from batchnorm.lab.verdicts import Margins as Margins

__all__ = [
    "ARMS",
    "Arm",
    "Best",
    "Comparison",
    "Dataset",
    "Margins",
    "compare",
    "hidden",
    "load_data",
    "load_model",
]

# a worker that trains needs a few of these rooms, and would wait for all
open_lazily(
    __name__,
    {
        "ARMS": ("batchnorm.lab.arms", "lab"),
        "Arm": ("batchnorm.lab.arms", "lab"),
        "Best": ("batchnorm.lab.results", "lab"),
        "Comparison": ("batchnorm.lab.results", "lab"),
        "Dataset": ("batchnorm.lab.data", "lab"),
        "Margins": ("batchnorm.lab.verdicts", "lab"),
        "compare": ("batchnorm.lab.compare", "lab"),
        "hidden": ("batchnorm.lab.networks", "lab"),
        "load_data": ("batchnorm.lab.data", "lab"),
        "load_model": ("batchnorm.lab.deploy", "lab"),
    },
)
