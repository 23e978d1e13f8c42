"""What `fix` says it has mended is mended, and what it leaves is as it was."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError
from check_fixtures import HardWired, images, net, pair, values_of
from check_pairs import Case

MENDED = ("BN101", "BN103", "BN104", "BN106", "BN108", "BN109", "BN110", "BN202", "BN301", "BN302")
LEFT = ("BN102", "BN105", "BN107", "BN111", "BN201", "BN206", "BN303", "BN304")


def sick(code: str) -> list[Case]:
    return [make(True) for make in pair.found[code]]


@pytest.mark.parametrize("code", MENDED)
def test_what_is_mended_is_no_longer_found(code):
    for case in [case for case in sick(code) if type(case.model) is not HardWired]:
        given = case.given | ({"data": list(images(64).split(16))} if code == "BN101" else {})
        report = bn.check(case.model, select=code, **given)
        mended = report.fix()
        assert [step.code for step in mended.done] == [code], str(mended)
        assert {step.layers for step in mended.done} == {tuple(f.layer for f in report)}
        assert not bn.check(mended.model, select=code, **given), str(mended)


@pytest.mark.parametrize("code", LEFT)
def test_what_needs_a_decision_is_left(code):
    for case in [case for case in sick(code) if "data" not in case.given]:
        before = values_of(case.model)
        mended = bn.check(case.model, select=code, **case.given).fix()
        assert not mended.done
        assert {left.code for left in mended.left} == {code}
        assert all(left.reason for left in mended.left)
        after = values_of(case.model)
        assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)


def test_statistics_are_left_without_data():
    (case, *_) = sick("BN101")
    mended = bn.check(case.model, select="BN101").fix()
    assert "data" in mended.left[0].reason
    assert not mended.done


def test_everything_at_once_on_one_model():
    model = net().train()
    model[1].momentum = 0.99
    model[4].reset_running_stats()
    model[0].bias = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    x, data = images(16), list(images(64).split(16))
    report = bn.check(model, x, data=data, optimizer=optimizer)
    mended = report.fix()
    assert {step.code for step in mended.done} >= {"BN101", "BN110", "BN202", "BN301"}
    again = bn.check(mended.model, x, data=data)
    assert not list(again), str(again)
    # the optimizer holds each parameter once, as before
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {p for norm in (model[1], model[4], model[7]) for p in norm.parameters()}
    assert model.training
    assert model[1].momentum == pytest.approx(0.01)


def test_folding_and_stripping_leave_the_users_model_alone():
    (case, *_) = sick("BN302")
    before, x = values_of(case.model), images(4)
    expected = case.model(x)
    mended = bn.check(case.model, select="BN3", **case.given).fix()
    assert mended.model is not case.model
    assert not [m for m in mended.model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(mended.model(x), expected, atol=1e-5, rtol=1e-5)
    after = values_of(case.model)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_layer_that_cannot_be_changed_is_left_with_its_reason():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Own(8))
    model[1].requires_grad_(False)
    mended = bn.check(model.train(), select="BN104").fix()
    assert not mended.done
    assert "Own" in mended.left[0].reason
    assert type(model[1]) is Own


def test_a_mode_that_is_written_into_the_code_is_left():
    x = images(4)
    mended = bn.check(HardWired(training=True).eval(), x, select="BN108").fix()
    assert not mended.done
    assert "code" in mended.left[0].reason


def test_a_report_without_its_model_says_so():
    with pytest.raises(OptionError, match="check"):
        bn.check.__globals__["Report"](()).fix()
