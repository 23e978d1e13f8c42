import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from batchnorm.errors import DataError
from batchnorm.lab import load_model
from batchnorm.lab.deploy import deploy, save
from batchnorm.torch import BatchNorm1d

X = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def test_the_saved_models_agree_with_the_deployed_network(small):
    """Rows as they come, without any preparation, through all three forms."""
    from batchnorm.lab.data import load_data

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


class Fork(nn.Module):
    """Its chain is not the data path: the norm's output goes elsewhere too."""

    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(6, 6), BatchNorm1d(6))

    def forward(self, x):
        h = self.chain[0](x)
        return self.chain[1](h) + h


def test_a_fold_that_changes_the_outputs_is_undone():
    network = Fork()
    network.chain[1].running_mean.normal_()
    deployed = deploy(network, X, X)
    assert "folding was undone: logits differed by" in deployed.kept[0]
    assert deployed.folded == ()
    with torch.no_grad():
        ours = deployed.network(torch.from_numpy(X))
    assert isinstance(deployed.network.chain[1], BatchNorm1d)
    assert torch.isfinite(ours).all()


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
