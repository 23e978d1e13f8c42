"""The laboratory: compare networks with and without batch normalization, with evidence."""

from batchnorm.lab.arms import ARMS as ARMS
from batchnorm.lab.arms import Arm as Arm
from batchnorm.lab.compare import Best as Best
from batchnorm.lab.compare import Comparison as Comparison
from batchnorm.lab.compare import compare as compare
from batchnorm.lab.data import Dataset as Dataset
from batchnorm.lab.data import load as load_data
from batchnorm.lab.deploy import load as load_model
from batchnorm.lab.networks import hidden as hidden
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
