"""A layer between torch and Keras, and a whole model, on every backend of Keras."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.keras import BatchNormalization

C = 3
ULPS = 128 * 2.0**-23
# how NumPy 2 sees Keras's variables on torch
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def batches(count):
    rng = np.random.default_rng(1)
    return [(2 * rng.standard_normal((5, C, 4, 2)) + 1).astype(np.float32) for _ in range(count)]


def array(v):
    return v.detach().numpy() if hasattr(v, "detach") else np.asarray(keras.ops.convert_to_numpy(v))


def random_layer():
    rng = np.random.default_rng(2)
    layer = nn.BatchNorm2d(C, eps=1e-4, momentum=0.3)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 2, C)))
    return layer


def test_a_layer_goes_on_in_keras_as_in_torch_and_comes_back():
    source = random_layer()
    layer = bn.translate(source, "keras")
    assert isinstance(layer, BatchNormalization)
    for name, variable in (("running_mean", layer.moving_mean), ("weight", layer.gamma), ("bias", layer.beta)):
        np.testing.assert_array_equal(array(variable.value), getattr(source, name).detach().numpy())
    for x in batches(5):
        source(torch.from_numpy(x))
        layer(np.moveaxis(x, 1, -1), training=True)
    back = bn.translate(layer, "torch")
    for twin in (layer.moving_mean, layer.moving_variance), (back.running_mean, back.running_var):
        for actual, expected in zip(twin, (source.running_mean, source.running_var), strict=True):
            np.testing.assert_allclose(array(getattr(actual, "value", actual)), expected.numpy(), rtol=ULPS, atol=ULPS)
    (x,) = batches(1)
    y = np.moveaxis(array(layer(np.moveaxis(x, 1, -1), training=False)), -1, 1)
    with torch.no_grad():
        np.testing.assert_allclose(y, source.eval()(torch.from_numpy(x)).numpy(), rtol=ULPS, atol=10 * ULPS)
        assert repr(back) == repr(bn.translate(source, "torch"))


def test_a_layer_of_kerass_own_goes_on_in_torch():
    layer = keras.layers.BatchNormalization(momentum=0.6)
    layer.build((None, None, None, C))
    layer.moving_variance.assign(np.array([0.5, 2.0, 3.0], np.float32))
    twin = bn.translate(layer, "torch").train()
    for x in batches(5):
        layer(np.moveaxis(x, 1, -1), training=True)
        twin(torch.from_numpy(x))
    np.testing.assert_allclose(twin.running_var.numpy(), array(layer.moving_variance.value), rtol=ULPS, atol=ULPS)
    np.testing.assert_allclose(twin.running_mean.numpy(), array(layer.moving_mean.value), rtol=ULPS, atol=ULPS)


def test_the_numbers_of_a_model_of_torch_in_keras():
    def torchs():
        return nn.Sequential(
            nn.Conv2d(C, 4, 3), random_norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 2, 2)
        ).eval()

    def random_norm(channels):
        norm = nn.BatchNorm2d(channels, eps=1e-3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
        return norm

    layers, start = keras.layers, {"kernel_initializer": "zeros"}
    target = keras.Sequential(
        [
            keras.Input((6, 4, C)),
            layers.Conv2D(4, 3, **start),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
        ]
    )
    target.add(layers.Dense(2, **start))
    # one way: each run in Keras is compiled for JAX operation by operation
    found = bn.transfer(torchs(), target)
    assert float(found.error) < 1e-12
    assert [one.note for one in found.carried] == ["", "biased variance from now on", "features in another order"]
