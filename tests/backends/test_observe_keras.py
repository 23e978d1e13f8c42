"""What reaches the layers of Keras models, held against NumPy over all activations; and the model stays as it is."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn
from batchnorm.errors import DataError, OptionError

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def network():
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    x = L.ReLU()(L.BatchNormalization(name="one")(L.Conv2D(6, 3, name="before")(x)))
    y = L.BatchNormalization(name="two")(L.Conv2D(6, 3, padding="same", activation="relu")(L.Dropout(0.9)(x)))
    x = L.GlobalAveragePooling2D()(L.add([x, y]))
    model = keras.Model(image, L.Dense(4)(L.BatchNormalization(name="three")(x)))
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        layer = model.get_layer(name)
        layer.moving_mean.assign(rng.standard_normal(6) * 0.3)
        layer.moving_variance.assign(rng.uniform(0.5, 2, 6))
        layer.gamma.assign(rng.standard_normal(6))
        layer.beta.assign(rng.standard_normal(6))
    return model


def batches(sizes=(7, 1, 32), mean=0.0):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 8, 8, 3)) + mean).astype(np.float32) for n in sizes]


def array(v):
    return np.asarray(keras.ops.convert_to_numpy(v), np.float64)


def seen(model, data):
    """Return what the norms get in evaluation, batch by batch, in float64."""
    shown = keras.Model(model.input, [model.get_layer(name).input for name in ("one", "two", "three")])
    found = [shown(x, training=False) for x in data]
    return {name: [array(arrays[i]) for arrays in found] for i, name in enumerate(("one", "two", "three"))}


def observe(model, data, **options):
    return bn.observe(model, data, progress=False, **options)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_numbers_in_use_are_those_of_evaluation(mean):
    model, data = network(), batches(mean=mean)
    before = [array(v) for v in model.weights]
    found = observe(model, data, use="running")
    assert [one.layer for one in found] == ["one", "two", "three"]
    assert (found.samples, found.batches, found.unreached) == (40, 3, ())
    for name, arrays in seen(model, data).items():
        one, layer = found[name], model.get_layer(name)
        parts = [x.reshape(-1, x.shape[-1]) for x in arrays]
        x, m, v = np.concatenate(parts), array(layer.moving_mean), array(layer.moving_variance)
        np.testing.assert_allclose(one.mean, x.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.variance, x.var(0), rtol=1e-5)
        own, eps = x.var(0) + layer.epsilon, layer.epsilon
        kl = 0.5 * (np.log((v + eps) / own) + (own + (x.mean(0) - m) ** 2) / (v + eps) - 1)
        np.testing.assert_allclose(one.kl, kl, rtol=1e-4, atol=1e-6)
        alive = x.var(0) > 0
        within = sum(part.var(0) * len(part) for part in parts)[alive]
        assert one.between == pytest.approx((1 - within / (x.var(0)[alive] * len(x))).mean(), rel=1e-3, abs=1e-6)
        assert one.dead == pytest.approx(1 - alive.mean())
        assert (one.count, one.values, one.unbiased) == (len(x), len(parts[1]), False)
        # channels come second
        np.testing.assert_allclose(one.inputs, np.moveaxis(arrays[0], -1, 1), rtol=1e-5, atol=1e-5)
        y = (arrays[0] - m) / np.sqrt(v + eps) * array(layer.gamma) + array(layer.beta)
        y = y.reshape(-1, y.shape[-1])
        assert one.off == (y <= 0).all(0).mean()
        assert one.saturated == pytest.approx((np.abs(y) > 3).mean(), abs=2e-3)
        np.testing.assert_array_equal(one.gamma, array(layer.gamma))
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, array(new))


def test_by_batch_each_layer_is_judged_alone():
    model, data = network(), batches((9, 31))
    found = observe(model, data)
    once = seen(model, data)["one"]
    x = np.concatenate([part.reshape(-1, 6) for part in once])
    np.testing.assert_allclose(found["one"].mean, x.mean(0), rtol=1e-5, atol=1e-5)
    # behind the first layer, by its batches
    layer, parts = model.get_layer("one"), []
    shown = keras.Model(model.get_layer("one").output, model.get_layer("two").input)
    for part in once:
        flat = part.reshape(-1, 6)
        y = (part - flat.mean(0)) / np.sqrt(flat.var(0) + layer.epsilon) * array(layer.gamma) + array(layer.beta)
        parts.append(array(shown(y.astype(np.float32), training=False)).reshape(-1, 6))
    x = np.concatenate(parts)
    np.testing.assert_allclose(found["two"].mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["two"].variance, x.var(0), rtol=1e-4)


def test_frozen_layers_are_measured_and_normalize_by_what_they_store():
    model, data = network(), batches()
    model.get_layer("one").trainable = False
    found, arrays = observe(model, data), seen(model, data)
    assert "trainable = True" in found["one"].fixed
    for name in ("one", "two"):
        x = np.concatenate([part.reshape(-1, 6) for part in arrays[name]])
        np.testing.assert_allclose(found[name].mean, x.mean(0), rtol=1e-5, atol=1e-5)
    assert len(found["one"].calls) == 1


def test_a_layer_that_is_called_twice_and_one_that_is_not():
    image = keras.Input((4, 3))
    norm = L.BatchNormalization(name="twice")
    model = keras.Model(image, norm(norm(image) * 2.0 + 1.0))
    x = np.random.default_rng(0).standard_normal((20, 4, 3)).astype(np.float32)
    one = observe(model, [x])["twice"]
    assert [m.count for m in one.calls] == [80, 80]
    np.testing.assert_allclose(one.calls[0].mean, x.astype(np.float64).mean((0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.calls[1].mean, np.ones(3), rtol=1e-4)


class Own(keras.Model):
    """A model that computes in a call of its own, with a mask, and never calls one layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.forgotten = L.BatchNormalization(), L.BatchNormalization(name="forgotten")
        self.forgotten.build((None, 3))

    def call(self, x, training=False):
        return self.norm(x, mask=x[..., 0] > 0) + 0.0


def test_masked_values_do_not_count_and_leave_no_piece():
    model, x = Own(), np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    model(x)
    found = observe(model, [(x, np.zeros(5))])
    (one,) = found
    valid = x[x[..., 0] > 0].astype(np.float64)
    np.testing.assert_allclose(one.mean, valid.mean(0), rtol=1e-6, atol=1e-7)
    assert (one.count, one.inputs, one.off) == (len(valid), None, None)
    assert len(found.unreached) == 1
    assert found.unreached[0].endswith("forgotten")


def test_effective_learning_rates():
    model = network()
    optimizer = keras.optimizers.SGD(0.25)
    optimizer.build(model.trainable_variables)
    (rate,) = observe(model, batches((4,)), optimizer=optimizer).rates
    kernel = array(model.get_layer("before").kernel)
    assert (rate.layer, rate.norm, rate.gradient) == ("before", "one", None)
    assert rate.effective == pytest.approx(0.25 / (kernel**2).sum(), rel=1e-6)
    for other in ("adam", keras.optimizers.SGD(0.1)):
        if other != "adam":
            other.build([keras.Variable(np.ones(3))])
        with pytest.raises(OptionError, match="optimizer must"):
            observe(model, batches((4,)), optimizer=other)


BAD = {
    "empty": (list, "at least one batch"),
    "sizes": (lambda: [np.zeros((2, 8, 8, 5), np.float32)], "must take the batches"),
    "inf": (lambda: [batches()[0], batches()[0] * np.float32("inf")], "'one' must be finite"),
    "raises": (lambda: (1 / 0 for _ in range(3)), "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_told(name):
    make, words = BAD[name]
    model = network()
    attributes = [sorted(vars(layer)) for layer in model.layers]
    with pytest.raises(DataError, match=words):
        observe(model, make())
    assert attributes == [sorted(vars(layer)) for layer in model.layers]
