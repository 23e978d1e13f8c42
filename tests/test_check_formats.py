"""A report for programs: JSON of one schema, SARIF 2.1.0 as its specification and code scanning want it."""

import json
import re
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest

import batchnorm
from batchnorm.check import RULES
from batchnorm.check.formats import SCHEMA, as_json, as_sarif
from batchnorm.check.report import Finding, Report
from check_reports import HOSTILE, healthy, hostile, sick

# objects of SARIF 2.1.0, section 3: their properties that are used here, required ones with a star
OBJECTS = {
    "sarifLog": {"$schema": str, "version*": str, "runs*": ["run"]},
    "run": {"tool*": "tool", "automationDetails": "runAutomationDetails", "invocations": ["invocation"],
            "results": ["result"], "columnKind": str},
    "tool": {"driver*": "toolComponent"},
    "toolComponent": {"name*": str, "version": str, "semanticVersion": str, "rules": ["reportingDescriptor"]},
    "reportingDescriptor": {"id*": str, "name": str, "shortDescription": "text", "fullDescription": "text",
                            "help": "text", "defaultConfiguration": "reportingConfiguration", "properties": dict},
    "reportingConfiguration": {"level": str},
    "runAutomationDetails": {"id": str},
    "invocation": {"executionSuccessful*": bool, "toolExecutionNotifications": ["notification"],
                   "toolConfigurationNotifications": ["notification"]},
    "notification": {"message*": "text", "level": str, "associatedRule": "reportingDescriptorReference"},
    "reportingDescriptorReference": {"id": str, "index": int},
    "result": {"ruleId": str, "ruleIndex": int, "level": str, "message*": "text", "locations": ["location"],
               "partialFingerprints": dict, "properties": dict},
    "location": {"physicalLocation": "physicalLocation", "logicalLocations": ["logicalLocation"]},
    "physicalLocation": {"artifactLocation": "artifactLocation", "region": "region"},
    "artifactLocation": {"uri": str, "uriBaseId": str},
    "region": {"startLine": int, "startColumn": int, "endLine": int, "endColumn": int},
    "logicalLocation": {"name": str, "fullyQualifiedName": str, "kind": str},
    "text": {"text*": str},
}  # fmt: skip
# RFC 3986, a reference to a relative path or a file, with nothing that must be encoded
URI = re.compile(r"(file:///)?[\w.~!$&'()*+,;=@/%-]+")


def assert_is(kind, value, where="log"):
    """Assert that a value is of a type, an object of SARIF, or a list of such."""
    if isinstance(kind, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            assert_is(kind[0], item, f"{where}[{i}]")
    elif isinstance(kind, type):
        assert type(value) is kind, where
    else:
        known = {name.rstrip("*"): of for name, of in OBJECTS[kind].items()}
        assert set(value) <= set(known), where
        assert {name[:-1] for name in OBJECTS[kind] if name.endswith("*")} <= set(value), where
        for name, held in value.items():
            assert_is(known[name], held, f"{where}.{name}")
        assert all(text for text in value.values() if isinstance(text, str)), where


REPORTS = {
    "sick": sick(),
    "healthy": healthy(),
    "hostile": hostile(),
    "empty": Report(()),
    "unknown rule": Report((Finding("XX1", "", "It is.", "Mend it."),)),
}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("file", ["nets/a b#1.onnx", "nets:small"])
def test_sarif_is_what_its_specification_says(name, file):
    report = REPORTS[name]
    log = json.loads(as_sarif(report, file))
    assert_is("sarifLog", log)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules)
    assert set(RULES) <= set(rules)
    assert run["tool"]["driver"]["name"] == "batchnorm"
    assert len(run["results"]) == len(report)
    for finding, result in zip(report, run["results"], strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] == finding.code
        assert result["level"] in ("error", "warning", "note")
        assert finding.message in result["message"]["text"]
        assert finding.cure in result["message"]["text"]
        (location,) = result["locations"]
        assert URI.fullmatch(location["physicalLocation"]["artifactLocation"]["uri"])
        named = [one["fullyQualifiedName"] for one in location.get("logicalLocations", [])]
        assert named == [finding.layer] * bool(finding.layer)
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is (not report.problems)
    told = [note["message"]["text"] for note in invocation["toolExecutionNotifications"]]
    assert [any(problem in text for text in told) for problem in report.problems] == [True] * len(report.problems)
    for note, rule in zip(invocation["toolConfigurationNotifications"], report.not_run, strict=True):
        assert rules[note["associatedRule"]["index"]] == rule.code


def test_the_check_above_sees():
    log = json.loads(as_sarif(sick(), "net.onnx"))
    for spoil in (
        lambda run: run["results"][0].pop("message"),
        lambda run: run["results"][0].update(rule="BN1"),
        lambda run: run["results"][0].update(ruleIndex="1"),
        lambda run: run["invocations"][0].pop("executionSuccessful"),
    ):
        spoiled = json.loads(json.dumps(log))
        spoil(spoiled["runs"][0])
        with pytest.raises(AssertionError):
            assert_is("sarifLog", spoiled)


def results(report, file="net.onnx"):
    return json.loads(as_sarif(report, file))["runs"][0]["results"]


def prints(report, file="net.onnx"):
    return [result["partialFingerprints"]["primaryLocationLineHash"] for result in results(report, file)]


def test_fingerprints_stay_when_what_was_measured_changes():
    report = sick()
    first = prints(report)
    assert len(set(first)) == len(report)
    moved = [replace(f, message=f.message.replace("9.2", "9.3"), size=f.size + 1, numbers={}) for f in report]
    assert prints(replace(report, findings=tuple(moved))) == first
    assert set(prints(report, "other.onnx")).isdisjoint(first)
    fewer = tuple(finding for finding in report if finding.code != "BN103")
    assert prints(replace(report, findings=fewer)) == first[2:]
    twice = replace(report, findings=(report[0], report[0]))
    assert [text.partition(":")[2] for text in prints(twice)] == ["1", "2"]


def place(file):
    return results(Report((Finding("BN103", "bn", "It is.", "Mend it."),)), file)[0]["locations"][0]["physicalLocation"]


def test_the_place_is_the_file_of_the_model(elsewhere):
    here = {"uri": "net.onnx", "uriBaseId": "%SRCROOT%"}
    for file in ("net.onnx", str(elsewhere / "net.onnx"), "./net.onnx"):
        assert place(file)["artifactLocation"] == here
    assert place("models/größer 1.keras")["artifactLocation"]["uri"] == "models/gr%C3%B6%C3%9Fer%201.keras"
    outside = place(str(elsewhere.parent / "net.onnx"))["artifactLocation"]
    assert unquote(outside["uri"]) == f"file://{elsewhere.parent}/net.onnx"
    assert "uriBaseId" not in outside


def test_the_place_of_a_factory_is_its_line(elsewhere):
    (elsewhere / "nets").mkdir()
    (elsewhere / "nets" / "__init__.py").write_text("")
    (elsewhere / "nets" / "small.py").write_text("# one\n\ndef make():\n    return 1\n\nmade = make\n")
    uri = "nets/small.py"
    # not imported, or no such name: the module is named all the same
    assert place("nets.small:make") == {
        "artifactLocation": {"uri": uri, "uriBaseId": "%SRCROOT%"},
        "region": {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1},
    }
    __import__("nets.small")
    region = {"startLine": 3, "startColumn": 1, "endLine": 3, "endColumn": 12}
    assert place("nets.small:make") == {"artifactLocation": {"uri": uri, "uriBaseId": "%SRCROOT%"}, "region": region}
    assert place("nets.small:none")["artifactLocation"]["uri"] == uri
    assert place("builtins:dict")["artifactLocation"]["uri"] == "builtins.py"


def test_a_rule_has_the_level_of_its_worst_finding_and_says_how_to_leave_it_out():
    driver = json.loads(as_sarif(sick(), "net.onnx"))["runs"][0]["tool"]["driver"]
    rules = {rule["id"]: rule for rule in driver["rules"]}
    assert rules["BN103"]["defaultConfiguration"]["level"] == "error"
    assert rules["BN301"]["properties"]["problem.severity"] == "recommendation"
    assert rules["BN101"]["defaultConfiguration"]["level"] == "warning"
    for code, rule in RULES.items():
        assert rules[code]["shortDescription"]["text"].lower().startswith(rule.title.lower())
        assert rules[code]["help"]["text"].startswith(rule.look.__doc__)
        assert f"--ignore {code}" in rules[code]["help"]["text"]


KEYS = ["version", "batchnorm", "model", "findings", "not_run", "problems", "layers", "observation"]


def test_json_has_one_schema():
    report = sick()
    told = json.loads(as_json(report, "net.onnx"))
    assert list(told) == KEYS
    assert (told["version"], told["batchnorm"], told["model"]) == (SCHEMA, batchnorm.__version__, "net.onnx")
    assert list(told["findings"][0]) == ["code", "title", "level", "layer", "message", "cure", "size", "numbers"]
    assert told["findings"][0]["title"] == RULES["BN103"].title
    assert [one["layer"] for one in told["observation"]["layers"]] == list(report.layers) == told["layers"]
    np.testing.assert_allclose(told["observation"]["layers"][0]["kl"], report.observation.layers[0].kl)
    assert told["not_run"][0] == {"code": "BN201", "title": "Batches of a single value", "reason": "needs a loader"}
    bare = json.loads(as_json(healthy(), HOSTILE))
    assert list(bare) == KEYS
    assert bare["observation"] is None
    assert bare["model"] == HOSTILE


def test_json_is_json_whatever_was_measured():
    numbers = {"a": float("nan"), "b": np.float32(2), "c": -np.inf, "d": None, "e": np.int64(3)}
    finding = Finding("BN103", "bn", "It is.", "Mend it.", numbers=numbers)
    text = as_json(Report((finding,)), "net.onnx")
    assert "NaN" not in text
    assert json.loads(text)["findings"][0]["numbers"] == {"a": None, "b": 2.0, "c": None, "d": None, "e": 3}
    assert results(Report((finding,)))[0]["properties"]["numbers"]["a"] is None
