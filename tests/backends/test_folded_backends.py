"""Folding on every backend of Keras, held against Keras itself in float64: layers, operations, masks, dtypes, files."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812
from keras import ops

import batchnorm as bn
from batchnorm.keras import ScaleShift
from batchnorm.keras.files import load, save
from keras_judge import BN, apart, chain, example_for, folded, gone, graph, kept, norms_in, run

# NumPy 2 says it whenever Keras makes an array of a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((9, 4), lambda **k: L.Conv1D(6, 3, strides=2, **k)),
        ((6, 7, 4), lambda **k: L.Conv2D(6, 3, groups=2, **k)),
        ((6, 7, 3), lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, **k)),
        ((6, 7, 3), lambda **k: L.SeparableConv2D(5, 2, depth_multiplier=3, **k)),
    ],
    ids=["conv1d strided", "conv2d grouped", "depthwise2d times 2", "separable2d times 3"],
)
def test_norms_around_a_layer_fold(shape, layer):
    model = chain(shape, BN(), layer(name="linear", use_bias=False), BN(), L.ReLU())
    result = gone(model)
    assert sorted(entry.how for entry in result.folded) == ["backward", "forward"]
    assert result.model.get_layer("linear").use_bias


def test_a_norm_after_a_transposed_convolution_folds():
    gone(chain((4, 5, 4), L.Conv2DTranspose(6, 3, strides=2, padding="same"), BN()), how="backward")


def test_a_norm_before_a_padded_layer_stays():
    kept(chain((6, 7, 4), BN(), L.Conv2D(6, 2, padding="same")), "pads with zeros, which would not be shifted")


def test_the_network_of_the_notes_folds_forward():
    model = chain(
        (28, 28), L.Flatten(), BN(), L.Dense(300, "relu", name="first"), BN(),
        L.Dense(100, "relu", name="second"), BN(), L.Dense(10, "softmax", name="third"),
    )  # fmt: skip
    result = gone(model, ["first", "second", "third"], "forward")
    assert [type(layer).__name__ for layer in result.model.layers] == ["Flatten", "Dense", "Dense", "Dense"]
    assert result.model.count_params() == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10


def test_a_norm_passes_pooling_that_pads():
    between = [L.Dropout(0.5), L.AveragePooling2D(3, 2, padding="same")]
    gone(chain((7, 6, 5), L.Dense(6, name="dense"), *between, BN()), ["dense"], "backward")


def several():
    """A model with two outputs, a norm that must stay, a model inside of it, and operations between Keras tensors."""
    x = keras.Input((6, 6, 3), name="image")
    y = L.ReLU()(BN()(L.SeparableConv2D(4, 3, use_bias=False)(x)))
    y = L.Activation("tanh")(BN(axis=1, name="plain")(L.Activation("sigmoid")(y)))
    y = keras.Sequential([keras.Input((4, 4, 4)), L.Flatten(), BN(), L.Dense(5)], name="head")(y)
    return graph(x, {"a": y, "b": ops.relu(y + 1.0) * 0.5})


def test_operations_and_models_inside_of_models():
    model = several()
    result = folded(model)
    assert len(result.folded) == 2
    assert [entry.layer for entry in result.kept] == ["plain"]


def test_the_folded_model_saves_reloads_and_predicts(tmp_path):
    model = several()
    x = example_for(model)
    result = bn.fold(model, x)
    save(result.model, tmp_path / "folded.keras")
    again = load(tmp_path / "folded.keras")
    assert isinstance(again.get_layer("plain"), ScaleShift)
    assert apart(run(result.model, x), run(again, x)) == 0.0
    # compiled, and the model that was folded by the name of its file
    predicted = again.predict(x, verbose=0)
    assert apart(run(model, x), [predicted["a"], predicted["b"]]) < 2e-6
    model.save(tmp_path / "model.keras")
    by_name = bn.fold(str(tmp_path / "model.keras"))
    assert apart(run(result.model, x), run(by_name.model, x)) < 2e-6


def test_a_recalibrated_model_saves_and_reloads(tmp_path):
    model = several()
    x = np.random.default_rng(0).standard_normal((16, 6, 6, 3)).astype("float32")
    bn.recalibrate(model, x, progress=False)
    save(model, tmp_path / "model.keras")
    again = load(tmp_path / "model.keras")
    assert len(norms_in(again)) == 3
    assert apart(run(model, x), run(again, x)) == 0.0


def test_an_embedding_and_masks():
    x = keras.Input((5,), dtype="int32")
    y = L.Embedding(9, 6, mask_zero=True)(x)
    y = L.GlobalAveragePooling1D()(BN()(y))
    model = graph(x, L.Dense(3, name="dense")(y))
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]], "int32")
    result = bn.fold(model, tokens)
    assert [(f.into, f.how) for f in result.folded] == [(("dense",), "forward")]
    other = np.array([[8, 0, 0, 0, 0]], "int32")
    assert apart(run(model, other), run(result.model, other)) < 1e-5


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64:UserWarning")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_other_dtypes(policy):
    stack = [
        L.Dense(6, dtype=policy, name="dense"),
        BN(dtype=policy),
        L.ReLU(dtype=policy),
        L.Dense(3, dtype=policy, name="last"),
    ]
    model = chain((7,), *stack)
    result = bn.fold(model, example_for(model))
    assert not result.kept
    assert result.model.get_layer("dense").dtype_policy.name == policy
    assert float(result.error) <= 1e-12
    # Keras narrows on most backends
    narrow = keras.backend.result_type("float64") if policy == "float64" else policy.removeprefix("mixed_")
    assert result.error.measured[-1].precision == narrow


def test_the_dtypes_of_the_process_are_as_before():
    model = chain((4,), L.Dense(3), BN())
    before = ops.sum(ops.convert_to_tensor(np.ones(3))).dtype, keras.config.floatx()
    bn.fold(model, example_for(model))
    assert (ops.sum(ops.convert_to_tensor(np.ones(3))).dtype, keras.config.floatx()) == before


def test_a_bias_is_stripped():
    model = chain((6, 7, 4), L.Conv2D(6, 3, name="conv"), BN(), L.ReLU())
    result = bn.strip_bias(model, example_for(model))
    assert [entry.layer for entry in result.stripped] == ["conv"]
    assert not result.model.get_layer("conv").use_bias
    x = example_for(model)
    assert apart(run(model, x), run(result.model, x)) < 2e-6
