"""The verb `recalibrate`: running statistics become those of a whole data set, and nothing else changes."""

from batchnorm.recalibrate.recalibration import recalibrate as recalibrate
from batchnorm.recalibrate.result import Left as Left
from batchnorm.recalibrate.result import Moved as Moved
from batchnorm.recalibrate.result import Recalibration as Recalibration

__all__ = ["Left", "Moved", "Recalibration", "recalibrate"]
