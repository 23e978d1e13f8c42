"""The measurement of `check`: plants are found and judged, healthy models are silent, tables are made of what was recorded."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import cli
from batchnorm.bench import check as bench
from batchnorm.bench import gaps, healthy
from batchnorm.bench.grown import Grown, Seed, grow
from batchnorm.bench.planting import PLANTS, UnfitError, plant
from batchnorm.check import RULES, Finding, Report, check
from batchnorm.errors import OptionError


def small(rng):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return model, torch.randn(1, 3, 15, 15)


@pytest.fixture(scope="module")
def grown():
    return grow(Seed("own", "small", small))


def test_a_model_grows_the_same_twice(grown):
    again = grow(Seed("own", "small", small))
    pairs = zip(grown.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [(site.name, site.places, site.producer, site.first) for site in grown.sites] == [
        ("1", 49, "0", True), ("3.1", 9, "3.0", False), ("4.1", 1, "4.0", False),
    ]  # fmt: skip


def test_every_rule_has_a_plant():
    assert set(PLANTS) == set(RULES)


@pytest.mark.parametrize("code", sorted(PLANTS))
def test_a_plant_is_found_and_leaves_the_model_alone(grown, code):
    before = {name: value.clone() for name, value in grown.model.state_dict().items()}
    for number in range(20):
        try:
            planted = plant(code, grown, np.random.default_rng(number))
        except UnfitError:
            continue
        break
    report = check(planted.model, **planted.given)
    assert bench.judge(code, planted.layers, report, set())["right"], str(report)
    assert all(torch.equal(before[name], value) for name, value in grown.model.state_dict().items())


def test_nothing_is_found_in_a_healthy_model(grown):
    row = healthy.looked_at(grown)
    assert row["findings"] == []
    assert row["problems"] == []
    assert row["layers"] == 3


def test_a_finding_in_a_healthy_model_needs_evidence(grown):
    biased = grown.copy()
    biased.model[3][0].bias = nn.Parameter(torch.ones(8))
    biased.model[3][1].running_mean += 1
    (found,) = healthy.looked_at(biased)["findings"]
    assert (found["code"], found["layer"], found["true"]) == ("BN301", "3.0", True)
    # the head's bias is needed
    wrong = Finding("BN301", "7", "its bias is subtracted again", "strip_bias")
    assert not healthy._told(wrong, biased)["true"]
    assert not healthy._told(Finding("BN103", "1", "", ""), biased)["true"]


@pytest.mark.parametrize("code", sorted(healthy.EVIDENCE))
def test_there_is_no_evidence_against_a_healthy_layer(grown, code):
    layer = "3.0" if code == "BN301" else "3.1"
    model = Grown("copy", grown.model, grown.batches) if code != "BN301" else grown.copy()
    if code == "BN301":
        # behind an activation a bias is no longer subtracted
        model.model[3] = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.BatchNorm2d(8))
    assert not healthy._told(Finding(code, layer, "", ""), model)["true"]


def test_the_right_layer_must_come_first():
    findings = tuple(Finding("BN103", layer, "far", "measure", "error", 2.0 - i) for i, layer in enumerate("ab"))
    report = Report(findings)
    assert bench.judge("BN103", ("a",), report, set())["right"]
    assert bench.judge("BN103", ("a",), report, set())["also"] == ["b"]
    assert not bench.judge("BN103", ("b",), report, set())["right"]
    # the healthy model had it already
    assert bench.judge("BN103", ("b",), report, {("BN103", "a")})["right"]
    assert not bench.judge("BN101", ("a",), report, set())["right"]


def test_the_command_line_runs_a_part_and_keeps_every_value(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gaps, "CAUSES", gaps.CAUSES[4:5])
    assert cli.main(["bench", "check", "gap", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "check_gap.json").read_text())["found"]
    assert [one["cause"] for one in facts["networks"]] == ["other data"]
    assert facts["networks"][0]["named"]
    assert facts["healthy"] == [[]]
    assert "other data" in said
    assert cli.main(["bench", "check", "all", "--out", str(tmp_path)]) == 2
    with pytest.raises(OptionError, match="the parts of bench check are"):
        bench.run(tmp_path, "everything")


def test_tables_are_made_of_the_recorded_values():
    rows = [{"code": "BN101", "zoo": "z", "right": right, "also": []} for right in (True, True, False)]
    assert "2 of 3" in bench._planted_table({"rows": rows})
    finding = {"code": "BN301", "layer": "a", "message": "", "true": True, "why": "another bias changes nothing"}
    false = {"code": "BN103", "layer": "b", "message": "", "true": False, "why": ""}
    models = [
        {"model": "m", "layers": 3, "findings": [finding, finding, false]},
        {"model": "n", "layers": 2, "findings": []},
    ]
    told = healthy.told({"models": models})
    assert "another bias changes nothing" in told
    assert "2 models with 5 layers; false findings in 1" in told
    seconds = {"plain": [1.0, 2.0], "observe": [1.1, 2.4]}
    speed = {"checked": "ResNet-152", "passed": "ResNet-50", "whole": {"nothing": [0.5]}, "turns": seconds}
    assert "1.15 (1.10 to 1.20)" in bench._speed_table(speed)
