"""Every rule finds the planted fault in Keras and ONNX models too, in the right layer, and is silent about a look-alike."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest

import batchnorm as bn
import check_fixtures_keras
import check_fixtures_onnx
from check_pairs import Case

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PAIRS = {"keras": check_fixtures_keras.pair, "onnx": check_fixtures_onnx.pair}
CASES = [(f"{wing}-{name}", code, make, sick) for wing, p in PAIRS.items() for code, name, make, sick in p.cases()]


def values(model):
    if not isinstance(model, keras.Model):
        return [np.frombuffer(model.SerializeToString(deterministic=True), np.uint8)]
    return [np.asarray(keras.ops.convert_to_numpy(v)).copy() for v in model.weights]


@pytest.mark.parametrize(("code", "make", "sick"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_rule_finds_its_fault_and_nothing_in_a_look_alike(code, make, sick):
    case: Case = make(sick)
    before = values(case.model)
    report = bn.check(case.model, **case.given)
    found = [finding for finding in report if finding.code == code]
    assert not report.problems
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, values(case.model), strict=True))
    assert code not in [rule.code for rule in report.not_run] or not sick, report.not_run
    if sick:
        assert case.layer in [finding.layer for finding in found], str(report)
    else:
        assert not found, str(report)


FIXED = [
    ("keras", "BN101", {"data": np.split(check_fixtures_keras.images(64), 4)}),
    ("keras", "BN110", {"data": np.split(check_fixtures_keras.images(64), 4)}),
    ("keras", "BN202", {}),
    ("keras", "BN301", {}),
    ("onnx", "BN108", {}),
    ("onnx", "BN103", {}),
    ("onnx", "BN302", {}),
]


@pytest.mark.parametrize(("wing", "code", "more"), FIXED, ids=[f"{wing}-{code}" for wing, code, _ in FIXED])
def test_what_can_be_mended_is_found_no_more(wing, code, more):
    case = PAIRS[wing].found[code][0](True)
    given = case.given | more
    mended = bn.check(case.model, **given, select=code).fix()
    assert [step.code for step in mended.done] == [code]
    assert not bn.check(mended.model, **given, select=code)


@pytest.mark.parametrize(
    ("wing", "code", "words"),
    [
        ("keras", "BN106", "RematScope"),
        ("keras", "BN108", "training=True"),
        ("keras", "BN109", "mixed_float16"),
        ("onnx", "BN109", "export the model again"),
        ("onnx", "BN110", "not trained"),
    ],
)
def test_what_can_not_be_mended_in_place_is_told_with_its_reason(wing, code, words):
    case = PAIRS[wing].found[code][0](True)
    before = values(case.model)
    mended = bn.check(case.model, **case.given, select=code).fix()
    assert not mended.done
    assert [left.layer for left in mended.left] == [case.layer]
    assert words in mended.left[0].reason
    assert all(np.array_equal(a, b) for a, b in zip(before, values(case.model), strict=True))
