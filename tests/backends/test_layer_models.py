"""Our Keras layer in whole models: convert and revert."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from layer_cases import BACKEND, PEER, BatchNormalization, array, close

from batchnorm.errors import BatchNormWarning, OptionError
from batchnorm.keras import convert, revert
from batchnorm.keras.naming import names_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
L = keras.layers


def sequential():
    return keras.Sequential(
        [keras.Input((6,)), L.Dense(4), L.BatchNormalization(name="norm", momentum=0.6), L.Dense(2)]
    )


def functional():
    shared = L.BatchNormalization(name="shared", center=False, gamma_regularizer="l2")
    first, second = keras.Input((6,), name="first"), keras.Input((6,), name="second")
    x = L.Add()([shared(first), shared(second)])
    inner = keras.Sequential(
        [keras.Input((6,)), L.BatchNormalization(name="norm", renorm=True), L.Dense(3)], name="inner"
    )
    frozen = L.BatchNormalization(name="frozen", trainable=False)
    return keras.Model({"first": first, "second": second}, [frozen(inner(x)), L.ReLU()(x)], name="whole")


def wrapped():
    norm = L.BatchNormalization(name="norm", epsilon=0.5)
    return keras.Sequential([keras.Input((2, 6)), L.TimeDistributed(norm, name="each"), L.Dense(2)])


def filled_model(make):
    keras.utils.set_random_seed(0)
    model = make()
    rng = np.random.default_rng(1)
    for v in model.weights:
        v.assign(rng.uniform(0.5, 1.5, size=tuple(v.shape)))
    return model


def inputs(model, rng):
    return (
        keras.tree.map_structure(
            lambda symbol: rng.normal(size=(5, *symbol.shape[1:])).astype("float32"), model._inputs_struct
        )
        if isinstance(model, keras.Model) and not isinstance(model, keras.Sequential)
        else rng.normal(size=(5, *model.input_shape[1:])).astype("float32")
    )


@pytest.mark.parametrize("make", [sequential, functional, wrapped])
def test_models_are_converted_and_reverted(make, rng):
    model = filled_model(make)
    x = inputs(model, rng)
    outputs = [array(y) for y in keras.tree.flatten(model(x))]
    ours = convert(model)
    back = revert(ours)
    for one, cls in ((model, PEER), (ours, BatchNormalization), (back, PEER)):
        found = names_of(one)
        assert list(found.values()) == list(names_of(model).values())
        assert {type(layer) for layer in found if isinstance(layer, PEER)} == {cls}
        assert [layer.trainable for layer in found] == [layer.trainable for layer in names_of(model)]
        assert [(v.path.split("/")[-1], v.trainable) for v in one.weights] == [
            (v.path.split("/")[-1], v.trainable) for v in model.weights
        ]
        for a, b in zip(one.get_weights(), model.get_weights(), strict=True):
            assert np.array_equal(a, b)
        for a, b in zip(keras.tree.flatten(one(x)), outputs, strict=True):
            close(a, b, rtol=1e-5)
    assert not {id(v) for v in model.weights} & {id(v) for v in ours.weights}
    assert back.get_config() == model.get_config()


def test_a_converted_model_trains_as_the_model_does(rng):
    x, y = rng.normal(2, 3, size=(24, 6)).astype("float32"), rng.normal(size=(24, 2)).astype("float32")
    models = [filled_model(sequential), convert(filled_model(sequential))]
    for model in models:
        model.compile("sgd", "mse")
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        close(a, b, rtol=1e-4)


def test_options_are_given_to_every_layer(rng):
    model = convert(filled_model(functional), virtual_batch_size=2)
    layers = {layer.name: layer for layer in names_of(model) if isinstance(layer, PEER)}
    assert {layer.virtual_batch_size for layer in layers.values()} == {2}
    assert {layer.virtual_batch_size for layer in names_of(convert(model)) if isinstance(layer, PEER)} == {2}
    with pytest.raises(OptionError, match=r"layer 'shared' has virtual_batch_size=2, which Keras's layer can't have"):
        revert(model)
    with pytest.raises(OptionError, match=r"layer 'inner.norm': renorm .* excludes debias"):
        convert(filled_model(functional), debias=True)
    with pytest.raises(
        OptionError, match=r"unknown option momentun: what our layers have .* is virtual_batch_size, unbiased"
    ):
        convert(filled_model(sequential), momentun=0.9)
    inner = convert(filled_model(wrapped), unbiased=True).get_layer("each").layer
    assert (type(inner), inner.unbiased, inner.epsilon) == (BatchNormalization, True, 0.5)
    # statistics that came without a count of steps have forgotten how they began
    layer = convert(filled_model(sequential), debias=True).get_layer("norm")
    before = array(layer.moving_mean)
    layer(np.zeros((8, 4), "float32"), training=True)
    close(layer.moving_mean, 0.6 * before)


def test_synchronized_layers_revert_where_keras_has_them():
    model = convert(filled_model(sequential), synchronized=True)
    if BACKEND == "tensorflow":
        assert revert(model).get_layer("norm").synchronized
        return
    with pytest.raises(OptionError, match=rf"layer 'norm' has synchronized=True, which .* on the backend {BACKEND}"):
        revert(model)


def test_a_single_layer_is_converted_too(rng):
    layer = L.BatchNormalization(1, name="norm")
    layer.build((None, 3, 4))
    layer.gamma.assign([1.0, 2.0, 3.0])
    ours = convert(layer, unbiased=True)
    assert (type(ours), ours.axis, ours.unbiased, array(ours.gamma).tolist()) == (
        BatchNormalization,
        1,
        True,
        [1, 2, 3],
    )
    assert type(convert(L.BatchNormalization())) is BatchNormalization
    assert type(revert(BatchNormalization())) is PEER


class Odd(L.BatchNormalization):
    """A subclass, which does something else."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


class Block(L.Layer):
    """Makes its normalization itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = L.BatchNormalization(name="inside")

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, training=None):
        return self.norm(x, training=training)


class Subclassed(keras.Model):
    """Can't be seen through."""

    def __init__(self):
        super().__init__()
        self.norm = L.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(x, training=training)


def test_what_cannot_be_converted_is_told():
    subclassed = Subclassed()
    subclassed(np.zeros((2, 3), "float32"))
    for model in (subclassed, keras.Sequential([L.Dense(2)]), L.Dense(2), "model.keras"):
        for verb in (convert, revert):
            with pytest.raises(OptionError, match=r"the model must be Sequential or functional, and built, .* got a"):
                verb(model)
    block = keras.Sequential([keras.Input((3,)), Block(name="block")])
    with pytest.raises(OptionError, match=r"the layer block of class Block must be copied"):
        convert(block)
    odd = keras.Sequential([keras.Input((3,)), Odd(name="odd"), L.BatchNormalization(name="norm")])
    with pytest.warns(BatchNormWarning, match=r"layer 'odd' is a Odd, with a class of its own: it was left as it is"):
        new = convert(odd)
    assert [type(layer) for layer in new.layers] == [Odd, BatchNormalization]
