"""One of each family of `keras.applications` that has batch normalization: all folded, none left, equal outputs."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import applications

from batchnorm.bench.keras_applications import norms_in, randomize
from batchnorm.fold import fold
from batchnorm.keras import ScaleShift

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

# name: size of the images, norms, how many become a scale and shift because they stand before an activation and after a sum
FAMILIES = {
    "DenseNet121": (32, 121, 62),
    "EfficientNetB0": (32, 49, 0),
    "EfficientNetV2B0": (32, 59, 0),
    "InceptionResNetV2": (75, 204, 0),
    "InceptionV3": (75, 94, 0),
    "MobileNet": (32, 27, 0),
    "MobileNetV2": (32, 52, 0),
    "MobileNetV3Large": (32, 46, 0),
    "MobileNetV3Small": (32, 34, 0),
    "NASNetMobile": (32, 192, 0),
    "ResNet50": (32, 53, 0),
    "ResNet50V2": (32, 49, 17),
    "Xception": (71, 40, 0),
}
# said by keras.applications itself
NOT_ON_TORCH = ("NASNetMobile",)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_folded(name):
    if name in NOT_ON_TORCH and keras.backend.backend() == "torch":
        pytest.skip("keras.applications does not build it on torch")
    size, norms, plain = FAMILIES[name]
    model = getattr(applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    randomize(model, np.random.default_rng(0))
    assert len(norms_in(model)) == norms
    result = fold(model, np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32"))
    assert not norms_in(result.model)
    assert len(result.folded) == norms - plain
    assert [entry.became for entry in result.kept] == ["scale and shift"] * plain
    assert sum(isinstance(layer, ScaleShift) for layer in result.model._flatten_layers()) == plain
    assert float(result.error) <= 1e-12
    assert result.model.output_names == model.output_names
