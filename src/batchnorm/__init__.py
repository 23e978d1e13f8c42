"""Batch normalization through the whole life of a network.

Everything is made of two small things: `Moments` (count, mean, sum of squared deviations), which are merged, and `Affine`
(scale, shift), which is moved. Importing this package loads NumPy and nothing else; PyTorch and the rest are loaded by the
verb that needs them.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from batchnorm.rooms import require

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batchnorm import functional as functional
    from batchnorm.affine import Affine as Affine
    from batchnorm.errors import BatchNormError as BatchNormError
    from batchnorm.lab import compare as compare
    from batchnorm.moments import Moments as Moments
    from batchnorm.summary import summary as summary

# public name -> the room it lives in, the extra that the room needs
_PUBLIC = {
    "Affine": ("batchnorm.affine", ""),
    "BatchNormError": ("batchnorm.errors", ""),
    "Moments": ("batchnorm.moments", ""),
    "compare": ("batchnorm.lab", "lab"),
    "functional": ("batchnorm.functional", ""),
    "summary": ("batchnorm.summary", ""),
}

__all__ = ["Affine", "BatchNormError", "Moments", "compare", "functional", "summary"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}; it has {', '.join(__all__)}")
    room = require(*_PUBLIC[name])
    globals()[name] = value = getattr(room, name, room)
    return value


def __dir__() -> list[str]:
    return [*globals(), *(name for name in _PUBLIC if name not in globals())]


class _Package(ModuleType):
    """Keeps ``bn.summary`` the verb when the file ``summary.py`` is imported, which would bind the module to the name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType) and hasattr(value, name)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
