"""What is given and can't be used is a problem, said in a sentence; everything else is still checked."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import batchnorm as bn
from batchnorm.errors import OptionError
from check_fixtures import images, net


def sick() -> nn.Module:
    """Return a model with a fault that needs nothing to be seen."""
    model = net()
    model[4].momentum = 0.99
    return model


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.99)

    def forward(self, x):
        raise RuntimeError("no way")


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (sick, {"example": torch.zeros(2, 5, 8, 8)}, "must run on the example"),
        (sick, {"data": []}, "at least one batch"),
        (sick, {"data": iter([])}, "at least one batch"),
        (sick, {"data": [torch.zeros(2, 5, 8, 8)]}, "must take the batches"),
        (sick, {"data": [images(4) * float("nan")]}, "finite"),
        (sick, {"data": 3}, "iterable of batches"),
        (sick, {"optimizer": 3}, "torch.optim.Optimizer"),
        (sick, {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)}, "none of them"),
        (sick, {"loader": iter([1])}, "how large its batches are"),
        (Raising, {"example": images(2)}, "no way"),
    ],
    ids=[
        "shape",
        "empty",
        "used up",
        "batches",
        "nan",
        "number",
        "no optimizer",
        "other optimizer",
        "loader",
        "raises",
    ],
)
def test_what_cannot_be_used_is_said_and_the_rest_is_checked(model, given, words):
    report = bn.check(model(), **given)
    assert "BN110" in [finding.code for finding in report]
    assert any(words in problem for problem in report.problems), report.problems
    assert all("\n" not in problem for problem in report.problems)
    assert any(rule.reason in report.problems for rule in report.not_run)
    assert "could not be used" in str(report)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("hello", "must be a torch.nn.Module"),
        (nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), "run the model once"),
        (nn.BatchNorm2d(3, device="meta"), "meta device"),
        (torch.jit.script(nn.BatchNorm2d(3)), "before scripting"),
    ],
    ids=["text", "lazy", "meta", "script"],
)
def test_what_is_no_model_is_refused(model, words):
    with pytest.raises(OptionError, match=words):
        bn.check(model)


@pytest.mark.parametrize("code", ["BN9", "103", "BN1034", "E501"])
def test_an_unknown_code_is_refused(code):
    for given in ({"select": code}, {"ignore": [code]}, {"select": ["BN101", code]}):
        with pytest.raises(OptionError, match="BN304"):
            bn.check(net(), **given)


def test_codes_choose_rules():
    model = sick()
    model[0].bias = nn.Parameter(torch.ones(8))
    assert [f.code for f in bn.check(model, images(4), select="bn1")] == ["BN110"]
    assert [f.code for f in bn.check(model, images(4), select="BN301,BN302", ignore="BN302")] == ["BN301"]
    assert not bn.check(model, images(4), ignore=["BN1", "BN3"])
    report = bn.check(model, images(4), select=["BN103"])
    assert [rule.code for rule in report.not_run] == ["BN103"]


def test_rules_that_lack_something_are_listed_with_what_they_lack():
    report = bn.check(net())
    lacks = {rule.code: rule.reason for rule in report.not_run}
    assert lacks["BN103"] == "needs data"
    assert lacks["BN105"] == "needs an example"
    assert lacks["BN202"] == "needs the optimizer"
    assert "trained" in lacks["BN107"]
    assert not report.problems


def test_one_shot_data_is_read_once_and_whole():
    batches = list(images(64).split(16))
    report = bn.check(net(), data=iter(batches))
    assert not report.problems
    assert report.observation.batches == len(batches)
    assert not list(report), str(report)


@pytest.mark.parametrize("form", ["tuple", "dict", "loader", "array"])
def test_data_comes_in_the_forms_that_people_have(form):
    x = images(64)
    data = {
        "tuple": [(part, torch.zeros(len(part))) for part in x.split(16)],
        "dict": [{"input": part, "label": 0} for part in x.split(16)],
        "loader": DataLoader(TensorDataset(x, torch.zeros(64)), batch_size=16),
        "array": x.numpy(),
    }[form]
    report = bn.check(net(), data=data)
    assert not report.problems, report.problems
    assert report.observation.samples == 64


class Endless(IterableDataset):
    def __iter__(self):
        yield from images(4)


def test_a_loader_that_does_not_know_its_length_leaves_the_last_batch_open():
    report = bn.check(net().train(), images(16), loader=DataLoader(Endless(), batch_size=16), select="BN107")
    assert "how many samples" in report.not_run[0].reason


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_wrapped_models_are_looked_into(wrap):
    model = sick()
    model[0].bias = nn.Parameter(torch.ones(8))
    report = bn.check(wrap(model).eval(), images(4))
    assert {(f.code, f.layer) for f in report} >= {("BN110", "4"), ("BN301", "0")}


def test_an_exported_program_is_checked_as_what_infers():
    model = net()
    model[4].reset_running_stats()
    report = bn.check(torch.export.export(model, (images(4),)))
    assert ("BN101", "4") in [(f.code, f.layer) for f in report]
    assert "BN302" in [f.code for f in report]
    assert "not trained" in next(rule.reason for rule in report.not_run if rule.code == "BN106")


def test_findings_are_sorted_and_told_together():
    model = net()
    for norm in (model[1], model[4], model[7]):
        norm.momentum = 0.99
    model[4].running_var[0] = float("nan")
    report = bn.check(model)
    assert [f.code for f in report] == ["BN102", "BN110", "BN110", "BN110"]
    assert str(report).count("BN110") == 1
    assert "1, 4, 7" in str(report)
    assert len(report) == 4
    assert report[0].layer == "4"


def test_a_model_without_normalization_has_nothing_wrong_with_it():
    report = bn.check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), images(4), data=[images(4)])
    assert not list(report)
    assert not report.problems
    assert report.layers == ()
