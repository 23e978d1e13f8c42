"""Our Keras layer is Keras's own over the whole range of its constructor, and the definition in values and gradients."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import inspect

import keras
import numpy as np
import pytest
from layer_cases import (
    BACKEND,
    PEER,
    SHAPES,
    BatchNormalization,
    array,
    close,
    compiled_step,
    defined,
    filled,
    gradients,
)

from batchnorm.errors import BatchNormError, BatchNormWarning, ChannelError, OptionError, ShapeError
from batchnorm.keras import convert

# what Keras does with tensors of torch
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

RENORM = {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.6, "dmax": 0.2}, "renorm_momentum": 0.7}
CONSTRUCTORS = {
    "plain": {},
    "momentum, epsilon": {"momentum": 0.6, "epsilon": 0.3},
    "no center": {"center": False},
    "no scale": {"scale": False},
    "neither": {"center": False, "scale": False},
    "initializers": {
        "beta_initializer": "ones",
        "gamma_initializer": keras.initializers.Constant(0.5),
        "moving_mean_initializer": "ones",
        "moving_variance_initializer": keras.initializers.Constant(4.0),
    },
    "regularizers, constraints": {
        "beta_regularizer": "l2",
        "gamma_regularizer": keras.regularizers.L1(0.1),
        "beta_constraint": "non_neg",
        "gamma_constraint": keras.constraints.MaxNorm(1.0),
    },
    "renorm": {"renorm": True},
    "renorm, clipped": RENORM,
    "mixed_float16": {"dtype": "mixed_float16"},
    "mixed_bfloat16": {"dtype": "mixed_bfloat16"},
    "frozen": {"trainable": False},
}


def numbers(layer):
    return [array(v.value) for v in layer.weights]


def test_the_constructor_takes_what_that_of_keras_takes_in_the_same_order():
    def positional(cls):
        kinds = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        return [(p.name, p.default) for p in kinds]

    assert positional(BatchNormalization) == positional(PEER)


@pytest.mark.parametrize(("number", "options"), list(enumerate(CONSTRUCTORS.values())), ids=CONSTRUCTORS)
def test_it_does_what_keras_does(number, options, rng):
    half = "mixed" in str(options.get("dtype"))
    for shape, axis in [SHAPES[1 + number % 3]]:
        peer, ours = PEER(axis, name="norm", **options), BatchNormalization(axis, name="norm", **options)
        peer.build(shape)
        ours.build(shape)
        assert ours.get_config() == peer.get_config()
        for step in range(2):
            x = rng.normal(step, 2, size=shape).astype("float32")
            upstream = rng.normal(size=shape).astype("float32")
            expected, wanted = gradients(peer, x, upstream)
            y, found = gradients(ours, x, upstream)
            assert y.dtype == expected.dtype
            close(y, expected, "output", rtol=1e-2 if half else 1e-5)
            for a, b in zip(found, wanted, strict=True):
                close(a, b, "gradient", rtol=2e-2 if half else 5e-5)
        for a, b, v in zip(numbers(ours), numbers(peer), ours.weights, strict=True):
            close(a, b, v.name, rtol=1e-5)
        close(array(ours(x)), array(peer(x)), "evaluation", rtol=1e-2 if half else 1e-5)
        assert [(v.name, v.shape, v.dtype, v.trainable) for v in ours.weights] == [
            (v.name, v.shape, v.dtype, v.trainable) for v in peer.weights
        ]
        close([array(v) for v in ours.losses], [array(v) for v in peer.losses])
        assert [v.constraint is None for v in ours.weights] == [v.constraint is None for v in peer.weights]


@pytest.mark.parametrize(
    ("shape", "axis", "renorm"), [*((*one, None) for one in SHAPES), *((*one, (1.3, 0.4)) for one in SHAPES[1:3])]
)
def test_it_is_the_definition(shape, axis, renorm, rng):
    clipping = {"renorm": True, "renorm_clipping": {"rmax": 1.3, "rmin": 1 / 1.3, "dmax": 0.4}} if renorm else {}
    layer = filled(BatchNormalization(axis, momentum=0.7, **clipping), shape)
    x, upstream = rng.normal(3, 2, size=shape), rng.normal(size=shape)
    step, wanted = defined(layer, x, upstream, renorm=renorm)
    past = (array(layer.moving_mean.value), array(layer.moving_variance.value))
    y, found = gradients(layer, x, upstream)
    close(y, step.y, "output", 1e-5)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient", 1e-5)
    close(layer.moving_mean.value, 0.7 * past[0] + 0.3 * step.moments.mean, "mean")
    if renorm is None:
        close(layer.moving_variance.value, step.running_var, "variance")


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
@pytest.mark.parametrize(("shape", "axis"), [((2048, 6), -1), ((8, 6, 7, 7), 1)])
def test_far_from_zero_nothing_cancels(mean, shape, axis, rng):
    x = (rng.normal(size=shape) + mean).astype("float32")
    layer = filled(BatchNormalization(axis, momentum=0.0), shape)
    step, wanted = defined(layer, x, upstream := rng.normal(size=shape).astype("float32"))
    y, found = gradients(layer, x, upstream)
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    given = keras.ops.convert_to_tensor(x)
    # with the sums of this backend
    two_pass = array(keras.ops.mean(keras.ops.square(given - keras.ops.mean(given, axes, keepdims=True)), axes))
    exact = step.moments.variance
    errors = [
        np.max(np.abs(np.asarray(v, np.float64) - exact) / exact)
        for v in (array(layer.moving_variance.value), two_pass)
    ]
    assert errors[0] <= 2 * errors[1] + 4 * np.finfo(np.float32).eps
    close(y, step.y, "output", 1e-5)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient", 3e-5)
    still = layer(x)
    close(array(still), step.y, "evaluation", rtol=3e-7 * mean)


def test_a_constant_channel_puts_out_beta():
    x = np.full((64, 8, 8, 2), 1e5 / 3, "float32")
    layer = BatchNormalization(momentum=0.0)
    close(layer(x, training=True), np.zeros(x.shape), atol=1e-6)
    close(layer.moving_variance.value, [0, 0], atol=1e-6)


def test_float64_stays_float64(rng):
    if BACKEND == "jax" and not __import__("jax").config.jax_enable_x64:
        # JAX has no float64 unless the process starts with it
        assert str(BatchNormalization(dtype="float32").compute_dtype) == "float32"
        return
    x, upstream = rng.normal(1e5, size=(6, 4, 3)), rng.normal(size=(6, 4, 3))
    layer = filled(BatchNormalization(dtype="float64"), x.shape)
    step, wanted = defined(layer, x, upstream)
    y, found = gradients(layer, x, upstream)
    assert y.dtype == np.float64
    close(y, step.y, "output", 1e-9)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, "gradient", 1e-9)


def test_half_precision_does_not_overflow():
    x = np.array([[300.0], [-300.0]], "float16").repeat(500, axis=0)
    layer = BatchNormalization(momentum=0.0, dtype="mixed_float16")
    y = array(layer(x, training=True))
    close(np.abs(y), np.ones(y.shape), rtol=1e-3)
    close(layer.moving_variance.value, [9e4])


# -- files ---------------------------------------------------------------------------------------------------------


def small(cls, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), cls(name="norm", **options), keras.layers.Dense(2)]
    )
    for i, v in enumerate(model.get_layer("norm").weights):
        v.assign(np.linspace(0.5, 1.5, int(np.prod(v.shape))).reshape(v.shape) + i)
    return model


def test_files_go_both_ways(tmp_path, rng, monkeypatch):
    x = rng.normal(size=(5, 3)).astype("float32")
    for cls, other, swap in [(PEER, BatchNormalization, convert), (BatchNormalization, PEER, lambda model: model)]:
        model = small(cls, momentum=0.7)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        with monkeypatch.context() as patch:
            # as where this library is not there
            patch.delitem(keras.saving.get_custom_objects(), "batchnorm>BatchNormalization")
            swapped = swap(keras.saving.load_model(tmp_path / "model.keras", {"batchnorm>BatchNormalization": PEER}))
        same = keras.saving.load_model(tmp_path / "model.keras")
        assert [type(m.get_layer("norm")) for m in (model, swapped, same)] == [cls, other, cls]
        third = small(other)
        third.get_layer("norm").gamma.assign(np.zeros(4))
        third.load_weights(tmp_path / "model.weights.h5")
        for one in (swapped, same, third):
            close(array(one(x)), array(model(x)))
            assert one.get_layer("norm").momentum in (0.7, 0.99)


def test_a_plain_layer_has_the_config_of_keras():
    ours = BatchNormalization(axis=1, momentum=0.5, gamma_regularizer="l2", **RENORM)
    again = PEER.from_config(ours.get_config())
    assert again.get_config() == ours.get_config()
    used = BatchNormalization(virtual_batch_size=4, unbiased=True, debias=True, on_single="error")
    copy = BatchNormalization.from_config(used.get_config())
    assert copy.get_config() == used.get_config()
    assert copy.get_config().keys() - ours.get_config().keys() == {
        "virtual_batch_size",
        "unbiased",
        "debias",
        "on_single",
    }
    assert BatchNormalization.from_config(BatchNormalization(synchronized=True).get_config()).synchronized


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fit_evaluate_predict_are_those_of_keras(compiled, rng):
    x, y = rng.normal(3, 2, size=(20, 3)).astype("float32"), rng.normal(size=(20, 2)).astype("float32")
    found = []
    for cls in (PEER, BatchNormalization):
        model = small(cls, momentum=0.8)
        how = {"jit_compile": BACKEND != "torch"} if compiled else {"run_eagerly": True}
        model.compile("sgd", "mse", **how)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        model.train_on_batch(x, y)
        found.append([model.evaluate(x, y, verbose=0), model.predict(x, verbose=0), *model.get_weights()])
    for a, b in zip(*found, strict=True):
        close(a, b, rtol=1e-4)


def test_a_frozen_layer_is_in_inference(rng):
    x = rng.normal(3, 2, size=(8, 3)).astype("float32")
    layer = filled(BatchNormalization(), x.shape)
    before = numbers(layer)
    layer.trainable = False
    close(array(layer(x, training=True)), array(layer(x, training=False)))
    assert all(map(np.array_equal, numbers(layer), before))
    assert len(layer.trainable_weights) == 0
    layer.trainable = True
    assert not np.allclose(array(layer(x, training=True)), array(layer(x, training=False)))


# -- batches that hold nothing, or nothing sound -------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, RENORM, {"debias": True, "virtual_batch_size": 2}])
def test_what_is_not_finite_does_not_reach_the_moving_statistics(bad, options, rng):
    x = rng.normal(size=(6, 3)).astype("float32")
    x[2, 1] = bad
    layer = filled(BatchNormalization(**options), x.shape)
    before = numbers(layer)
    with pytest.warns(BatchNormWarning, match=r"a batch with inf or NaN was left out of the moving statistics"):
        y = array(layer(x, training=True))
    assert np.isnan(y[:, 1]).any()
    assert np.isfinite(y[:, [0, 2]]).all()
    assert all(map(np.array_equal, numbers(layer), before))
    layer(x, training=True)  # is said once
    if BACKEND != "torch":
        compiled_step(layer, x)
        assert all(map(np.array_equal, numbers(layer), before))
    layer(np.nan_to_num(x, posinf=0, neginf=0), training=True)
    assert not any(map(np.array_equal, numbers(layer)[2:], before[2:]))


def test_an_empty_batch_gives_an_empty_output():
    layer = filled(BatchNormalization(), (4, 2, 3))
    before = numbers(layer)
    for training in (True, False):
        assert array(layer(np.zeros((0, 2, 3), "float32"), training=training)).shape == (0, 2, 3)
    y, grads = gradients(layer, np.zeros((0, 2, 3)), np.zeros((0, 2, 3)))
    assert y.shape == (0, 2, 3)
    assert all(np.isfinite(g).all() for g in grads)
    assert all(map(np.array_equal, numbers(layer), before))


# -- errors --------------------------------------------------------------------------------------------------------


WRONG = [
    ({"axis": (1, 2)}, r"axis must be one integer, got \(1, 2\)"),
    ({"axis": "last"}, r"axis must be a number, got 'last'"),
    ({"momentum": 1.5}, r"momentum, the weight of the past, must be between 0 and 1, got 1.5"),
    ({"epsilon": -1e-3}, r"epsilon must be 0 or more, and finite, got -0.001"),
    ({"virtual_batch_size": 1}, r"virtual_batch_size must be None or an integer of at least 2 samples, got 1"),
    ({"virtual_batch_size": 2.5}, r"of at least 2 samples, got 2.5"),
    ({"virtual_batch_size": 4, "synchronized": True}, r"virtual_batch_size .* and synchronized .*: give one of them"),
    ({"on_single": "raise"}, r"on_single must be one of 'skip', 'running', 'error', got 'raise'"),
    ({"renorm": True, "debias": True}, r"renorm .* excludes debias"),
    ({"renorm": True, "unbiased": True}, r"renorm .* excludes unbiased"),
    (
        {"renorm": True, "renorm_clipping": {"rmx": 1.0}},
        r"Received invalid keys for `renorm_clipping` argument: {'rmx'",
    ),
    ({"renorm": True, "renorm_clipping": {"rmax": 0.5, "rmin": 1.0}}, r"rmax should be greater .* rmax=0.5, rmin=1.0"),
    ({"renorm": True, "renorm_clipping": {"dmax": -1.0}}, r"dmax should be non-negative .* dmax=-1.0"),
    ({"gama": True}, r"Keras takes no such layer: .*gama"),
    ({"gamma_initializer": "onse"}, r"Keras takes no such layer: .*onse"),
]


@pytest.mark.parametrize(("options", "text"), WRONG)
def test_a_wrong_option_is_refused(options, text):
    with pytest.raises(OptionError, match=f"(?s){text}"):
        BatchNormalization(**options)


def test_inputs_that_do_not_fit_are_refused(rng):
    for axis in (2, -3):
        with pytest.raises(ShapeError, match=rf"got axis {axis} for inputs of shape \(4, 3\)"):
            BatchNormalization(axis)(np.zeros((4, 3), "float32"))
    with pytest.raises(ShapeError, match=r"have two of them at least"):
        BatchNormalization()(np.zeros(4, "float32"))
    with pytest.raises(ShapeError, match=r"the number of channels must be known"):
        BatchNormalization()(keras.Input((3, None)))
    with pytest.raises(OptionError, match=r"virtual_batch_size cuts axis 0"):
        BatchNormalization(0, virtual_batch_size=2)(np.zeros((4, 3), "float32"))
    layer = filled(BatchNormalization(name="norm"), (4, 3))
    before = numbers(layer)
    with pytest.raises(
        ChannelError, match=r"layer 'norm' was built for 3 channels on axis -1, got inputs of shape \(4, 5\)"
    ):
        layer(np.zeros((4, 5), "float32"), training=True)
    with pytest.raises(ShapeError, match=r"was built for inputs with 2 axes, got shape \(4, 2, 3\)"):
        layer(np.zeros((4, 2, 3), "float32"), training=True)
    with pytest.raises(
        BatchNormError, match=r"mask must have the shape of the inputs without the axis of the channels, \(4,\)"
    ):
        layer(np.zeros((4, 3), "float32"), mask=np.ones((5,), bool), training=True)
    assert all(map(np.array_equal, numbers(layer), before))


@pytest.mark.skipif(BACKEND != "torch", reason="the other backends have no gradient of ours")
def test_derivatives_of_derivatives_are_right(rng):
    import torch

    from batchnorm.keras.on_torch import normalize

    x, gamma, beta = (torch.tensor(rng.normal(size=size), requires_grad=True) for size in ((4, 3, 2), (3,), (3,)))
    for derived in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert derived(lambda *given: normalize(given[0], 1, *given[1:], 1e-3)[0], (x, gamma, beta))
        assert derived(lambda x: normalize(x, 1, None, None, 1e-3)[0], (x,))
