"""Every rule finds the planted fault in the right layer, and is silent about a look-alike."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.check import RULES
from check_fixtures import Case, cases, values_of


@pytest.mark.parametrize(
    ("code", "make", "sick"), [(c, m, s) for c, _, m, s in cases()], ids=[n for _, n, _, _ in cases()]
)
def test_a_rule_finds_its_fault_and_nothing_in_a_look_alike(code, make, sick):
    case: Case = make()
    report = bn.check(case.model, **case.given)
    found = [finding for finding in report if finding.code == code]
    assert not report.problems
    assert code not in [rule.code for rule in report.not_run] or not sick, report.not_run
    if sick:
        assert case.layer in [finding.layer for finding in found], str(report)
        assert all(finding.message.strip() and finding.cure.strip() for finding in found)
    else:
        assert not found, str(report)


@pytest.mark.parametrize("make", [m for _, _, m, _ in cases()], ids=[n for _, n, _, _ in cases()])
def test_the_model_is_left_as_it_was(make):
    case: Case = make()
    before, modes = values_of(case.model), [module.training for module in case.model.modules()]
    bn.check(case.model, **case.given)
    after = values_of(case.model)
    assert [module.training for module in case.model.modules()] == modes
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)


def test_every_rule_has_a_pair():
    assert {code for code, *_ in cases()} == set(RULES)
