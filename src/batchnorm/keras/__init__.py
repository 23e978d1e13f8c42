"""Batch normalization for Keras, on any of its backends; importing it lets Keras load files that hold a `ScaleShift`."""

from batchnorm.keras.layers import ScaleShift as ScaleShift
from batchnorm.keras.monitoring import Monitor as Monitor
from batchnorm.keras.normalization import BatchNormalization as BatchNormalization
from batchnorm.keras.surgery import convert as convert
from batchnorm.keras.surgery import revert as revert

__all__ = ["BatchNormalization", "Monitor", "ScaleShift", "convert", "revert"]
