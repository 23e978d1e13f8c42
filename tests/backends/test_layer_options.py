"""What our Keras layer does beside Keras's own: masks of any rank, weights, ghost batches, other moving statistics."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from layer_cases import BACKEND, PEER, BatchNormalization, array, close, compiled_step, defined, filled, gradients

import batchnorm as bn
from batchnorm.errors import OptionError, ShapeError
from batchnorm.models import adapt

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def numbers(layer):
    return [array(v) for v in layer.weights]


def masks(shape, axis, rng):
    """Yield masks of every rank and dtype that fit, each with what the definition takes."""
    places = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    for rank in range(1, len(places) + 1):
        mask = rng.random(places[:rank]) < 0.7
        mask.flat[:2] = True
        full = np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(places) - rank)), places)
        yield mask, full
        yield mask.astype("float32"), full
        yield mask * 2, full
    thin = rng.random((places[0], *[1] * (len(places) - 1))) < 0.7
    thin.flat[:2] = True
    yield thin, np.broadcast_to(thin, places)


@pytest.mark.parametrize(
    ("shape", "axis", "options"),
    [
        ((6, 3), -1, {}),
        ((4, 3, 2, 5), 1, {}),
        ((5, 4, 3), -1, {"unbiased": True}),
        ((5, 3, 4), 1, {"virtual_batch_size": 2}),
    ],
)
def test_masked_places_do_not_count(shape, axis, options, rng):
    for number, (mask, full) in enumerate(masks(shape, axis, rng)):
        x, upstream = rng.normal(3, 2, size=shape).astype("float32"), rng.normal(size=shape).astype("float32")
        valid = np.expand_dims(full, axis % x.ndim)
        layer = filled(BatchNormalization(axis, momentum=0.7, **options), shape)
        size = {"virtual_batch_size": options.get("virtual_batch_size")}
        step, wanted = defined(layer, x, upstream, mask=full, **size)
        held = np.where(valid, upstream, 0)
        y, found = gradients(layer, np.where(valid, x, 1e30 if number % 2 else -7.0), held, mask=mask)
        close(np.where(valid, y, 0), step.y, "output", 1e-5)
        for a, b in zip(found, wanted, strict=True):
            close(a, b, "gradient", 1e-5, of=upstream)
        close(layer.moving_mean, step.running_mean, "mean")
        close(layer.moving_variance, step.running_var, "variance", 1e-5)


def test_masked_places_are_normalized_as_keras_does_it(rng):
    x, upstream = rng.normal(size=(2, 6, 4, 3)).astype("float32")
    mask = rng.random((6, 4)) < 0.6
    peer, ours = (filled(cls(), x.shape) for cls in (PEER, BatchNormalization))
    (expected, wanted), (y, found) = (gradients(layer, x, upstream, mask=mask) for layer in (peer, ours))
    close(y, expected, rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient", 1e-5)
    close(array(ours(x, mask=mask)), array(ours(x)))


def test_padding_that_is_not_a_number_harms_nothing(rng):
    x = rng.normal(size=(5, 4, 3)).astype("float32")
    mask = np.ones((5, 4), bool)
    mask[1:, 2:] = False
    layers = [filled(BatchNormalization(), x.shape) for _ in range(2)]
    outputs = [
        array(layer(v, mask=mask, training=True))
        for layer, v in zip(layers, (x, np.where(mask[..., None], x, np.nan)), strict=True)
    ]
    assert np.array_equal(outputs[0][mask], outputs[1][mask])
    assert all(map(np.array_equal, *map(numbers, layers)))


def test_masks_of_layers_are_passed_on(rng):
    tokens = np.array([[3, 5, 0, 0], [2, 0, 0, 0], [1, 2, 3, 4]])
    layer = BatchNormalization(momentum=0.0, name="norm")
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(6, 3, mask_zero=True, name="embedding")(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(layer(x)))
    model(tokens, training=True)
    table = array(model.get_layer("embedding").embeddings)
    close(layer.moving_mean, table[tokens[tokens > 0]].mean(0))
    close(layer.moving_variance, table[tokens[tokens > 0]].var(0))
    # the mask goes on to the layer behind
    y, kept = array(layer(table[tokens])), tokens > 0
    mean = [row[one].mean(0) for row, one in zip(y, kept, strict=True)]
    close(array(model(tokens)), mean, rtol=1e-5)
    # with weights, Keras itself would not look for the mask
    second = BatchNormalization(momentum=0.0)
    second(
        model.get_layer("embedding")(keras.ops.convert_to_tensor(tokens)),
        sample_weight=np.array([1.0, 1.0, 0.0]),
        training=True,
    )
    close(second.moving_mean, table[[3, 5, 2]].mean(0))


def test_a_mask_over_the_channels_is_taken_as_keras_takes_it(rng):
    # channels on axis 1, and a mask of a layer that takes the last axis for the features
    x = rng.normal(size=(6, 2, 3)).astype("float32")
    mask = np.array([[True, False]] * 3 + [[True, True]] * 3)
    peer, ours = (cls(1, momentum=0.0) for cls in (PEER, BatchNormalization))
    close(array(ours(x, mask=mask, training=True)), array(peer(x, mask=mask, training=True)), rtol=1e-5)
    close(ours.moving_variance, peer.moving_variance, rtol=1e-5)


def test_nothing_that_counts_moves_nothing(rng):
    x, upstream = rng.normal(size=(2, 4, 3, 2)).astype("float32")
    for call in ({"mask": np.zeros((4, 3), bool)}, {"sample_weight": np.zeros(4)}):
        for options in ({}, {"virtual_batch_size": 2}, {"renorm": True}, {"debias": True}):
            peer, ours = filled(PEER(), x.shape), filled(BatchNormalization(**options), x.shape)
            before = numbers(ours)
            y, found = gradients(ours, x, upstream, **call)
            if options != {"renorm": True}:
                close(y, array(peer(x, mask=np.zeros((4, 3), bool), training=True)), rtol=1e-5)
            assert all(np.isfinite(g).all() for g in found)
            assert all(map(np.array_equal, numbers(ours), before))
            compiled_step(ours, x, **call)
            assert all(map(np.array_equal, numbers(ours), before))


def test_the_count_is_exact():
    x = np.array([[1e4], [1e4 + 2], [0.0]], "float32")
    layer = BatchNormalization(momentum=0.0, epsilon=0.0)
    y = array(layer(x, mask=np.array([1, 1, 0]), training=True))
    assert y[:2, 0].tolist() == [-1.0, 1.0]
    assert array(layer.moving_mean).tolist() == [10001.0]
    assert array(layer.moving_variance).tolist() == [1.0]


@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"renorm": True}, {"virtual_batch_size": 5}])
def test_a_weight_is_a_frequency(options, rng):
    x, weight = rng.normal(2, 3, size=(5, 4, 3)).astype("float32"), np.array([2, 1, 3, 0, 1])
    twice = np.repeat(x, weight, axis=0)
    upstream = rng.normal(size=x.shape).astype("float32")
    upstream[3] = 0  # of the sample that does not count
    one, many = (
        filled(BatchNormalization(**kept), x.shape) for kept in (options, {**options, "virtual_batch_size": None})
    )
    y, (dx, *_) = gradients(one, x, upstream, sample_weight=weight.astype("float32"))
    # each copy has its share of the upstream gradient
    shares = np.repeat(upstream / np.maximum(weight, 1)[:, None, None], weight, axis=0)
    expected, (wanted, *_) = gradients(many, twice, shares)
    close(np.repeat(y, weight, axis=0), expected, rtol=1e-5)
    ends = np.cumsum(weight)
    for i in np.flatnonzero(weight):
        close(dx[i], wanted[ends[i] - weight[i] : ends[i]].sum(0), "gradient", 2e-5)
    for a, b in zip(numbers(one), numbers(many), strict=True):
        close(a, b, rtol=1e-5)


def test_weights_of_places_and_masks_multiply(rng):
    x, upstream = rng.normal(size=(2, 5, 4, 3)).astype("float32")
    weight, mask = rng.random((5, 4)).astype("float32"), rng.random((5, 4)) < 0.6
    layer = filled(BatchNormalization(momentum=0.5), x.shape)
    held = np.where(mask[..., None], upstream, 0)
    step, wanted = defined(layer, x, held, mask=mask, sample_weight=weight)
    y, found = gradients(layer, x, held, mask=mask, sample_weight=weight)
    close(y[mask], step.y[mask], rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient", 1e-5, of=upstream)
    close(layer.moving_variance, step.running_var, rtol=1e-5)


def test_a_mask_of_floating_numbers_weighs(rng):
    x, upstream = rng.normal(size=(2, 5, 4, 3)).astype("float32")
    soft, weight = rng.random((2, 5, 4)).astype("float32")
    soft[1:3] = 0
    calls = ({"mask": soft, "sample_weight": weight}, {"sample_weight": soft * weight})
    layers = [filled(BatchNormalization(momentum=0.5, unbiased=True), x.shape) for _ in calls]
    results = [gradients(layer, x, upstream, **call) for layer, call in zip(layers, calls, strict=True)]
    (y, found), (expected, wanted) = results
    close(y, expected, rtol=1e-6)
    for a, b in zip((*found, *numbers(layers[0])), (*wanted, *numbers(layers[1])), strict=True):
        close(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"mask": -np.ones(4, "float32")}, OptionError, r"mask must be finite and not negative"),
        ({"mask": np.ones((5,), bool)}, ShapeError, r"mask must have the shape .* \(4, 3\), .* got \(5,\)"),
        ({"mask": np.ones((4, 3, 2), bool)}, ShapeError, r"got \(4, 3, 2\)"),
        ({"mask": np.array(True)}, ShapeError, r"got \(\)"),
        ({"sample_weight": np.ones((3, 4))}, ShapeError, r"sample_weight must have the shape .* got \(3, 4\)"),
        ({"sample_weight": -np.ones(4)}, OptionError, r"finite and not negative, got values from -1.0 to -1.0"),
        ({"sample_weight": np.array([1, np.nan, 1, 1])}, OptionError, r"finite and not negative"),
    ],
)
def test_masks_and_weights_that_do_not_fit_are_refused(call, error, text, rng):
    layer = filled(BatchNormalization(), (4, 3, 2))
    before = numbers(layer)
    for training in (True, False):
        with pytest.raises(error, match=f"(?s){text}"):
            layer(np.ones((4, 3, 2), "float32"), training=training, **call)
    assert all(map(np.array_equal, numbers(layer), before))


# -- ghost batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 3, 4, 7, 8])
def test_ghost_batches_are_those_of_the_definition(samples, rng):
    for shape, axis in (((samples, 3), -1), ((samples, 3, 2), 1)):
        x, upstream = rng.normal(1e3, 2, size=shape).astype("float32"), rng.normal(size=shape).astype("float32")
        layer = filled(BatchNormalization(axis, momentum=0.6, virtual_batch_size=3), shape)
        step, wanted = defined(layer, x, upstream, virtual_batch_size=3)
        y, found = gradients(layer, x, upstream)
        close(y, step.y, rtol=1e-5)
        for a, b in zip(found, wanted, strict=True):
            close(a, b, "gradient", 1e-5, of=upstream)
        close(layer.moving_mean, step.running_mean)
        close(layer.moving_variance, step.running_var, rtol=1e-5)


def test_ghost_batches_without_a_known_number_of_samples(rng):
    x = rng.normal(size=(26, 3)).astype("float32")
    models = []
    for eagerly in (True, False):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((3,)), keras.layers.Dense(3), BatchNormalization(virtual_batch_size=4, momentum=0.5)]
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=eagerly)
        model.fit(x, x[:, :1], batch_size=9, epochs=2, verbose=0, shuffle=False)
        models.append(model)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        close(a, b, rtol=1e-5)


def test_renormalized_ghost_batches_are_the_definition(rng):
    options = {"renorm": True, "renorm_clipping": {"rmax": 1.3, "rmin": 1 / 1.3, "dmax": 0.4}, "virtual_batch_size": 4}
    x, upstream = rng.normal(2, 2, size=(2, 10, 3)).astype("float32")
    layer = filled(BatchNormalization(**options), x.shape)
    step, wanted = defined(layer, x, upstream, renorm=(1.3, 0.4), virtual_batch_size=4)
    y, found = gradients(layer, x, upstream)
    close(y, step.y, rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient", 1e-5, of=upstream)


# -- moving statistics ---------------------------------------------------------------------------------------------


def test_debiased_statistics_forget_how_they_began(rng):
    batches = rng.normal(5, 3, size=(4, 16, 3)).astype("float32")
    layer, plain = BatchNormalization(momentum=0.9, debias=True), BatchNormalization(momentum=0.9)
    for step, x in enumerate(batches, 1):
        layer(x, training=True)
        plain(x, training=True)
        left = 0.9**step
        close(layer.moving_mean, array(plain.moving_mean) / (1 - left), rtol=1e-5)
        close(layer.moving_variance, (array(plain.moving_variance) - left) / (1 - left), rtol=1e-5)
        assert int(array(layer.updates)) == step
        if step == 1:
            close(layer.moving_mean, x.mean(0), rtol=1e-6)
    compiled_step(layer, batches[0])
    assert int(array(layer.updates)) == 5
    state = adapt(keras.Sequential([keras.Input((3,)), layer])).states()[0]
    assert (state.debiased, state.updates, state.initial_share) == (True, 5, 0.0)


def test_statistics_that_come_without_a_count_are_kept(rng):
    peer = filled(PEER(), (8, 3))
    layer = BatchNormalization(debias=True)
    layer.build((8, 3))
    store = {}
    peer.save_own_variables(store)
    layer.load_own_variables(store)
    before = array(layer.moving_mean)
    layer(np.zeros((8, 3), "float32"), training=True)
    close(layer.moving_mean, 0.99 * before)


def test_the_unbiased_variance_is_that_of_torch(rng):
    x = rng.normal(size=(5, 4, 3)).astype("float32")
    layer = BatchNormalization(momentum=0.0, unbiased=True)
    layer(x, training=True)
    close(layer.moving_variance, x.var((0, 1), ddof=1))
    # a sum of weights of one or less says nothing about it
    layer(x, training=True, sample_weight=np.full(5, 0.04, "float32"))
    close(layer.moving_variance, x.var((0, 1), ddof=1))


@pytest.mark.parametrize("call", [{}, {"mask": np.array([False, True, False])}], ids=["a batch of one", "masked"])
def test_a_single_value_has_no_spread(call, rng):
    x = rng.normal(size=(3 if call else 1, 2)).astype("float32")
    at = 1 if call else 0
    for how in ("skip", "running", "error"):
        layer = filled(BatchNormalization(on_single=how), x.shape)
        before = numbers(layer)
        if how == "error":
            with pytest.raises(ShapeError, match=r"^training needs more than one value a channel, got inputs of shape"):
                layer(x, training=True, **call)
        else:
            y = array(layer(x, training=True, **call))
            close(y[at], array(layer.beta) if how == "skip" else array(layer(x))[at])
        if call and BACKEND != "torch":
            close(array(compiled_step(layer, x, **call))[at], array(layer.beta))
        assert all(map(np.array_equal, numbers(layer), before))
    # two places of one sample are two values
    layer = filled(BatchNormalization(on_single="error"), (1, 2, 2))
    layer(rng.normal(size=(1, 2, 2)).astype("float32"), training=True)
    assert not np.array_equal(array(layer.moving_mean), before[2])


# -- the verbs -----------------------------------------------------------------------------------------------------


def test_the_verbs_know_the_layer(rng):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4),
        BatchNormalization(name="norm", unbiased=True, virtual_batch_size=4),
    ]
    model = keras.Sequential([*layers, keras.layers.Dense(2)])
    data = [rng.normal(2, 3, size=(8, 3)).astype("float32") for _ in range(3)]
    bn.recalibrate(model, data, progress=False)
    hidden = np.concatenate([array(model.layers[0](x)) for x in data])
    close(model.get_layer("norm").moving_mean, hidden.mean(0), rtol=1e-5)
    close(model.get_layer("norm").moving_variance, hidden.var(0, ddof=1), rtol=1e-5)
    folded = bn.fold(model, data[0])
    assert not any(isinstance(layer, PEER) for layer in folded.model.layers)
    close(array(folded.model(data[0])), array(model(data[0])), rtol=1e-5)
    assert "norm" in str(bn.summary(model))
    found = bn.check(model, data[0])
    assert {one.code for one in found} <= {"BN301", "BN302"}
    state = adapt(model).states()[0]
    assert (state.ghost, state.synchronized, state.debiased, state.updates) == (4, False, False, None)


def test_recalibration_weighs_as_the_layer_does(rng):
    inputs, mask, weight = keras.Input((4, 3)), keras.Input((4,), dtype="bool"), keras.Input((4,))
    layer = BatchNormalization(name="norm")
    model = keras.Model([inputs, mask, weight], layer(inputs, mask=mask, sample_weight=weight))
    data = [
        [
            rng.normal(2, 3, size=(5, 4, 3)).astype("float32"),
            rng.random((5, 4)) < 0.6,
            rng.random((5, 4)).astype("float32"),
        ]
        for _ in range(3)
    ]
    bn.recalibrate(model, data, progress=False)
    x, share = (np.concatenate(v) for v in ([one[0] for one in data], [one[1] * one[2] for one in data]))
    mean = np.average(x.reshape(-1, 3), axis=0, weights=share.ravel())
    close(layer.moving_mean, mean, rtol=1e-5)
    close(layer.moving_variance, np.average((x.reshape(-1, 3) - mean) ** 2, axis=0, weights=share.ravel()), rtol=1e-5)
