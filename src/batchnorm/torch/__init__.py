"""Batch normalization for PyTorch."""

from batchnorm.torch.layers import BatchNorm1d as BatchNorm1d
from batchnorm.torch.layers import BatchNorm2d as BatchNorm2d
from batchnorm.torch.layers import BatchNorm3d as BatchNorm3d
