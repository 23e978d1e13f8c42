"""Observing on the command line: from a file or a factory to a table or JSON."""

import json

import keras
import numpy as np
import onnx
import pytest

import batchnorm as bn
from batchnorm import cli
from test_recalibrate_onnx import network as onnx_network
from test_recalibrate_shell import NETS

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def nets(elsewhere):
    (elsewhere / "nets.py").write_text(NETS)
    import nets

    return nets


def run(*words):
    return cli.main(["observe", *map(str, words)])


@pytest.mark.parametrize("use", ["batch", "running"])
def test_a_factory_is_observed_on_its_batches(nets, capsys, use):
    assert run("nets:small", "--data", "nets:batches", "--use", use) == 0
    assert capsys.readouterr().out == f"{bn.observe(nets.small(), nets.batches(), use=use, progress=False)}\n"


def test_json_is_the_dict_of_the_result(nets, capsys):
    assert run("nets:small", "--data", "nets:batches", "--format", "json", "--batches", 2) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(
        json.dumps(bn.observe(nets.small(), nets.batches(), batches=2, progress=False).to_dict())
    )
    assert found["batches"] == 2


def test_onnx_and_keras_files(elsewhere, capsys):
    rng = np.random.default_rng(0)
    onnx.save(onnx_network()[0], "net.onnx")
    np.save("x.npy", rng.standard_normal((20, 3, 6, 6)).astype(np.float32))
    assert run("net.onnx", "--data", "x.npy", "--samples", 10, "--batch-size", 5) == 0
    assert "10 samples in 2 batches" in capsys.readouterr().out
    keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="only")]).save("net.keras")
    np.save("rows.npy", rng.standard_normal((20, 4)).astype(np.float32))
    assert run("net.keras", "--data", "rows.npy") == 0
    assert "only" in capsys.readouterr().out


def test_what_the_user_can_mend_is_one_sentence(nets, capsys):
    assert run("nets:small", "--data", "absent.npy") == 2
    assert capsys.readouterr().err.startswith("batchnorm: ")
    assert run("nets:small", "--data", "nets:batches", "--batch-size", 0) == 2
    assert "the batch size must be at least 1" in capsys.readouterr().err
