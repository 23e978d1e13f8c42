"""A synchronized Keras layer on two replicas does what one process does with the whole batch."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import subprocess
import sys
from pathlib import Path

import keras
import layer_replicas as job
import numpy as np
import pytest
from layer_cases import BACKEND, BatchNormalization, array, close, defined, gradients

import batchnorm

# what Keras does when it makes arrays
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
CASES = ("masked", "pmapped", "sharded") if BACKEND == "jax" else tuple(job.SPLITS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    environment = os.environ | {
        "KERAS_BACKEND": BACKEND,
        "PYTHONPATH": os.pathsep.join([str(Path(batchnorm.__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-W", "ignore", job.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return {file.stem: dict(np.load(file)) for file in folder.glob("*.npz")}


@pytest.mark.parametrize("case", CASES)
def test_replicas_together_are_one_batch(found, case):
    layer = job.made()
    mask = None if case in ("uneven", "empty", "single") else job.MASK
    upstream = job.UPSTREAM
    step, wanted = defined(layer, job.X, upstream, mask=mask)
    if mask is not None:
        # masked places are normalized too, and derived: by this layer, alone, which other tests hold to the definition
        alone = job.made()
        alone.synchronized = False
        y, wanted = gradients(alone, job.X, upstream, mask=mask)
    else:
        y = step.y
    parts = [found[f"{case}_{rank}"] for rank in range(2)]
    close(np.concatenate([one["y"] for one in parts]), y, "output", 1e-5)
    close(np.concatenate([one["dx"] for one in parts]), wanted[0], "dx", 1e-5)
    for one in parts:
        close(one["gamma"], wanted[1], "dgamma", 1e-5)
        close(one["beta"], wanted[2], "dbeta", 1e-5)
        close(one["mean"], step.running_mean, "mean")
        close(one["variance"], step.running_var, "variance", 1e-5)


def test_a_model_that_is_fitted_on_several_devices_is_that_of_one(found):
    if BACKEND != "jax":
        # Keras distributes data on JAX alone
        assert "fit" not in found
        return
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(**job.OPTIONS), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(job.X, job.UPSTREAM[:, :1], batch_size=4, shuffle=False, verbose=0)
    for i, v in enumerate(model.get_weights()):
        close(found["fit"][str(i)], array(v), rtol=1e-5)


def test_alone_a_synchronized_layer_is_any_layer(rng):
    x = rng.normal(size=(6, 3)).astype("float32")
    layers = [BatchNormalization(synchronized=s) for s in (False, True)]
    outputs = [array(layer(x, training=True)) for layer in layers]
    assert np.array_equal(*outputs)
