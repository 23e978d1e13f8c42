"""Statistics of whole data sets in Keras models: exact, biased as Keras keeps them, and nothing else changes."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn
from batchnorm.errors import BatchNormError, DataError, OptionError

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def network():
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    x = L.ReLU()(L.BatchNormalization(name="one")(L.Conv2D(6, 3)(x)))
    y = L.BatchNormalization(name="two")(L.Conv2D(6, 3, padding="same")(L.Dropout(0.9)(x)))
    x = L.GlobalAveragePooling2D()(L.add([x, y]))
    return keras.Model(image, L.Dense(4)(L.BatchNormalization(name="three")(x)))


def batches(sizes=(7, 1, 32), mean=0.0):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 8, 8, 3)) + mean).astype(np.float32) for n in sizes]


def array(v):
    return np.asarray(keras.ops.convert_to_numpy(v), np.float64)


def seen(model, data):
    """Return what the norms get in evaluation, ``(values, C)`` in float64."""
    norms = [layer for layer in model.layers if isinstance(layer, L.BatchNormalization)]
    shown = keras.Model(model.input, [layer.input for layer in norms])
    found = [shown(x, training=False) for x in data]
    parts = [[array(arrays[i]).reshape(-1, arrays[i].shape[-1]) for arrays in found] for i in range(len(norms))]
    return [(layer, np.concatenate(part)) for layer, part in zip(norms, parts, strict=True)]


def everything(model):
    return (
        [array(v) for v in model.weights],
        [sorted(vars(layer)) for layer in model.layers],
        keras.random.SeedGenerator,
    )


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_first_norm_holds_the_population(mean):
    model, data = network(), batches(mean=mean)
    found = bn.recalibrate(model, data, progress=False)
    layer, values = seen(model, data)[0]
    np.testing.assert_allclose(array(layer.moving_mean), values.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), values.var(0), rtol=1e-6)
    assert [m.layer for m in found.moved] == ["one", "two", "three"]
    assert (found.samples, found.batches) == (40, 3)


def test_in_one_pass_layers_normalize_by_batch():
    model, data = network(), batches((9, 31))
    layers = [model.get_layer(name) for name in ("one", "two", "three")]
    # the stock layer in training, with a momentum that keeps nothing of the past
    parts = []
    for x in data:
        twin = network()
        for layer in twin.layers:
            if isinstance(layer, L.BatchNormalization):
                layer.momentum = 0.0
            if isinstance(layer, L.Dropout):
                layer.rate = 0.0
        twin(x, training=True)
        parts.append(
            [
                (array(layer.moving_mean), array(layer.moving_variance))
                for layer in twin.layers
                if hasattr(layer, "moving_mean")
            ]
        )
    bn.recalibrate(model, data, progress=False)
    share = np.array([9, 31]) / 40
    for number, layer in enumerate(layers):
        means, variances = (np.array([part[number][i] for part in parts]) for i in (0, 1))
        mean = share @ means
        np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(layer.moving_variance), share @ (variances + (means - mean) ** 2), rtol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_sequential_holds_what_evaluation_sees(mean):
    model, data = network(), batches(mean=mean)
    found = bn.recalibrate(model, data, method="sequential", progress=False)
    assert found.settled
    for layer, values in seen(model, data):
        np.testing.assert_allclose(array(layer.moving_mean), values.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(array(layer.moving_variance), values.var(0), rtol=1e-5)


def test_nothing_but_moving_statistics_changes():
    model = network()
    before, statistics = everything(model), [id(v) for v in model.non_trainable_variables]
    state = np.random.get_state()[1].tolist()
    bn.recalibrate(model, batches(), progress=False)
    after = everything(model)
    for v, old, new in zip(model.weights, before[0], after[0], strict=True):
        moving = "moving" in v.path
        assert np.array_equal(old, new) is not moving, v.path
    assert before[1] == after[1]
    assert statistics == [id(v) for v in model.non_trainable_variables]
    assert np.random.get_state()[1].tolist() == state


BAD = {
    "empty": (list, "at least one batch"),
    "sizes": (lambda: [np.zeros((2, 8, 8, 5), np.float32)], "must take the batches"),
    "nan": (lambda: [batches()[0], batches()[0] * np.float32("nan")], "'one' must be finite"),
    "raises": (lambda: (1 / 0 for _ in range(3)), "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_leaves_everything_as_it_was(name):
    make, words = BAD[name]
    model = network()
    before = everything(model)
    with pytest.raises(BatchNormError, match=words):
        bn.recalibrate(model, make(), progress=False)
    for old, new in zip(before[0], everything(model)[0], strict=True):
        np.testing.assert_array_equal(old, new)
    assert everything(model)[1] == before[1]


def test_frozen_layers_stay_and_are_named():
    model = network()
    model.get_layer("two").trainable = False
    before = array(model.get_layer("two").moving_mean)
    found = bn.recalibrate(model, batches(), progress=False)
    assert [m.layer for m in found.moved] == ["one", "three"]
    assert found.left[0].layer == "two"
    assert "trainable = True" in found.left[0].reason
    np.testing.assert_array_equal(array(model.get_layer("two").moving_mean), before)


def test_a_frozen_model_and_one_without_norms_are_refused():
    model = network()
    model.trainable = False
    with pytest.raises(OptionError, match="it is frozen"):
        bn.recalibrate(model, batches(), progress=False)
    with pytest.raises(OptionError, match="none was found"):
        bn.recalibrate(keras.Sequential([keras.Input((8, 8, 3)), L.Flatten()]), batches(), progress=False)
    with pytest.raises(OptionError, match="must be built"):
        bn.recalibrate(keras.Sequential([L.BatchNormalization()]), batches(), progress=False)
    with pytest.raises(OptionError, match="leave device out"):
        bn.recalibrate(network(), batches(), device="cpu", progress=False)


class Own(keras.Model):
    """A model that computes in a call of its own, with a mask."""

    def __init__(self):
        super().__init__()
        self.norm = L.BatchNormalization()
        self.inner = keras.Sequential([L.Dense(3), L.BatchNormalization(name="deep")])

    def call(self, x, training=False):
        # a sum, so that the mask ends here
        return self.inner(self.norm(x, mask=x[..., 0] > 0) + 0.0)


def test_own_models_nested_layers_and_masks():
    model, x = Own(), np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    model(x)
    found = bn.recalibrate(model, [(x[:2], np.zeros(2)), (x[2:], np.zeros(3))], progress=False)
    assert len(found.moved) == 2
    assert found.moved[1].layer.endswith("deep")
    valid = x[x[..., 0] > 0].astype(np.float64)
    np.testing.assert_allclose(array(model.norm.moving_mean), valid.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(array(model.norm.moving_variance), valid.var(0), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -1, 2])
def test_channels_on_any_axis(axis):
    model = keras.Sequential([keras.Input((4, 5, 6)), L.BatchNormalization(axis=axis)])
    x = np.random.default_rng(0).standard_normal((7, 4, 5, 6)).astype(np.float32)
    bn.recalibrate(model, [x[:3], x[3:]], progress=False)
    axes = tuple(i for i in range(4) if i != axis % 4)
    np.testing.assert_allclose(
        array(model.layers[0].moving_mean), x.astype(np.float64).mean(axes), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(array(model.layers[0].moving_variance), x.astype(np.float64).var(axes), rtol=1e-6)


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        x = batches()[index]
        return x, np.zeros(len(x))


@pytest.mark.parametrize(
    "make",
    [
        Data,
        lambda: [(x, np.zeros(len(x)), np.ones(len(x))) for x in batches()],
        lambda: np.concatenate(batches()),
        lambda: (x for x in batches()),
    ],
    ids=["PyDataset", "x, y, weights", "one array", "generator"],
)
def test_the_forms_of_data_that_keras_knows(make):
    # Keras says that this class does no more than it does
    model = keras.Sequential([keras.Input((8, 8, 3)), L.BatchNormalization()])
    found = bn.recalibrate(model, make(), progress=False)
    assert found.samples == 40
    values = np.concatenate(batches()).astype(np.float64)
    np.testing.assert_allclose(array(model.layers[0].moving_variance), values.var((0, 1, 2)), rtol=1e-6)


def test_forward_calls_the_model_in_its_own_way():
    model = keras.Sequential([keras.Input((8, 8, 3)), L.BatchNormalization()])
    data = [{"pixels": x} for x in batches()]
    bn.recalibrate(model, data, forward=lambda model, batch: model(batch["pixels"], training=False), progress=False)
    values = np.concatenate(batches()).astype(np.float64)
    np.testing.assert_allclose(array(model.layers[0].moving_mean), values.mean((0, 1, 2)), rtol=1e-5, atol=1e-7)


def test_what_is_wrong_is_said_in_words_of_ours():
    model = keras.Sequential([keras.Input((3,)), L.BatchNormalization(name="norm")])
    with pytest.raises(DataError, match=r"^what reaches layer 'norm' must be finite.* before$"):
        bn.recalibrate(model, [np.full((4, 3), np.nan, "float32")], progress=False)
