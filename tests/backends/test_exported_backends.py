"""Folded and recalibrated models leave Keras as ONNX and SavedModel, wherever the backend has a way."""

import os
from importlib.util import find_spec

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn
from keras_judge import chain

BACKEND = keras.backend.backend()
pytestmark = [
    # NumPy 2 says it whenever Keras makes an array of a tensor
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    # what exporters say of themselves
    pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `native_serialization` parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In the future `np.object` will be defined:FutureWarning"),
]


@pytest.fixture(scope="module")
def models():
    """Return a network, and the same folded and recalibrated; a norm of each has to stay as a scale and shift."""
    stack = [L.Conv2D(4, 3, use_bias=False), L.BatchNormalization(), L.ReLU(), L.Flatten()]
    norms = [L.BatchNormalization(), L.Activation("tanh"), L.BatchNormalization(), L.Activation("sigmoid"), L.Dense(2)]
    net = chain((6, 6, 3), *stack, L.Dense(5), *norms)
    x = np.random.default_rng(0).standard_normal((4, 6, 6, 3)).astype("float32")
    folded = bn.fold(net, x).model
    bn.recalibrate(net, x, progress=False)
    return x, {"folded": folded, "recalibrated": net}


def near(got, model, x):
    wanted = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.skipif(BACKEND == "jax" and find_spec("jax2onnx") is None, reason="Keras needs jax2onnx for it on JAX")
@pytest.mark.parametrize("which", ["folded", "recalibrated"])
def test_onnx(models, which, tmp_path):
    import onnx
    import onnxruntime

    x, made = models
    model = made[which]
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "Conv" in kinds
    assert which == "recalibrated" or "BatchNormalization" not in kinds
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    near(session.run(None, {session.get_inputs()[0].name: x})[0], model, x)
    # the export takes no more than the model's own number of samples to be checked
    near(session.run(None, {session.get_inputs()[0].name: x[:1]})[0], model, x[:1])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras fails on torch, for every model")
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="a SavedModel is of TensorFlow")
@pytest.mark.parametrize("which", ["folded", "recalibrated"])
def test_a_saved_model(models, which, tmp_path):
    import tensorflow as tf

    x, made = models
    made[which].export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    near(loaded.serve(x), made[which], x)
    moving = [v.name for v in loaded.variables if "moving" in v.name]
    assert bool(moving) is (which == "recalibrated")
