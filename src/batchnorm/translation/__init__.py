"""The verbs `translate` and `transfer`: a layer, and the numbers of a whole model, in another framework."""

from batchnorm.translation.agreement import Agreement as Agreement
from batchnorm.translation.result import Carried as Carried
from batchnorm.translation.result import Transfer as Transfer
from batchnorm.translation.transferring import transfer as transfer
from batchnorm.translation.translating import translate as translate

__all__ = ["Agreement", "Carried", "Transfer", "transfer", "translate"]
