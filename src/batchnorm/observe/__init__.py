"""The verb `observe`: what reaches each batch normalization layer, against what the layer stores."""

from batchnorm.observe.observation import Observation as Observation
from batchnorm.observe.observing import observe as observe
from batchnorm.observed import Observed as Observed
from batchnorm.states import Rate as Rate

__all__ = ["Observation", "Observed", "Rate", "observe"]
