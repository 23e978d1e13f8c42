"""Every rule finds the planted fault in the right layer, is silent about a look-alike, and leaves the model as it was."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.check import RULES
from check_fixtures import pair, values_of
from check_pairs import Case

CASES = pair.cases()


@pytest.mark.parametrize(("code", "make", "sick"), [(c, m, s) for c, _, m, s in CASES], ids=[n for _, n, _, _ in CASES])
def test_a_rule_finds_its_fault_and_nothing_in_a_look_alike(code, make, sick):
    case: Case = make(sick)
    before, modes = values_of(case.model), [module.training for module in case.model.modules()]
    report = bn.check(case.model, **case.given)
    found = [finding for finding in report if finding.code == code]
    assert not report.problems
    assert code not in [rule.code for rule in report.not_run] or not sick, report.not_run
    if sick:
        assert case.layer in [finding.layer for finding in found], str(report)
        assert all(finding.message.strip() and finding.cure.strip() for finding in found)
    else:
        assert not found, str(report)
    after = values_of(case.model)
    assert [module.training for module in case.model.modules()] == modes
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)


def test_every_rule_has_a_pair():
    assert {code for code, *_ in CASES} == set(RULES)
