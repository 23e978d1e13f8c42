"""Biases before a normalization in Keras models: gone, with the same outputs in evaluation and in training."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn
from batchnorm.errors import OptionError

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class Own(L.Dense):
    """A dense layer that may have its reasons."""


KINDS = {
    "Dense": (L.Dense(5, name="linear"), (6,), None),
    "EinsumDense": (L.EinsumDense("ab,bc->ac", (5,), bias_axes="c", name="linear"), (6,), None),
    "Conv2D": (L.Conv2D(5, 3, name="linear"), (8, 8, 3), None),
    "Conv1DTranspose": (L.Conv1DTranspose(5, 3, name="linear"), (8, 3), None),
    "DepthwiseConv2D": (L.DepthwiseConv2D(3, name="linear"), (8, 8, 3), None),
    "SeparableConv1D": (L.SeparableConv1D(5, 3, name="linear"), (8, 3), None),
    # its copy has a bias of zeros
    "a subclass": (Own(5, name="linear"), (6,), 0.0),
}


def array(v):
    return np.asarray(keras.ops.convert_to_numpy(v), np.float64)


def model(layer, shape, *between):
    keras.utils.set_random_seed(0)
    layer = type(layer).from_config(layer.get_config())
    made = keras.Sequential([keras.Input(shape), layer, *between, L.BatchNormalization(name="bn")])
    layer.bias.assign(np.random.default_rng(1).standard_normal(layer.bias.shape) + 1)
    made.layers[-1].moving_mean.assign(np.random.default_rng(2).standard_normal(made.layers[-1].moving_mean.shape))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_moves_into_the_moving_mean(kind):
    layer, shape, left = KINDS[kind]
    before = model(layer, shape)
    weights = [array(v) for v in before.weights]
    found = bn.strip_bias(before)
    assert [s.layer.split(".")[0] for s in found.stripped] == ["linear"]
    bias = found.model.get_layer("linear").bias
    assert (bias is None) == (left is None)
    assert bias is None or not array(bias).any()
    x = np.random.default_rng(0).standard_normal((7, *shape)).astype(np.float32)
    for training in (False, True):
        want, got = (array(m(x, training=training)) for m in (model(layer, shape), found.model))
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert all(np.array_equal(a, array(v)) for a, v in zip(weights, before.weights, strict=True))
    mean = array(before.get_layer("bn").moving_mean) - array(before.get_layer("linear").bias)
    np.testing.assert_allclose(
        array(bn.strip_bias(before).model.get_layer("bn").moving_mean), mean, rtol=1e-6, atol=1e-6
    )


def test_models_inside_of_models():
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([keras.Input((6,)), L.Dense(5, bias_initializer="ones", name="linear")], name="inner")
    x = keras.Input((6,))
    found = bn.strip_bias(keras.Model(x, L.BatchNormalization()(inner(x))))
    assert found.model.get_layer("inner").get_layer("linear").bias is None


@pytest.mark.parametrize("start", ["zeros", "ones"])
def test_a_bias_behind_which_something_else_comes_stays(start):
    between = keras.Sequential(
        [keras.Input((6,)), L.Dense(5, bias_initializer=start), L.ReLU(), L.BatchNormalization()]
    )
    found = bn.strip_bias(between)
    assert found.stripped == ()
    assert found.model.layers[0].bias is not None


def test_channels_are_not_pruned():
    made = keras.Sequential([keras.Input((6,)), L.Dense(5), L.BatchNormalization(name="bn"), L.Dense(2)])
    made.get_layer("bn").gamma.assign([0, 1, 1, 0, 1])
    with pytest.raises(OptionError, match="prune the model in torch"):
        bn.prune(made, threshold=0.1)
