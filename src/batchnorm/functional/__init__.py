"""The definition of batch normalization, over any array library, and the spellings that other frameworks gave it."""

from batchnorm.functional.definition import Gradients as Gradients
from batchnorm.functional.definition import Normalized as Normalized
from batchnorm.functional.definition import Renorm as Renorm
from batchnorm.functional.definition import batch_norm_backward as batch_norm_backward
from batchnorm.functional.definition import batch_norm_inference as batch_norm_inference
from batchnorm.functional.definition import batch_norm_inference_backward as batch_norm_inference_backward
from batchnorm.functional.definition import batch_norm_train as batch_norm_train
from batchnorm.functional.definition import update_running as update_running
from batchnorm.functional.example import batch_norm_example_inference as batch_norm_example_inference
from batchnorm.functional.groups import ghost_batches as ghost_batches
from batchnorm.functional.spellings import batch_normalization as batch_normalization
from batchnorm.functional.spellings import batch_normalization_test as batch_normalization_test
from batchnorm.functional.spellings import batch_normalization_train as batch_normalization_train
from batchnorm.functional.spellings import moments as moments
