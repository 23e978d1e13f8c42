import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from batchnorm.errors import DataError, VerificationError
from batchnorm.fold import fold
from batchnorm.lab import ARMS, load_model
from batchnorm.lab.data import load_data
from batchnorm.lab.deploy import deploy, save
from batchnorm.lab.networks import Standardize, build
from batchnorm.torch import BatchNorm1d

X = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def test_the_saved_models_agree_with_the_deployed_network(small):
    """Rows as they come, without any preparation, through all three forms."""
    x = load_data("digits").x[:100]
    with torch.no_grad():
        expected = small.best.deployed.network(torch.from_numpy(x)).numpy()
        loaded = load_model(small.out / "best" / "model.safetensors")(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(loaded, expected)
    path = small.out / "best" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (x, x[:1]):
        got = session.run(["logits"], {"x": rows})[0]
        np.testing.assert_allclose(got, expected[: len(rows)], atol=small.best.deployed.bound, rtol=0)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "BatchNormalization" not in operators


def test_the_proof_is_in_the_result(small):
    deployed = small.best.deployed
    assert deployed.error <= deployed.bound < 1e-2
    assert deployed.exact_error < 1e-12
    assert not deployed.kept
    assert not any(isinstance(m, nn.BatchNorm1d) for m in deployed.network.modules())


def small_network():
    network = nn.Sequential(nn.Linear(6, 4), BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    network[1].running_mean.normal_()
    return network


def _shifted(model, example):
    done = fold(model, example)
    with torch.no_grad():
        done.model[0].bias.add_(1e-3)
    return done


def _refused(model, example):
    raise VerificationError("the outputs differ")


def _rebuilt(model, example):
    done = fold(model, example)
    return dataclasses.replace(done, model=torch.fx.symbolic_trace(done.model))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(_shifted, "logits differed by"), (_refused, "the outputs differ"), (_rebuilt, "changed the network's structure")],
)
def test_a_fold_that_changes_the_outputs_is_undone(wrong, words, monkeypatch, tmp_path):
    monkeypatch.setattr("batchnorm.lab.deploy.fold", wrong)
    deployed = deploy(small_network(), X, X)
    assert "folding was undone: " in deployed.kept[0]
    assert words in deployed.kept[0]
    assert deployed.folded == ()
    assert isinstance(deployed.network[1], BatchNorm1d)
    if wrong is _shifted:
        save(deployed, tmp_path / "best", X, {"model": "m"})


@pytest.mark.parametrize(
    ("model", "arm"),
    [
        ("mlp", "none"),
        ("mlp", "group"),
        ("resmlp", "bias"),
        ("cnn", "before"),
        ("cnn", "after"),
        ("cnn", "input-norm"),
        ("cnn", "layer"),
    ],
)
def test_what_is_saved_is_loaded_again_to_the_bit(model, arm, tmp_path):
    x = load_data("digits").x[:200]
    network = build(model, (1, 8, 8), 10, ARMS[arm], 0, torch.from_numpy(x))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    deployed = deploy(network, x, x)
    left = [m for m in deployed.network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | Standardize)]
    assert not left, deployed.kept
    about = {"model": model, "shape": (1, 8, 8), "classes": list("0123456789"), "arm": ARMS[arm].to_dict()}
    save(deployed, tmp_path / "best", x, about)
    loaded = load_model(tmp_path / "best" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(torch.from_numpy(x)), deployed.network(torch.from_numpy(x)))
    by_row = [line for line in deployed.kept if "those of each row" in line]
    assert bool(by_row) == (arm in ("group", "layer"))


def test_the_trained_network_is_left_as_it_was():
    network = nn.Sequential(nn.Linear(6, 4), BatchNorm1d(4))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    deploy(network, X, X)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_saving_replaces_the_folder_as_a_whole(tmp_path):
    network = nn.Sequential(nn.Linear(6, 4), BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "stale").write_text("")
    save(deploy(network, X, X), tmp_path / "best", X, {"model": "m"})
    assert sorted(f.name for f in (tmp_path / "best").iterdir()) == ["model.onnx", "model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", json.dumps({"a": 1}).encode() * 20])
def test_a_file_that_is_no_saved_network(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"must be a model\.safetensors that a comparison saved"):
        load_model(tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=r"absent.safetensors"):
        load_model(tmp_path / "absent.safetensors")
