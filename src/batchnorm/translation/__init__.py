"""The verbs `translate` and `transfer`: a layer, and the layers of a whole model, in another framework."""

from batchnorm.translation.transferring import transfer as transfer
from batchnorm.translation.translating import translate as translate

__all__ = ["transfer", "translate"]
