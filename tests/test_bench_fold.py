"""The measurement of folding: is what it says about a tool true? Tools here are made to be right, wrong and broken."""

import copy
import json
import os
import signal
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from batchnorm.bench import fold as bench
from batchnorm.bench import judging
from batchnorm.bench.adversarial import adversaries
from batchnorm.bench.adversarial_onnx import GRAPHS, inputs_of
from batchnorm.bench.fold import FoldBench
from batchnorm.bench.judging import distance, judge, judge_graph, normalizations
from batchnorm.bench.peers import FILE_TOOLS, MODULE_TOOLS, PACKAGES, Refitted
from batchnorm.bench.ratios import interval
from batchnorm.bench.zoo import TIMM, TORCHVISION, Member, norms_of, randomized
from batchnorm.bench.zoo_transformers import transformers_zoo
from batchnorm.errors import MissingDependencyError, OptionError, VerificationError


def small():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()), torch.randn(2, 3, 6, 6)


SMALL = Member("tests", "small", small)


def unchanged(model, example):
    return model, 0


def wrong(model, example):
    model[0].bias.data += 1
    return model, 0


def slightly_wrong(model, example):
    model[0].weight.data *= 1 + 1e-7
    return model, 0


def raising(model, example):
    raise ValueError("not like this")


def refusing(model, example):
    raise OptionError("not this one")


def dying(model, example):
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(model, example):
    time.sleep(60)


def judged(monkeypatch, **tools):
    monkeypatch.setattr(judging, "MODULE_TOOLS", tools)
    return judge(SMALL, files=False, seconds=2)


def test_a_tool_is_right_wrong_or_broken_and_each_is_told(monkeypatch):
    tools = {"unchanged": unchanged, "wrong": wrong, "slightly": slightly_wrong, "ours": MODULE_TOOLS["batchnorm.fold"]}
    facts = judged(monkeypatch, **tools)
    assert (facts["norms"], facts["name"]) == (1, "small")
    found = facts["tools"]
    assert not found["unchanged"]["wrong"]
    assert found["unchanged"]["error"] == 0
    assert found["unchanged"]["left"] == 1
    assert found["wrong"]["wrong"]
    # no float32 output tells, the float64 ones do
    assert found["slightly"]["error"] < 1e-5
    assert found["slightly"]["wrong"]
    assert not found["ours"]["wrong"]
    assert found["ours"]["left"] == 0
    assert found["ours"]["seconds"] > 0


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (raising, "ValueError: not like this"),
        (refusing, "OptionError: not this one"),
        (dying, "the process ended with -9"),
        (hanging, "not done after 2 s"),
    ],
)
def test_a_tool_that_breaks_is_a_crash_and_nothing_else_breaks(monkeypatch, tool, said):
    found = judged(monkeypatch, broken=tool, fine=unchanged)["tools"]
    assert found["broken"]["crashed"] == said
    assert found["broken"].get("refused", False) == (tool is refusing)
    assert not found["fine"]["wrong"]


def test_the_model_is_left_as_it_was_by_every_tool(monkeypatch):
    model, example = small()
    randomized(model)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(judging, "MODULE_TOOLS", {"wrong": wrong})
    monkeypatch.setattr("batchnorm.bench.zoo.randomized", lambda given: given)
    assert judge(Member("tests", "small", lambda: (model, example)), files=False)["tools"]["wrong"]["wrong"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs onnx, onnxruntime and onnxscript",
)
def test_tools_for_files_are_judged_by_the_file_that_they_were_given(monkeypatch):
    def copied(file, out):
        return 0 * out.write_bytes(file.read_bytes())

    tools = {"copied": copied, "onnxruntime, basic": FILE_TOOLS["onnxruntime, basic"]}
    monkeypatch.setattr(judging, "MODULE_TOOLS", {})
    monkeypatch.setattr(judging, "FILE_TOOLS", tools | {"silent": lambda file, out: 0})
    facts = judge(SMALL)
    assert facts["exported_norms"] == 1
    assert facts["tools"]["copied"]["left"] == 1
    assert not facts["tools"]["copied"]["wrong"]
    assert facts["tools"]["onnxruntime, basic"]["left"] == 0
    assert not facts["tools"]["onnxruntime, basic"]["wrong"]
    assert "crashed" in facts["tools"]["silent"]


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("batchnorm.bench.fold.find_spec", lambda name: None if name == "onnxslim" else True)
    with pytest.raises(MissingDependencyError, match="but onnxslim is not installed: pip install onnxslim"):
        bench.run(tmp_path)
    assert set(PACKAGES) == set(FILE_TOOLS)


class Frozen(nn.Module):
    """A norm by plain arithmetic, as detectors have it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4))

    def forward(self, x):
        scale = (self.running_var + 1e-5).rsqrt().reshape(1, -1, 1, 1)
        return x * scale - self.running_mean.reshape(1, -1, 1, 1) * scale


class FrozenBatchNorm2d(Frozen):
    pass


@pytest.mark.parametrize(
    ("model", "counted"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (2, 0)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), FrozenBatchNorm2d()), (1, 0)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), (0, 0)),
        (Refitted(torch.jit.freeze(torch.jit.trace(nn.BatchNorm2d(4).eval(), torch.randn(1, 4, 3, 3)))), (1, 0)),
    ],
    ids=["norms", "frozen", "none", "traced"],
)
def test_normalizations_are_counted_where_they_are_executed(model, counted):
    assert normalizations(model.eval(), torch.randn(2, 4, 3, 3)) == counted


def test_a_distance_is_relative_and_infinite_for_what_can_not_be_compared():
    y = [np.array([2.0, -4.0, np.nan])]
    assert distance(y, [np.array([2.0, -3.0, np.nan])]) == 0.25
    assert distance(y, [np.array([2.0, -4.0, 0.0])]) == np.inf
    assert distance(y, [np.array([np.nan, -4.0, np.nan])]) == np.inf
    assert distance(y, [np.zeros(2)]) == np.inf
    assert distance(y, []) == np.inf


def test_adversaries_are_many_different_and_the_same_on_every_call():
    members = adversaries()
    assert len(members) >= 100
    assert max(Counter(m.name for m in members).values()) == 1
    for member in members:
        _, model, example = member()
        twin, same = member()[1:]
        assert torch.equal(example, same)
        states = (m.state_dict().values() for m in (model, twin))
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*states, strict=True))


def test_the_zoos_hold_what_they_say():
    names = [*TORCHVISION, *TIMM, *(m.name for m in transformers_zoo())]
    assert max(Counter((*TORCHVISION,)).values()) == max(Counter(TIMM).values()) == 1
    assert (len(TORCHVISION), len(set(names)) > 220) == (79, True)


def test_randomized_norms_have_both_signs_and_zeros():
    model = randomized(nn.Sequential(nn.BatchNorm2d(500), nn.BatchNorm2d(4, affine=False)))
    gamma = model[0].weight
    assert not model.training
    assert {-1.0, 0.0, 1.0} == set(gamma.sign().tolist())
    assert 0.4 < model[0].running_var.min() < model[0].running_var.max() < 1.6
    assert len(norms_of(model)) == 2


def found(left, *, is_wrong=False):
    return {"left": left, "plain": 0, "wrong": is_wrong, "seconds": 2.0, "error": 0.0}


def test_figures_come_from_the_recorded_values():
    models = [
        {"zoo": "a", "name": "x", "norms": 10, "tools": {"batchnorm.fold": found(1), "onnxsim": {"crashed": "no"}}},
        {
            "zoo": "a",
            "name": "y",
            "norms": 20,
            "tools": {"batchnorm.fold": found(0), "onnxsim": found(5, is_wrong=True)},
        },
    ]
    whole = [{"model": "net", "shape": [1, 3, 8, 8], "fold": [1.0, 2.0, 3.0], "trace and freeze": [2.0, 2.0, 2.0]}]
    latency = [{"model": "net", "folded": [0.5] * 20, "unfolded": [1.0] * 20}]
    parts = {"a": {"models": models}, "speed": {"whole": whole, "latency": latency}}
    said = str(FoldBench(parts, (Path("f.json"),)))
    rows = {line.split("  ")[0]: line.split()[-6:] for line in said.splitlines() if "(" in line and "%" in line}
    assert rows["batchnorm.fold"][-5:] == ["(97%)", "0", "0", "0", "4"]
    assert rows["onnxsim"][-5:] == ["(50%)", "0", "1", "1", "2"]
    assert (
        "fold with its proof 2.00 s, trace and freeze 2.00 s, median ratio 1.00 (0.50 to 1.50, 3 interleaved pairs)"
        in said
    )
    assert "folded 500.0 ms, unfolded 1000.0 ms, median ratio 0.500 [0.500, 0.500], 20 interleaved pairs" in said
    assert said.endswith("raw values: f.json")


def test_graphs_are_judged_by_what_they_compute_before():
    graph = GRAPHS["scale may be overridden"]()
    found = judge_graph("a graph", graph, inputs_of(graph))
    ours, theirs = found["tools"]["batchnorm.fold, ONNX"], found["tools"]["onnxruntime, basic"]
    assert (found["norms"], ours["left"], ours["wrong"]) == (1, 1, False)
    assert (theirs["left"], theirs["wrong"]) == (1, False)


def test_a_tool_that_forgets_an_input_is_wrong(monkeypatch):
    def forgets(file, out):
        model = onnx.load(str(file))
        for tensor in model.graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))
        onnx.save(model, str(out))
        return 0

    monkeypatch.setattr(judging, "FILE_TOOLS", {"forgets": forgets, "raises": raising})
    graph = GRAPHS["half"]()
    tools = judge_graph("half", graph, inputs_of(graph))["tools"]
    assert tools["forgets"]["wrong"]
    assert tools["forgets"]["left"] == 1
    assert "crashed" in tools["raises"]


def test_an_interval_holds_the_median_and_needs_values():
    low, high = interval([float(i) for i in range(101)])
    assert low < 50 < high
    assert interval([3.0]) == (3.0, 3.0)
    with pytest.raises(VerificationError, match="must have values, got none"):
        interval([])


def test_it_measures_real_tools_and_keeps_every_value(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", {"adversarial": ("Conv2d, 1 groups",)})
    monkeypatch.setattr(judging, "FILE_TOOLS", {})
    monkeypatch.setattr(bench, "PACKAGES", {})
    result = bench.run(tmp_path, "adversarial", "speed", quick=True)
    kept = {}
    for part in ("adversarial", "speed"):
        kept |= json.loads((tmp_path / f"fold_{part}.json").read_text())
    (model,) = kept["models"]
    assert set(model["tools"]) == set(MODULE_TOOLS)
    assert [model["tools"][tool]["left"] for tool in MODULE_TOOLS] == [0] * len(MODULE_TOOLS)
    assert len(kept["whole"][0]["fold"]) == 2
    assert len(kept["latency"][0]["folded"]) == 5
    assert kept["machine"]["cores"] >= 1
    assert "adversarial: 1 models" in str(result)
    with pytest.raises(OptionError, match=r"parts must be of .*speed, got nothing"):
        bench.run(tmp_path, "nothing", quick=True)
