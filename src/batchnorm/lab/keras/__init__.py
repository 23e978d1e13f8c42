"""The laboratory for networks that are built and trained in Keras, on any of its backends that train."""

from batchnorm.lab.keras.networks import hidden as hidden

__all__ = ["hidden"]
