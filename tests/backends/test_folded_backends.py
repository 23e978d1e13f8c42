"""Folding on every backend of Keras: running, copies in float64, layers and their outputs."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn

# NumPy 2 says it whenever Keras makes an array of a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def network(rng):
    """Return a network whose statistics, γ and β are no initial ones."""
    net = keras.Sequential(
        [keras.Input((6, 6, 3)), L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU(), L.Flatten(), L.Dense(2)]
    )
    norm = net.layers[1]
    norm.set_weights([rng.uniform(0.5, 2.0, 4), *rng.standard_normal((2, 4)), rng.uniform(0.5, 2.0, 4)])
    return net


def test_a_network_is_folded_whole(rng):
    net, x = network(rng), rng.standard_normal((4, 6, 6, 3)).astype("float32")
    before = net.predict(x, verbose=0)
    result = bn.fold(net, x)
    assert [type(layer).__name__ for layer in result.model.layers] == ["Conv2D", "ReLU", "Flatten", "Dense"]
    np.testing.assert_allclose(result.model.predict(x, verbose=0), before, rtol=2e-5, atol=2e-5)
