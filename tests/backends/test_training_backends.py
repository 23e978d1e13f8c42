"""What is looked at and changed around training, compiled or not, on every backend of Keras."""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn
from batchnorm.errors import OptionError
from batchnorm.keras import Monitor
from batchnorm.keras.model import KerasModel
from batchnorm.states import BatchSizes, Mend, Optimization

# NumPy 2 says it whenever Keras makes an array of a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

BN = L.BatchNormalization
BACKEND = keras.backend.backend()


def array(v):
    return np.asarray(keras.ops.convert_to_numpy(v), np.float64)


def data(*shape, mean=2.0):
    return (np.random.default_rng(0).standard_normal(shape or (8, 6)) + mean).astype(np.float32)


def sequential(*layers, shape=(6,)):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), *layers])


def dense(**options):
    return sequential(L.Dense(4, name="dense"), BN(name="bn", **options), L.Dense(2, name="end"))


def test_no_other_backend_is_loaded():
    assert ("tensorflow" in sys.modules) is (BACKEND == "tensorflow")


def test_sparing_an_optimizer_that_the_model_was_compiled_with():
    model, optimizer = dense(), keras.optimizers.SGD(1e-9, weight_decay=1e7)
    model.compile(optimizer, "mse")
    x, y, layer = data(), data(8, 2), model.get_layer("bn")
    model.fit(x, y, verbose=0)
    assert (array(layer.gamma) < 0.995).all()
    assert KerasModel(model).optimization(optimizer) == Optimization({"bn": 1e7}, 1, None)
    assert KerasModel(model).spare(optimizer) == 2
    before = array(layer.gamma)
    model.fit(x, y, verbose=0)
    np.testing.assert_allclose(array(layer.gamma), before, rtol=1e-5)


def test_what_was_compiled_is_compiled_anew():
    model, x = sequential(BN(name="bn", momentum=0.5)), data()
    model.compile("sgd", "mse")
    before = model.predict(x, verbose=0)
    model.fit(x, x, verbose=0)
    KerasModel(model).mend({"bn": Mend(eps=10.0, decay=1.0)})
    held = array(model.layers[0].moving_mean)
    assert np.abs(model.predict(x, verbose=0) - before).max() > 0.1
    model.fit(x, x, verbose=0)
    np.testing.assert_array_equal(array(model.layers[0].moving_mean), held)


def test_statistics_of_a_compiled_model_are_used_at_once():
    model, x = sequential(BN(name="bn")), data(40, 6)
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)
    bn.recalibrate(model, x, progress=False)
    y = model.predict(x, verbose=0)
    np.testing.assert_allclose([y.mean(0), y.var(0)], [[0] * 6, x.var(0) / (x.var(0) + 1e-3)], atol=1e-5)


def test_a_function_of_the_model_that_reaches_a_layer_of_it_moves_nothing():
    layer = BN(name="bn")
    layer.build((None, 6))
    model = sequential(L.Lambda(lambda x: layer(x, training=True), output_shape=(6,)), L.Dense(2))
    KerasModel(model).rehearse(data())
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(6))


def test_a_rehearsal_leaves_no_trace():
    model = sequential(L.Dense(4), BN(name="bn"), L.Dropout(0.5), L.Dense(2))
    before, state = [array(v) for v in model.weights], np.random.get_state()[1].tolist()
    seen = KerasModel(model).rehearse(data())
    assert dict(seen.calls) == {"bn": 1}
    for v, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(array(v), old)
    assert np.random.get_state()[1].tolist() == state


def trained():
    model = sequential(L.Dense(4, name="dense"), BN(momentum=0.9, name="norm"), shape=(5,))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def test_the_monitor_sees_the_batch_and_training_is_the_same():
    expected, model = trained(), trained()
    x, y = data(24, 5, mean=0.0), data(24, 4, mean=0.0)
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    expected.fit(x, y, **options)
    monitor = Monitor(every=2)
    model.fit(x, y, callbacks=[monitor], **options)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [record["step"] for record in monitor.history] == [0, 2]
    # of the first batch, by the first weights; the moving statistics start at 0 and 1
    first = trained()
    kernel = first.get_layer("dense").get_weights()[0].astype(np.float64)
    values, eps = x[:8].astype(np.float64) @ kernel, first.get_layer("norm").epsilon
    own = values.var(0) + eps
    kl = 0.5 * (np.log((1 + eps) / own) + (own + values.mean(0) ** 2) / (1 + eps) - 1)
    assert monitor.history[0]["layers"]["norm"]["distance"] == pytest.approx(kl.mean(), rel=1e-4)
    assert monitor.history[0]["layers"]["norm"]["dead"] == 0.0
    after = model.get_layer("dense").get_weights()[0].astype(np.float64)
    assert monitor.history[1]["weights"]["dense"]["effective_rate"] == pytest.approx(0.1 / (after**2).sum(), rel=1e-5)


def test_a_model_is_checked_with_its_optimizer():
    model, x = trained(), data(24, 5)
    model.fit(x, data(24, 4), batch_size=1, verbose=0)
    report = bn.check(model, x, optimizer=model.optimizer, loader=(24, 1))
    assert "BN107 norm" in str(report), str(report)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data comes with TensorFlow")
def test_data_sets_of_tensorflow():
    import tensorflow as tf

    x = data(40, 6)
    pairs = tf.data.Dataset.from_tensor_slices((x, np.zeros((40, 2), np.float32))).batch(16)
    model = dense()
    view = KerasModel(model)
    found = bn.recalibrate(model, pairs, progress=False, method="sequential")
    assert (found.samples, found.batches) == (40, 3)
    again = dense()
    bn.recalibrate(again, [x[:16], x[16:32], x[32:]], progress=False, method="sequential")
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert bn.observe(model, pairs.map(lambda x, y: (x, y)).prefetch(1), progress=False).samples == 40
    assert view.batch_sizes(pairs) == BatchSizes(16, 8, 40)
    assert view.batch_sizes(pairs.repeat()) == BatchSizes(16)
    assert view.batch_sizes(pairs.filter(lambda x, y: True)) == BatchSizes(16)
    whole = tf.data.Dataset.from_tensor_slices(x).batch(16, drop_remainder=True)
    assert view.batch_sizes(whole) == BatchSizes(16, 16, 32)
    assert view.batch_sizes(whole.repeat()) == BatchSizes(16, 16)
    for empty in (pairs.take(0), pairs.filter(lambda x, y: False)):
        with pytest.raises(OptionError, match="at least one batch"):
            view.batch_sizes(empty)
    with pytest.raises(bn.BatchNormError, match="at least one batch"):
        bn.recalibrate(model, pairs.take(0), progress=False)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has them")
def test_tensors_of_tensorflow_are_examples_and_data():
    import tensorflow as tf

    model, x = dense(), data(40, 6)
    result = bn.fold(model, tf.constant(x[:2]))
    assert len(result.folded) == 1
    assert bn.recalibrate(model, tf.constant(x), progress=False).samples == 40
    # in a graph of the user's own
    np.testing.assert_allclose(tf.function(result.model)(x[:2]), result.model(x[:2]), rtol=1e-5, atol=1e-6)
