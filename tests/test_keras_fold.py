"""Folding of Keras models: held against Keras itself in float64, layer by layer; what must decline, declines."""

import json
import os
import random
import zipfile

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812
from keras import ops
from keras.src.backend.common import dtypes as keras_dtypes

import batchnorm as bn
from batchnorm.errors import DataError, OptionError, OutputError
from batchnorm.fold import fold
from batchnorm.keras import ScaleShift
from batchnorm.keras.files import load, save
from batchnorm.keras.model import KerasModel
from keras_judge import BN, apart, chain, example_for, folded, gone, graph, kept, norms_in, numbers, randomize, run

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

BACKEND = keras.backend.backend()
TABLE = dict(keras_dtypes.BIT64_TO_BIT32_DTYPE)


# name: shape of the input, the layer; all of them without padding
LINEAR = {
    "dense": ((7,), lambda **k: L.Dense(5, **k)),
    "dense of sequences": ((4, 7), lambda **k: L.Dense(5, **k)),
    "dense of maps": ((2, 3, 7), lambda **k: L.Dense(5, **k)),
    "conv1d": ((9, 4), lambda **k: L.Conv1D(6, 3, **k)),
    "conv1d strided": ((9, 4), lambda **k: L.Conv1D(6, 3, strides=2, **k)),
    "conv1d grouped": ((9, 4), lambda **k: L.Conv1D(6, 3, groups=2, **k)),
    "conv2d": ((6, 7, 4), lambda **k: L.Conv2D(6, (2, 3), **k)),
    "conv2d strided": ((6, 7, 4), lambda **k: L.Conv2D(6, 3, strides=(2, 1), **k)),
    "conv2d dilated": ((6, 7, 4), lambda **k: L.Conv2D(6, 2, dilation_rate=2, **k)),
    "conv2d grouped": ((6, 7, 4), lambda **k: L.Conv2D(6, 3, groups=2, **k)),
    "conv2d one group each": ((6, 7, 4), lambda **k: L.Conv2D(8, 3, groups=4, **k)),
    "conv2d 1x1 same": ((6, 7, 4), lambda **k: L.Conv2D(6, 1, padding="same", **k)),
    "conv2d first": ((4, 6, 7), lambda **k: L.Conv2D(6, 3, data_format="channels_first", **k)),
    "conv3d": ((4, 4, 5, 2), lambda **k: L.Conv3D(3, 2, **k)),
    "conv3d grouped first": ((2, 4, 4, 5), lambda **k: L.Conv3D(4, 2, groups=2, data_format="channels_first", **k)),
    "depthwise1d": ((9, 3), lambda **k: L.DepthwiseConv1D(3, **k)),
    "depthwise2d": ((6, 7, 3), lambda **k: L.DepthwiseConv2D(3, **k)),
    "depthwise2d times 2": ((6, 7, 3), lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, **k)),
    "depthwise2d first": ((3, 6, 7), lambda **k: L.DepthwiseConv2D(2, depth_multiplier=2, data_format="channels_first", **k)),
    "separable1d": ((9, 3), lambda **k: L.SeparableConv1D(5, 3, depth_multiplier=2, **k)),
    "separable2d": ((6, 7, 3), lambda **k: L.SeparableConv2D(5, 3, **k)),
    "separable2d times 3": ((6, 7, 3), lambda **k: L.SeparableConv2D(5, 2, depth_multiplier=3, **k)),
    "separable2d first": ((3, 6, 7), lambda **k: L.SeparableConv2D(5, 3, data_format="channels_first", **k)),
}  # fmt: skip
# those that are only absorbing what comes after them
PADDED = {
    "conv1d same": ((9, 4), lambda **k: L.Conv1D(6, 3, padding="same", **k)),
    "conv1d causal": ((9, 4), lambda **k: L.Conv1D(6, 3, padding="causal", dilation_rate=2, **k)),
    "conv2d same strided": ((6, 7, 4), lambda **k: L.Conv2D(6, 3, padding="same", strides=2, **k)),
    "conv2d same dilated": ((6, 7, 4), lambda **k: L.Conv2D(6, 3, padding="same", dilation_rate=2, **k)),
    "conv2d same even": ((6, 7, 4), lambda **k: L.Conv2D(6, 2, padding="same", **k)),
    "conv3d same": ((4, 4, 5, 2), lambda **k: L.Conv3D(3, 3, padding="same", **k)),
    "depthwise2d same": ((6, 7, 3), lambda **k: L.DepthwiseConv2D(3, padding="same", strides=2, **k)),
    "separable2d same": ((6, 7, 3), lambda **k: L.SeparableConv2D(5, 3, padding="same", **k)),
}
TRANSPOSED = {
    "transposed1d": ((5, 4), lambda **k: L.Conv1DTranspose(6, 3, strides=2, **k)),
    "transposed2d": ((4, 5, 4), lambda **k: L.Conv2DTranspose(6, 3, **k)),
    "transposed2d same": ((4, 5, 4), lambda **k: L.Conv2DTranspose(6, 3, strides=2, padding="same", **k)),
    "transposed2d first": (
        (4, 4, 5),
        lambda **k: L.Conv2DTranspose(6, 2, strides=2, data_format="channels_first", **k),
    ),
    "transposed3d": ((3, 3, 4, 2), lambda **k: L.Conv3DTranspose(3, 2, strides=2, **k)),
}
ALL = {**LINEAR, **PADDED, **TRANSPOSED}


def axis_of(name):
    return 1 if name.endswith("first") else -1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_norm_after_a_linear_layer_folds_backward(name, use_bias):
    shape, make = ALL[name]
    model = chain(shape, make(use_bias=use_bias, name="linear"), BN(axis=axis_of(name)), L.ReLU())
    result = gone(model, how="backward")
    assert result.folded[0].into[0].startswith("linear")
    assert result.model.get_layer("linear").use_bias


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_norm_before_an_unpadded_linear_layer_folds_forward(name, use_bias):
    shape, make = LINEAR[name]
    result = gone(chain(shape, BN(axis=axis_of(name)), make(use_bias=use_bias, activation="tanh")), how="forward")
    assert result.model.layers[0].use_bias


@pytest.mark.parametrize("name", PADDED)
def test_a_norm_before_a_padded_layer_stays(name):
    shape, make = PADDED[name]
    kept(chain(shape, BN(), make()), "pads with zeros, which would not be shifted")


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_norm_before_a_transposed_convolution_stays(name):
    shape, make = TRANSPOSED[name]
    kept(chain(shape, BN(axis=axis_of(name)), make()), "transposed convolution")


@pytest.mark.parametrize("name", [*PADDED, *TRANSPOSED])
def test_a_norm_that_only_scales_passes_into_padded_and_transposed_layers(name):
    shape, make = {**PADDED, **TRANSPOSED}[name]
    model = chain(shape, BN(center=False, axis=axis_of(name)), make())
    norms_in(model)[0].moving_mean.assign(np.zeros(norms_in(model)[0].moving_mean.shape))
    gone(model, how="forward")


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-7, 0.5])
def test_every_form_of_the_norm(scale, center, epsilon):
    def norm():
        return BN(scale=scale, center=center, epsilon=epsilon)

    result = gone(chain((7,), norm(), L.Dense(6, "relu"), norm(), L.Dense(5), norm()))
    assert [f.how for f in result.folded] == ["forward", "forward", "backward"]


@pytest.mark.parametrize("name", ["dense", "conv2d", "depthwise2d", "separable2d", "conv1d grouped"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu", "softmax", "leaky_relu"])
def test_a_norm_after_an_activation_inside_of_a_layer_never_folds_backward(name, activation):
    shape, make = ALL[name]
    result = kept(chain(shape, make(activation=activation, name="linear"), BN()), "linear.activation")
    assert "positive scale" in result.kept[0].reason or "neither linear" in result.kept[0].reason


def test_constants_of_layers_are_the_same_in_float64():
    scaling = L.Normalization(mean=[0.485, 0.456, 0.406], variance=[0.0524, 0.0502, 0.0506])
    gone(chain((3,), L.Rescaling(1 / 3), scaling, L.Dense(4), BN()), how="backward")


# -- what an Affine passes -----------------------------------------------------------------------------------------

PASSED = {
    "dropout": ((5,), [L.Dropout(0.5), L.GaussianNoise(1.0), L.GaussianDropout(0.3), L.AlphaDropout(0.3)]),
    "activity": ((5,), [L.ActivityRegularization(0.1), L.Identity(), L.Activation("linear")]),
    "spatial dropout": ((6, 6, 5), [L.SpatialDropout2D(0.5)]),
    "average pooling": ((6, 6, 5), [L.AveragePooling2D(2)]),
    "average pooling same": ((7, 6, 5), [L.AveragePooling2D(3, 2, padding="same")]),
    "average pooling 1d same": ((8, 5), [L.AveragePooling1D(3, 1, padding="same")]),
    "average pooling 3d": ((4, 4, 4, 5), [L.AveragePooling3D(2, padding="same")]),
    "global average": ((6, 6, 5), [L.GlobalAveragePooling2D()]),
    "global average kept": ((6, 6, 5), [L.GlobalAveragePooling2D(keepdims=True)]),
    "upsampling": ((3, 4, 5), [L.UpSampling2D(2)]),
    "upsampling bilinear": ((3, 4, 5), [L.UpSampling2D(2, interpolation="bilinear")]),
    "upsampling 1d": ((3, 5), [L.UpSampling1D(2)]),
    "cropping": ((6, 6, 5), [L.Cropping2D(((1, 0), (0, 2)))]),
    "reshape": ((4, 6, 5), [L.Reshape((24, -1))]),
    "permute": ((4, 6, 5), [L.Permute((2, 1, 3))]),
    "no padding": ((4, 6, 5), [L.ZeroPadding2D(0)]),
}


@pytest.mark.parametrize("name", PASSED)
def test_a_norm_passes_backward(name):
    shape, between = PASSED[name]
    gone(chain(shape, L.Dense(6, name="dense"), *map(again, between), BN()), ["dense"], "backward")


@pytest.mark.parametrize("name", PASSED)
def test_a_norm_passes_forward(name):
    shape, between = PASSED[name]
    gone(chain(shape, L.Activation("tanh"), BN(), *map(again, between), L.Dense(3, name="dense")), ["dense"], "forward")


def again(layer):
    return type(layer).from_config(layer.get_config())


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_flatten_repeats_the_channels_in_its_own_order(data_format):
    axis = -1 if data_format == "channels_last" else 1
    gone(chain((3, 4, 5), L.Activation("tanh"), BN(axis=axis), L.Flatten(data_format), L.Dense(4)), how="forward")


@pytest.mark.parametrize("pool", [L.MaxPooling2D(2), L.MaxPooling2D(3, 2, "same"), L.GlobalMaxPooling2D()])
def test_max_pooling_passes_positive_scales_and_no_others(pool):
    gone(chain((6, 6, 5), L.Conv2D(4, 1), again(pool), BN(), positive=True), how="backward")
    kept(chain((6, 6, 5), L.Conv2D(4, 1), again(pool), BN()), "passes positive scales only")


@pytest.mark.parametrize(
    "layer", [L.ReLU(), L.LeakyReLU(0.1), L.PReLU(), L.Activation("relu"), L.ReLU(negative_slope=0.2)]
)
def test_a_positive_scale_passes_what_is_homogeneous_and_a_shift_does_not(layer):
    model = chain((5,), L.Dense(4), again(layer), BN(center=False), positive=True)
    norms_in(model)[0].moving_mean.assign(np.zeros(4))
    gone(model, how="backward")
    kept(chain((5,), L.Dense(4), again(layer), BN(), positive=True), "passes nothing but a positive scale")


@pytest.mark.parametrize(
    "layer",
    [
        L.ReLU(max_value=6.0), L.ReLU(threshold=0.5), L.ELU(), L.Softmax(), L.Activation("sigmoid"), L.Activation("tanh"),
        L.Activation("gelu"), L.Activation("softmax"), L.Activation("relu6"), L.LayerNormalization(), L.RepeatVector(3),
        L.UnitNormalization(), L.Rescaling(2.0),
    ],
)  # fmt: skip
def test_not_even_a_positive_scale_passes_what_is_not_homogeneous(layer):
    model = chain((5,), L.Dense(4), again(layer), BN(center=False), positive=True)
    norms_in(model)[0].moving_mean.assign(np.zeros(4))
    kept(model, layer.name.split("_")[0])


def test_what_pads_with_zeros_passes_a_scale_and_no_shift():
    gone_model = chain((4, 4, 5), L.Conv2D(4, 1), L.ZeroPadding2D(1), BN(center=False))
    norms_in(gone_model)[0].moving_mean.assign(np.zeros(4))
    gone(gone_model, how="backward")
    kept(chain((4, 4, 5), L.Conv2D(4, 1), L.ZeroPadding2D(1), BN()), "pads with a constant")


def test_an_interpolation_that_overshoots_is_left_alone():
    kept(chain((4, 4, 5), L.Conv2D(4, 1), L.UpSampling2D(2, interpolation="bicubic"), BN()), "UpSampling2D")


# -- graphs --------------------------------------------------------------------------------------------------------


def test_a_residual_block_folds_and_its_skip_too():
    x = keras.Input((6, 6, 3))
    a = L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(x))
    b = L.BatchNormalization()(L.Conv2D(4, 1)(x))
    y = L.ReLU()(L.Add()([a, b]))
    gone(graph(x, L.GlobalAveragePooling2D()(y)), how="backward")


@pytest.mark.parametrize("plus", [lambda a, b: L.Add()([a, b]), lambda a, b: a + b], ids=["layer", "operator"])
def test_a_norm_after_a_sum_folds_into_both_sides(plus):
    x = keras.Input((7,))
    gone(graph(x, BN()(plus(L.Dense(4, name="a")(x), L.Dense(4, name="b")(x)))), ["a b"], "backward")


@pytest.mark.parametrize("merge", [L.Average(), L.Concatenate()], ids=["average", "concatenate"])
def test_a_norm_after_a_merge_folds_into_all_sides(merge):
    x = keras.Input((7,))
    result = gone(graph(x, BN()(again(merge)([L.Dense(4, name="a")(x), L.Dense(4, name="b")(x)]))), ["a b"], "backward")
    assert result.folded[0].layer.startswith("batch_normalization")


@pytest.mark.parametrize("merge", [L.Maximum(), L.Minimum()], ids=["maximum", "minimum"])
def test_a_norm_after_a_maximum_folds_where_it_is_positive(merge):
    for positive in (True, False):
        x = keras.Input((7,))
        y = BN()(again(merge)([L.Dense(4, name="a")(x), L.Dense(4, name="b")(x)]))
        if positive:
            gone(graph(x, y, positive=True), ["a b"], "backward")
        else:
            kept(graph(x, y), "positive scales only")


@pytest.mark.parametrize("merge", [L.Subtract(), L.Multiply(), L.Dot(1)], ids=["subtract", "multiply", "dot"])
def test_other_merges_are_left_alone(merge):
    x = keras.Input((7,))
    y = again(merge)([L.Dense(4)(x), L.Dense(4)(x)])
    kept(graph(x, BN()(y)), "neither linear nor commutes")


def test_a_sum_that_broadcasts_is_left_alone():
    x = keras.Input((3, 4, 5))
    y = L.Add()([L.Dense(5)(x), L.Dense(5)(L.GlobalAveragePooling2D(keepdims=True)(x))])
    kept(graph(x, BN()(y)), "(Add)")


@pytest.mark.parametrize(
    "operation",
    [lambda y: y * 2.0, lambda y: y + 1.0, ops.square, ops.abs, lambda y: ops.clip(y, -1, 1), lambda y: y[:, 1:]],
    ids=["times", "plus", "square", "abs", "clip", "slice"],
)
def test_other_operations_are_left_alone(operation):
    x = keras.Input((7,))
    kept(graph(x, BN()(operation(L.Dense(4)(x)))), "neither linear nor commutes")


def test_operations_are_copied_and_those_that_are_known_pass():
    x = keras.Input((7,))
    y = ops.concatenate([L.Dense(3, name="a")(x), L.Dense(2, name="b")(x)], axis=-1)
    result = gone(graph(x, ops.relu(BN()(y))), ["a b"], "backward")
    assert "Relu" in {type(operation).__name__ for operation in result.model.operations}


def test_several_inputs_and_outputs_keep_their_names_and_structure():
    inputs = {"left": keras.Input((7,), name="left"), "right": keras.Input((5,), name="right")}
    a = BN(name="a_norm")(L.Dense(4)(inputs["left"]))
    b = BN(name="b_norm")(L.Dense(4)(inputs["right"]))
    model = graph(inputs, {"sum": L.Add(name="sum")([a, b]), "a": a})
    result = gone(model, how="backward")
    assert set(result.model.input) == {"left", "right"}
    assert set(result.model.output) == {"sum", "a"}
    # losses are named by the layers of the outputs: an Identity has the name of the norm
    assert sorted(result.model.output_names) == sorted(model.output_names) == ["a_norm", "sum"]
    assert "b_norm" not in [layer.name for layer in result.model.layers]
    other = fold(model, {"right": np.zeros((1, 5)), "left": np.zeros((1, 7))})
    assert len(other.folded) == 2


def test_a_list_of_inputs_is_given_in_order():
    a, b = keras.Input((7,), name="a"), keras.Input((5,), name="b")
    model = graph([a, b], [BN()(L.Dense(4)(a)), BN()(L.Dense(3)(b))])
    x = example_for(model)
    assert len(fold(model, tuple(x)).folded) == 2
    assert len(fold(model, {"b": x[1], "a": x[0]}).folded) == 2
    gone(model, x=x)


def test_what_two_layers_read_is_not_changed():
    x = keras.Input((7,))
    y = L.Dense(4, name="shared_source")(x)
    model = graph(x, [BN(name="norm")(y), L.Activation("tanh", name="reader")(y)])
    kept(model, "the output of shared_source before it is used by reader too")


def test_an_output_of_the_model_is_not_changed():
    x = keras.Input((7,))
    y = L.Dense(4)(x)
    kept(graph(x, [y, L.Dense(3)(L.Activation("tanh")(BN()(y)))]), "it is an output of the model")


def test_a_layer_that_is_called_twice_folds_where_both_calls_agree():
    a, b, dense, norm = keras.Input((7,), name="a"), keras.Input((7,), name="b"), L.Dense(4, name="dense"), BN()
    gone(graph([a, b], L.Concatenate()([norm(dense(a)), norm(dense(b))])), ["dense"], "backward")


def test_a_layer_that_is_called_twice_stays_where_its_calls_differ():
    a, b, dense = keras.Input((7,), name="a"), keras.Input((7,), name="b"), L.Dense(4, name="dense")
    result = folded(graph([a, b], L.Concatenate()([BN()(dense(a)), BN()(dense(b))])))
    assert not result.folded
    assert all("dense is used in another place too" in entry.reason for entry in result.kept)


def test_a_layer_that_is_called_with_and_without_a_norm_stays():
    a, b, dense = keras.Input((7,), name="a"), keras.Input((7,), name="b"), L.Dense(4, name="dense")
    kept(graph([a, b], L.Concatenate()([BN()(dense(a)), dense(b)])), "dense is used in another place too")


def test_a_layer_twice_in_a_sequential_model():
    dense = L.Dense(7, name="dense")
    kept(chain((7,), dense, L.Activation("tanh"), dense, BN()), "dense is used in another place too")


# -- models inside of models ---------------------------------------------------------------------------------------


def encoder(name="encoder"):
    x = keras.Input((7,))
    return keras.Model(x, BN(name="norm")(L.Dense(4, name="dense")(x)), name=name)


def test_a_model_inside_of_a_model_inside_of_a_model():
    inner = keras.Sequential([keras.Input((7,)), encoder(), L.ReLU(), BN(name="last")], name="inner")
    x = keras.Input((7,))
    model = graph(x, L.Dense(3, name="head")(inner(x)))
    result = gone(model, ["inner.encoder.dense", "head"])
    assert isinstance(result.model.get_layer("inner"), keras.Sequential)
    assert len(result.model.get_layer("inner").layers) == 2
    # the norm that ends the functional encoder leaves its name behind
    assert [layer.name for layer in result.model.get_layer("inner").get_layer("encoder").layers][-1] == "norm"


def test_a_norm_moves_across_the_wall_of_a_model():
    trunk = keras.Sequential([keras.Input((7,)), L.Dense(4, name="dense")], name="trunk")
    gone(chain((7,), trunk, BN()), ["trunk.dense"], "backward")
    head = keras.Sequential([keras.Input((7,)), L.Dense(4, name="dense")], name="head")
    gone(chain((7,), L.Activation("tanh"), BN(), head), ["head.dense"], "forward")


def test_a_model_of_which_nothing_is_left():
    only = keras.Sequential([keras.Input((4,)), BN(name="only_norm")], name="only")
    result = gone(chain((7,), L.Dense(4), only))
    assert [type(layer) for layer in result.model.get_layer("only").layers] == [L.Identity]


def test_a_model_that_is_called_twice():
    shared = encoder()
    a, b = keras.Input((7,), name="a"), keras.Input((7,), name="b")
    gone(graph([a, b], L.Subtract()([shared(a), shared(b)])), ["encoder.dense"], "backward")
    shared = keras.Sequential([keras.Input((7,)), L.Dense(4, name="dense")], name="encoder")
    kept(graph([a, b], L.Subtract()([BN()(shared(a)), shared(b)])), "encoder.dense is used in another place too")


def test_inputs_of_an_inner_model_that_it_takes_by_name():
    p, q = keras.Input((4,), name="p"), keras.Input((4,), name="q")
    inner = keras.Model(
        {"p": p, "q": q}, L.Subtract()([L.Dense(3, name="of_p")(p), L.Dense(3, name="of_q")(q)]), name="inner"
    )
    x = keras.Input((4,))
    y = inner({"q": BN()(L.Activation("tanh")(x)), "p": x})
    gone(graph(x, y), ["inner.of_q"], "forward")


def test_an_inner_model_that_squeezes_its_input():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(3)], name="inner")
    x = keras.Input((4,))
    y = inner(L.Reshape((4, 1))(BN()(L.Activation("tanh")(x))))
    gone(graph(x, y), how="forward")


def test_an_inner_model_whose_inputs_can_not_be_told_apart_is_not_entered():
    p, q = keras.Input((4,), name="p"), keras.Input((4,), name="q")
    inner = keras.Model([p, q], L.Subtract()([L.Dense(3)(p), L.Dense(3)(q)]), name="inner")
    x = keras.Input((4,))
    squeezed = L.Reshape((4, 1))(BN()(L.Activation("tanh")(x)))
    kept(graph(x, inner([L.Activation("sigmoid")(x), squeezed])), "inner (Functional)")


@pytest.mark.parametrize("frozen", [True, False])
def test_flags_of_training_are_kept(frozen):
    model = chain((7,), L.Dense(4, name="dense"), BN(), L.Dense(3, name="head"))
    model.get_layer("dense").trainable = not frozen
    result = gone(model)
    assert result.model.get_layer("dense").trainable is not frozen
    assert result.model.get_layer("head").trainable
    model.trainable = False
    assert not fold(model).model.trainable


def test_a_frozen_norm_folds_as_any_other():
    model = chain((7,), L.Dense(4), BN(trainable=False))
    gone(model, how="backward")


def test_configs_are_kept():
    dense = L.Dense(4, use_bias=False, kernel_regularizer="l2", kernel_constraint="non_neg", name="dense")
    new = gone(chain((7,), dense, BN())).model.get_layer("dense").get_config()
    assert new == {**dense.get_config(), "use_bias": True}


def test_a_class_of_the_user_is_kept():
    class Mine(keras.Model):
        def answer(self):
            return 42

    x = keras.Input((7,))
    model = randomize(Mine(x, BN()(L.Dense(4)(x)), name="mine"))
    result = gone(model)
    assert type(result.model) is Mine
    assert result.model.answer() == 42


# -- einsum, scale and shift ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "shape", "output", "bias_axes"),
    [
        ("ab,bc->ac", (7,), 5, "c"),
        ("abc,cd->abd", (3, 7), (None, 5), None),
        ("abc,dc->abd", (3, 7), (None, 5), "d"),
        ("...x,xy->...y", (3, 4, 7), (5,), "y"),
        ("acb,cd->adb", (3, 7), (5, 7), "d"),
    ],
)
def test_einsum_layers_that_are_dense_layers(equation, shape, output, bias_axes):
    axis = 1 if equation.startswith("acb") else -1
    layer = L.EinsumDense(equation, output, bias_axes=bias_axes, name="einsum")
    gone(chain(shape, layer, BN(axis=axis)), ["einsum"], "backward")
    layer = L.EinsumDense(equation, output, bias_axes=bias_axes, name="einsum")
    gone(chain(shape, L.Activation("tanh"), BN(axis=axis), layer), ["einsum"], "forward")


@pytest.mark.parametrize(
    ("equation", "shape", "output", "bias_axes"),
    [
        ("abc,cde->abde", (3, 7), (None, 5, 2), "e"),
        ("abc,c->abc", (3, 7), (None, 7), "c"),
        ("abc,cd->adb", (3, 7), (5, 3), None),
        ("abc,bc->ab", (3, 7), (3,), None),
        ("abc,cd->abd", (3, 7), (3, 5), "bd"),
    ],
)
def test_other_einsum_layers_are_left_alone(equation, shape, output, bias_axes):
    kept(chain(shape, L.EinsumDense(equation, output, bias_axes=bias_axes), BN()), "EinsumDense")


def test_what_is_left_is_a_scale_and_shift_of_any_axis():
    for axis in (1, 2, 3, -1):
        result = kept(
            chain((3, 4, 5), L.Activation("tanh"), BN(axis=axis, name="norm")), "it is an output of the model"
        )
        layer = result.model.get_layer("norm")
        assert type(layer) is ScaleShift
        assert layer.axis == axis
        assert [w.name for w in layer.weights] == ["scale", "shift"]


def test_a_norm_moves_into_a_scale_and_shift():
    model = chain((3, 4), L.Activation("tanh"), ScaleShift(name="left"), BN())
    result = folded(model)
    assert [(f.into, f.how) for f in result.folded] == [(("left",), "backward")]
    assert not result.kept
    again_ = fold(result.model)
    assert not again_.folded
    assert not again_.kept


def test_norms_in_a_row_become_one():
    result = folded(chain((7,), L.Activation("tanh"), BN(), L.Dropout(0.1), BN(), L.Activation("tanh")))
    assert len(result.folded) == 1
    assert [entry.became for entry in result.kept] == ["scale and shift"]


# -- what must decline ---------------------------------------------------------------------------------------------


def test_another_axis_than_that_of_the_layer():
    kept(chain((4, 5), L.Dense(4), BN(axis=1)), "it normalizes another axis than the one that dense")
    kept(
        chain((4, 5), L.Activation("tanh"), BN(axis=1), L.Dense(4)),
        "it normalizes another axis than the one that dense",
    )


def test_a_padding_that_other_sizes_would_need():
    # with 8 places this stride pads nothing; with 7 it would
    def model(size):
        return chain((size, 3), L.Activation("tanh"), BN(), L.Conv1D(4, 2, strides=2, padding="same"))

    gone(model(8), how="forward")
    x = np.random.default_rng(0).standard_normal((2, 8, 3)).astype("float32")
    result = kept(model(None), "pads with zeros", x=x)
    odd = np.random.default_rng(0).standard_normal((2, 7, 3)).astype("float32")
    assert result.model(odd).shape == (2, 4, 4)


def test_a_norm_that_is_called_in_training():
    x = keras.Input((7,))
    result = folded(graph(x, BN(name="norm")(L.Dense(4)(x), training=True)))
    assert [(entry.layer, entry.became) for entry in result.kept] == [("norm", "unchanged")]
    assert "batch" in result.kept[0].reason
    inner = encoder()
    result = folded(graph(x, inner(x, training=True)))
    assert [(entry.layer, entry.became) for entry in result.kept] == [("encoder.norm", "unchanged")]
    # frozen, it does not look at the batch
    gone(graph(x, BN(trainable=False)(L.Dense(4)(x), training=True)))
    gone(graph(x, BN()(L.Dense(4)(x), training=False)))


def test_dropout_that_is_called_in_training():
    x = keras.Input((7,))
    kept(graph(x, BN()(L.Dropout(0.5)(L.Dense(4)(x), training=True))), "Dropout")


def set_variance(model, *values):
    (norm,) = norms_in(model)
    variance = np.ones(norm.moving_variance.shape)
    variance[: len(values)] = values
    norm.moving_variance.assign(variance)
    return model


@pytest.mark.parametrize(
    ("value", "word"),
    [(-0.5, "negative"), (np.nan, "not finite"), (np.inf, "not finite")],
    ids=["negative", "nan", "inf"],
)
def test_statistics_that_are_none(value, word):
    model = set_variance(chain((7,), L.Dense(4), BN(name="norm")), value)
    with np.errstate(all="ignore"):
        result = fold(model, example_for(model))
    assert word in result.kept[0].reason
    assert result.kept[0].became == "unchanged"
    assert not result.folded


@keras.saving.register_keras_serializable(package="test")
class Shifted(BN):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask) + 1.0


@keras.saving.register_keras_serializable(package="test")
class Named(BN):
    """A subclass that computes what its parent does."""


@keras.saving.register_keras_serializable(package="test")
class DenseOfSquares(L.Dense):
    def call(self, inputs, training=None):
        return super().call(inputs * inputs)


@keras.saving.register_keras_serializable(package="test")
class DenseByName(L.Dense):
    """A subclass that computes what its parent does."""


@keras.saving.register_keras_serializable(package="test")
class Block(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = L.Dense(4, name="dense"), BN(name="norm")

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], 4))

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 4)


def test_a_subclass_of_the_norm():
    kept(chain((7,), L.Dense(4), Shifted()), "class Shifted, which computes in its own way", became="unchanged")
    gone(chain((7,), L.Dense(4), Named()), how="backward")


def test_a_subclass_of_a_linear_layer():
    kept(chain((7,), DenseOfSquares(4), BN(), L.Activation("tanh")), "DenseOfSquares")
    gone(chain((7,), DenseByName(4), BN()), how="backward")
    kept(chain((7,), DenseByName(4, use_bias=False), BN()), "can't be given a bias", "DenseByName")


def test_a_call_that_is_replaced_on_the_object():
    model = chain((7,), L.Dense(4, name="dense"), BN())
    dense, own = model.get_layer("dense"), model.get_layer("dense").call
    object.__setattr__(dense, "call", lambda x, training=None: own(x) ** 2)
    result = KerasModel(model).graph(None)
    assert [type(node.operation).__name__ for node in result.nodes] == ["Other", "Normalize"]


def test_a_layer_made_of_layers_is_not_seen_through():
    result = folded(chain((7,), Block(name="block"), L.Dense(3, name="after"), BN(name="last")))
    assert [(f.layer, f.into) for f in result.folded] == [("last", ("after",))]
    (entry,) = result.kept
    assert (entry.layer, entry.became) == ("block.norm", "unchanged")
    assert "block (Block) uses it, whose call can't be seen through" in entry.reason


def test_a_function_of_keras_is_not_seen_through():
    p = keras.Input((7,))
    function = keras.Function(p, BN(name="norm")(L.Dense(4, name="dense")(p)), name="function")
    x = keras.Input((7,))
    result = fold(graph(x, L.Activation("tanh")(function(x))))
    (entry,) = result.kept
    assert (entry.layer, entry.became) == ("function.norm", "unchanged")
    assert "function (Function) uses it" in entry.reason


def test_a_layer_that_an_unseen_layer_uses_too():
    @keras.saving.register_keras_serializable(package="test")
    class User(L.Layer):
        def __init__(self, dense, **kwargs):
            super().__init__(**kwargs)
            self.dense = dense

        def call(self, x):
            return self.dense(x) * 2.0

        def get_config(self):
            return {**super().get_config(), "dense": keras.saving.serialize_keras_object(self.dense)}

        @classmethod
        def from_config(cls, config):
            return cls(**{**config, "dense": keras.saving.deserialize_keras_object(config["dense"])})

    x, dense = keras.Input((7,)), L.Dense(4, name="dense")
    model = graph(x, [BN()(dense(x)), User(dense, name="user")(x)])
    result = fold(model, example_for(model))
    assert "the weights of dense may not change: user (User) uses it" in result.kept[0].reason
    assert apart(run(model, example_for(model)), run(result.model, example_for(model))) < 1e-6


def test_layers_that_share_a_variable():
    class Tied(L.Layer):
        def __init__(self, kernel=None, **kwargs):
            super().__init__(**kwargs)
            self.own = kernel

        def call(self, x):
            return ops.matmul(x, ops.transpose(self.own))

    x, dense = keras.Input((7,)), L.Dense(4, use_bias=False, name="dense")
    h = BN()(dense(x))
    model = keras.Model(x, Tied(dense.kernel, name="tied")(h))
    graph_ = KerasModel(model).graph(None)
    (weights,) = graph_.weights()
    assert weights.locked == "it shares weights with tied"
    assert [layer.trainable for layer in bn.summary(model).layers] == [28, 8, 0]


def test_layers_around_layers_are_not_seen_through():
    model = chain((3, 7), L.TimeDistributed(L.Dense(4)), BN())
    kept(model, "TimeDistributed")
    result = folded(chain((3, 7), L.TimeDistributed(BN(name="inside"), name="timed")))
    assert [(entry.layer, entry.became) for entry in result.kept] == [("timed.inside", "unchanged")]


def test_a_recurrent_layer_and_a_lambda_stay_between():
    kept(chain((3, 7), L.LSTM(4), BN()), "LSTM")
    model = chain((7,), L.Dense(4), L.Lambda(lambda v: v * v), BN())
    result = fold(model, example_for(model))
    assert "Lambda" in result.kept[0].reason
    assert apart(run(model, example_for(model)), run(result.model, example_for(model))) < 1e-6


def test_an_activation_that_is_not_known():
    def odd(v):
        return v * v

    model = chain((7,), L.Dense(4, activation=odd, name="dense"), BN())
    result = fold(model, example_for(model))
    assert "dense.activation (odd)" in result.kept[0].reason
    assert result.model.get_layer("dense").activation is odd


def test_an_activation_that_is_a_layer():
    kept(chain((7,), L.Dense(4, activation=L.ReLU(6.0)), BN()), "dense")
    model = chain((7,), L.Dense(4, activation=L.LeakyReLU(0.2)), BN(center=False), positive=True)
    norms_in(model)[0].moving_mean.assign(np.zeros(4))
    gone(model, how="backward")


def test_a_layer_that_makes_integers_is_no_identity():
    x = keras.Input((4,))
    y = L.Flatten(dtype="int32")(L.Dense(4, name="dense")(x))
    model = graph(x, BN(name="norm")(y))
    result = fold(model, 3 * example_for(model))
    assert [(entry.layer, entry.reason) for entry in result.kept] == [("norm", "what it normalizes are int32")]
    model = chain((4,), L.Activation("tanh"), BN(), L.Flatten(dtype="int32"), L.Dense(3))
    assert "Flatten" in fold(model, example_for(model)).kept[0].reason


def test_an_embedding_and_masks():
    x = keras.Input((5,), dtype="int32")
    y = L.Embedding(9, 6, mask_zero=True)(x)
    y = L.GlobalAveragePooling1D()(BN()(y))
    model = graph(x, L.Dense(3, name="dense")(y))
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]], "int32")
    result = fold(model, tokens)
    assert [(f.into, f.how) for f in result.folded] == [(("dense",), "forward")]
    other = np.array([[8, 0, 0, 0, 0]], "int32")
    assert apart(run(model, other), run(result.model, other)) < 1e-5


def test_what_masks_by_value_is_left_alone():
    kept(chain((4, 5), L.Dense(5), L.Masking(), BN()), "Masking")


# -- dtypes --------------------------------------------------------------------------------------------------------


def test_quantized_weights_and_lora_may_not_change():
    model = chain((7,), L.Dense(4, name="dense"), BN())
    model.get_layer("dense").enable_lora(2)
    result = fold(model, example_for(model))
    assert "the weights of dense may not change: it has LoRA weights" in result.kept[0].reason
    model = chain((7,), L.Dense(4, name="dense"), BN())
    model.get_layer("dense").quantize("int8")
    result = fold(model, example_for(model))
    assert "the weights of dense may not change: it is quantized (int8)" in result.kept[0].reason
    assert "not measured in float64" in result.error.note


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64:UserWarning")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64"])
def test_other_dtypes(policy):
    stack = [L.Dense(6, dtype=policy, name="dense"), BN(dtype=policy), L.ReLU(dtype=policy), L.Dense(3, dtype=policy)]
    model = chain((7,), *stack)
    result = fold(model, example_for(model))
    assert not result.kept
    assert result.model.get_layer("dense").dtype_policy.name == policy
    assert result.model.get_layer("dense").kernel.dtype == model.get_layer("dense").kernel.dtype
    assert float(result.error) <= 1e-12
    narrow = {"float64": "float32"}.get(policy, policy.removeprefix("mixed_"))
    assert result.error.measured[-1].precision == narrow


@pytest.mark.skipif(BACKEND != "torch", reason="NumPy has no bfloat16, torch has")
def test_bfloat16_weights():
    model = chain((7,), L.Dense(6, dtype="bfloat16", name="dense"), BN(dtype="bfloat16"))
    result = fold(model, example_for(model))
    assert not result.kept
    assert result.model.get_layer("dense").kernel.dtype == "bfloat16"


def test_float16_weights_that_would_overflow_stay():
    model = chain((7,), L.Dense(6, dtype="float16", name="dense"), BN(dtype="float16", epsilon=1e-7), positive=True)
    set_variance(model, *6 * [1e-6])
    model.get_layer("dense").kernel.assign(np.full((7, 6), 1000.0))
    result = fold(model, example_for(model) * 1e-3)
    assert not result.folded
    assert "the weights of dense may not change: folded, they would not be finite in float16" in result.kept[0].reason


# -- the user's model, files ---------------------------------------------------------------------------------------


def state(model):
    operations = getattr(model, "operations", [])
    nodes = [len(part._inbound_nodes) for part in (*model._flatten_layers(), *operations)]
    return (
        json.dumps(model.get_config(), default=str),
        [numbers(w).tobytes() for w in model.weights],
        nodes,
        len(model.losses),
    )


def test_the_model_and_the_process_are_left_as_they_were():
    x = keras.Input((6, 6, 3))
    y = BN()(L.Conv2D(4, 3, activity_regularizer="l2")(x)) * 2.0
    model = graph(x, L.Dense(2)(L.Dropout(0.5)(L.GlobalAveragePooling2D()(ops.relu(y)))))
    before, draws, np_draws = state(model), random.getstate(), np.random.get_state()[1].copy()
    names = dict(keras.src.backend.common.global_state.get_global_attribute("object_name_uids"))
    fold(model, example_for(model))
    assert state(model) == before
    assert random.getstate() == draws
    assert (np.random.get_state()[1] == np_draws).all()
    assert dict(keras.src.backend.common.global_state.get_global_attribute("object_name_uids")) == names
    assert (keras.config.floatx(), keras.config.dtype_policy().name) == ("float32", "float32")
    assert keras_dtypes.BIT64_TO_BIT32_DTYPE == TABLE


def test_a_failure_leaves_the_process_as_it_was():
    class Uncopied(L.Layer):
        def __init__(self, needed):
            super().__init__()
            self.needed = needed

        def call(self, x):
            return x + 1.0

        def get_config(self):
            return super().get_config()

    model = chain((7,), L.Dense(4), BN(), Uncopied({"a": 1}))
    before = state(model)
    with pytest.raises(
        OptionError, match=r"the layer uncopied.* of class Uncopied must be copied, which needs its get_config"
    ):
        fold(model, example_for(model))
    assert state(model) == before
    assert (keras.config.floatx(), keras.config.dtype_policy().name) == ("float32", "float32")
    assert keras_dtypes.BIT64_TO_BIT32_DTYPE == TABLE


def test_the_folded_model_shares_nothing_with_the_model():
    model = chain((7,), L.Dense(4), BN(), L.Dense(3))
    x = example_for(model)
    before = run(model, x)
    result = fold(model, x)
    for weight in result.model.weights:
        weight.assign(np.zeros(weight.shape))
    assert apart(before, run(model, x)) == 0.0


def several():
    x = keras.Input((6, 6, 3), name="image")
    y = L.ReLU()(BN()(L.SeparableConv2D(4, 3, use_bias=False)(x)))
    y = L.Activation("tanh")(BN(axis=1, name="plain")(L.Activation("sigmoid")(y)))
    y = keras.Sequential([keras.Input((4, 4, 4)), L.Flatten(), BN(), L.Dense(5)], name="head")(y)
    return graph(x, {"a": y, "b": ops.relu(y + 1.0)})


def test_the_folded_model_saves_and_reloads(tmp_path):
    model = several()
    x = example_for(model)
    result = folded(model)
    assert len(result.folded) == 2
    save(result.model, tmp_path / "folded.keras")
    again_ = load(tmp_path / "folded.keras")
    assert apart(run(result.model, x), run(again_, x)) == 0.0
    assert [layer.name for layer in again_.layers] == [layer.name for layer in result.model.layers]
    assert isinstance(again_.get_layer("plain"), ScaleShift)
    assert os.listdir(tmp_path) == ["folded.keras"]
    result.model.save(tmp_path / "own.keras")
    assert apart(run(result.model, x), run(keras.models.load_model(tmp_path / "own.keras"), x)) == 0.0


def test_the_folded_model_trains_and_predicts():
    result = fold(chain((7,), L.Dense(4), BN(), L.Activation("tanh"), BN(), L.Activation("tanh")))
    model, rng = result.model, np.random.default_rng(0)
    x, y = rng.standard_normal((8, 7)), rng.standard_normal((8, 4))
    model.compile("sgd", "mse")
    before = [numbers(w).copy() for w in model.trainable_weights]
    model.fit(x, y, verbose=0, batch_size=4)
    assert np.isfinite(model.evaluate(x, y, verbose=0))
    assert model.predict(x, verbose=0).shape == (8, 4)
    assert len(before) == 4
    assert all((b != numbers(w)).any() for b, w in zip(before, model.trainable_weights, strict=True))


def test_a_file_is_folded_by_its_name(tmp_path):
    model = chain((7,), L.Dense(4), BN())
    save(model, tmp_path / "model.keras")
    result = fold(str(tmp_path / "model.keras"))
    assert len(result.folded) == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


def layer_alone(path):
    layer = L.Dense(4)
    layer.build((None, 7))
    keras.saving.save_model(layer, path)


def named_module(path):
    config = {
        "module": "os",
        "class_name": "system",
        "registered_name": "system",
        "config": {"command": "touch hacked"},
    }
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(config))
        file.writestr("metadata.json", "{}")


BROKEN = {
    "cut off": (cut, "may be damaged, cut off"),
    "empty": (lambda p: p.write_bytes(b""), "may be damaged, cut off"),
    "text": (lambda p: p.write_text("hello"), "may be damaged, cut off"),
    "other zip": (other_zip, "may be damaged, cut off"),
    "a layer": (layer_alone, "it holds a Dense"),
    "a module of Python": (named_module, "Could not locate class 'system'"),
    "missing": (lambda p: p.unlink(), "there is none"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_models(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.keras"
    save(chain((7,), L.Dense(4)), path)
    spoil, words = BROKEN[name]
    spoil(path)
    with pytest.raises(DataError, match=r"model\.keras must") as error:
        load(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists()


def test_a_file_with_code_is_not_executed(tmp_path):
    x = keras.Input((7,))
    keras.Model(x, L.Lambda(lambda v: v + 1)(x)).save(tmp_path / "code.keras")
    for allow in (False, True):
        if allow:
            keras.config.enable_unsafe_deserialization()
        try:
            with pytest.raises(DataError, match=r"holds Python code \(a Lambda layer\), which is not executed"):
                load(tmp_path / "code.keras")
        finally:
            keras.src.backend.common.global_state.set_global_attribute("safe_mode_saving", None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("the old one")

    class Broken(L.Layer):
        def call(self, x):
            return x

        def save_own_variables(self, store):
            raise OSError("no room")

    with pytest.raises(OutputError, match="no room"):
        save(chain((7,), L.Dense(4), Broken()), path)
    assert path.read_text() == "the old one"
    assert os.listdir(tmp_path) == ["model.keras"]
    with pytest.raises(OutputError, match=r"model\.keras must be a file that can be written"):
        save(chain((7,), L.Dense(4)), tmp_path / "nowhere" / "model.keras")
    with pytest.raises(OptionError, match=r"written to a .keras file, got model.h5"):
        save(chain((7,), L.Dense(4)), tmp_path / "model.h5")


# -- bad input -----------------------------------------------------------------------------------------------------


def test_a_model_with_a_call_of_its_own():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = L.Dense(4), BN()

        def call(self, x):
            return self.norm(self.dense(x))

    with pytest.raises(
        OptionError, match=r"Sequential or functional to be seen through, got a Mine, .* call\(\): build it as"
    ):
        fold(Mine(), np.zeros((2, 7), "float32"))


def test_a_model_that_is_not_built():
    with pytest.raises(
        OptionError, match=r"must be built, so that it has weights: call it once, or start it with keras.Input"
    ):
        fold(keras.Sequential([L.Dense(4), BN()]), np.zeros((2, 7), "float32"))


def test_a_model_is_not_changed_in_place():
    model = chain((7,), L.Dense(4), BN())
    before = state(model)
    with pytest.raises(OptionError, match=r"can't be changed in place: leave inplace out and use result\.model"):
        fold(model, inplace=True)
    assert state(model) == before


def two_inputs():
    a, b = keras.Input((7,), name="a"), keras.Input((5,), name="b")
    return graph([a, b], L.Concatenate()([BN()(L.Dense(4)(a)), b]))


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (two_inputs, np.zeros((2, 7)), "an array for each of the 2 inputs a, b, got 1"),
        (two_inputs, {"a": np.zeros((2, 7)), "c": 1}, "must name the inputs a, b, got a, c"),
        (two_inputs, (np.zeros((2, 7)), np.zeros((2, 6))), "the example for b must have the shape (None, 5)"),
        (two_inputs, (np.zeros((2, 7)), np.zeros(5)), "None for any size, got (5,)"),
        (two_inputs, (np.zeros((2, 7)), "text"), "the example for b must"),
        (two_inputs, (np.zeros((2, 7)), np.zeros((3, 5))), "the model must run on the example, but concatenate"),
    ],
)
def test_examples_that_do_not_fit(model, example, words):
    with pytest.raises(OptionError) as error:
        fold(model(), example)
    assert words in str(error.value)


def test_an_example_is_made_where_none_is_given():
    model = chain((None, None, 3), L.Conv2D(4, 3), BN(), L.GlobalAveragePooling2D())
    assert len(fold(model).folded) == 1
    too_small = chain((None, None, 3), L.Conv2D(4, 40), BN())
    with pytest.raises(OptionError, match="no example was given, so one was made up: give one"):
        fold(too_small)


def test_a_tensor_is_an_example():
    model = chain((7,), L.Dense(4), BN())
    assert len(fold(model, ops.convert_to_tensor(example_for(model))).folded) == 1
    assert len(fold(model, [[0.5] * 7]).folded) == 1


# -- summary -------------------------------------------------------------------------------------------------------


def test_the_summary_counts_as_keras_does():
    model = chain((28, 28), L.Flatten(name="flatten"), BN(name="norm"), L.Dense(300, name="dense"))
    found = bn.summary(model)
    assert [(layer.name, layer.kind, layer.output_shape) for layer in found.layers] == [
        ("flatten", "Flatten", (None, 784)),
        ("norm", "BatchNormalization", (None, 784)),
        ("dense", "Dense", (None, 300)),
    ]
    norm = found.layers[1]
    assert (norm.parameters, norm.trainable, norm.statistics) == (3136, 1568, 1568)
    assert found.parameters == model.count_params()
    assert str(bn.summary(model, np.zeros((1, 28, 28), "float32"))) == str(found)


def test_the_summary_of_models_inside_of_models_and_of_what_can_not_be_seen():
    model = chain((7,), encoder(), Block(name="block"), L.Dense(3, name="head", trainable=False))
    rows = {layer.name: layer for layer in bn.summary(model).layers}
    assert list(rows) == ["encoder.dense", "encoder.norm", "block", "head"]
    assert (rows["block"].trainable, rows["block"].statistics) == (4 * 4 + 4 + 8, 8)
    assert (rows["head"].trainable, rows["head"].frozen) == (0, 15)
    shared = keras.Input((7,))
    inner = encoder()
    twice = graph(shared, L.Add()([inner(shared), inner(shared)]))
    assert bn.summary(twice).parameters == twice.count_params()

    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(4, name="dense")

        def call(self, x):
            return self.dense(x)

    mine = Mine()
    mine(np.zeros((1, 7), "float32"))
    assert [(layer.name, layer.trainable) for layer in bn.summary(mine).layers] == [("dense", 32)]
