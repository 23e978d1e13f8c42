"""A report for programs: JSON for scripts, SARIF for code scanning."""

import hashlib
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

import batchnorm
from batchnorm.check.report import ERROR, NOTE, WARNING, Finding, Report
from batchnorm.check.rules import RULES

__all__ = ["SCHEMA", "as_json", "as_sarif", "title_of", "why_of"]

SCHEMA = 1
"""Version of the JSON that `as_json` writes: it changes where a key changes its meaning or goes."""

_SARIF = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
# what code scanning calls the levels of its rules
_SEVERITIES = {ERROR: "error", WARNING: "warning", NOTE: "recommendation"}
_START = {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1}


def as_json(report: Report, model_name: str) -> str:
    """Return a report as JSON; numbers that are not finite become null.

    Args:
        report: what `check` has returned.
        model_name: how the model is called, as the file that holds it.

    Returns:
        One object: ``version`` (of this schema), ``batchnorm`` (version), ``model``, ``findings``, ``not_run``, ``problems``,
        ``layers``, and ``observation``, which is null without data.

    Example:
        >>> finding = Finding("BN103", "bn1", "it is far off.", "Recalibrate.", numbers={"sigma": float("inf")})
        >>> told = json.loads(as_json(Report((finding,), layers=("bn1", "bn2")), "net.onnx"))
        >>> told["model"], told["layers"], told["findings"][0]["numbers"]
        ('net.onnx', ['bn1', 'bn2'], {'sigma': None})
    """
    told = {
        "version": SCHEMA,
        "batchnorm": batchnorm.__version__,
        "model": model_name,
        "findings": [_finding(finding, title_of(finding.code, report)) for finding in report.findings],
        "not_run": [{"code": rule.code, "title": rule.title, "reason": rule.reason} for rule in report.not_run],
        "problems": list(report.problems),
        "layers": list(report.layers),
        "observation": None if report.observation is None else report.observation.to_dict(),
    }
    return "{\n" + ",\n".join(f'  "{key}": {_dumped(_plain(value), key)}' for key, value in told.items()) + "\n}\n"


def as_sarif(report: Report, file: str) -> str:
    """Return a report as SARIF 2.1.0, as code scanning reads it.

    Args:
        report: what `check` has returned.
        file: the file of the model, or ``package.module:factory``, whose file and line are told where they can be found.

    Returns:
        A log of one run. Fingerprints are made of the file, the rule and the layer: they are the same in the next run, whatever
        was measured. A run that could not look at something has ``executionSuccessful`` false.

    Example:
        >>> run = json.loads(as_sarif(Report((Finding("BN103", "bn1", "it is off.", "Recalibrate."),)), "net.onnx"))["runs"][0]
        >>> run["results"][0]["message"]["text"]
        'bn1: it is off. Cure: Recalibrate.'
        >>> run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        'net.onnx'

    Reference:
        OASIS: Static Analysis Results Interchange Format (SARIF) Version 2.1.0, 2020.
    """
    codes = sorted({*RULES, *(finding.code for finding in report), *(rule.code for rule in report.not_run)})
    place = _place(file)
    uri = place["artifactLocation"]["uri"]
    run = {
        "tool": {
            "driver": {
                "name": "batchnorm",
                "version": batchnorm.__version__,
                "semanticVersion": batchnorm.__version__,
                "rules": [_rule(code, report) for code in codes],
            }
        },
        # a category for each model, so that the results of one do not replace those of another
        "automationDetails": {"id": f"batchnorm/{uri}/"},
        "invocations": [_invocation(report, codes)],
        "results": _results(report.findings, codes, place),
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": _SARIF, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False) + "\n"


def _dumped(value: Any, key: str) -> str:
    # a line for each of a million channels would be for nobody
    indent = None if key == "observation" else 2
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).replace("\n", "\n  ")


def title_of(code: str, report: Report) -> str:
    """Return what a rule finds, in a few words; empty for a rule that nobody knows."""
    known = RULES.get(code)
    return known.title if known else next((rule.title for rule in report.not_run if rule.code == code), "")


def why_of(code: str) -> str:
    """Return why a rule is one, in a sentence; empty for a rule that nobody knows."""
    known = RULES.get(code)
    return (inspect.getdoc(known.look) or "") if known else ""


def _finding(finding: Finding, title: str) -> dict[str, Any]:
    return {
        "code": finding.code,
        "title": title,
        "level": finding.level,
        "layer": finding.layer,
        "message": finding.message,
        "cure": finding.cure,
        "size": finding.size,
        "numbers": finding.numbers,
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON can say it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return None if isinstance(value, float) and not isfinite(value) else value
    return [_plain(held) for held in value]


def _rule(code: str, report: Report) -> dict[str, Any]:
    known, title = RULES.get(code), title_of(code, report) or code
    level = next((finding.level for finding in report if finding.code == code), WARNING)
    return {
        "id": code,
        "name": "".join(word[:1].upper() + word[1:] for word in re.findall(r"\w+", title)),
        "shortDescription": {"text": _sentence(title)},
        "fullDescription": {"text": why_of(code) or _sentence(title)},
        "help": {"text": _help(code, title, known.needs if known else "")},
        "defaultConfiguration": {"level": level},
        "properties": {"problem.severity": _SEVERITIES[level], "tags": ["batch-normalization"]},
    }


def _sentence(title: str) -> str:
    return f"{title[:1].upper()}{title[1:]}{'' if title.endswith('.') else '.'}"


def _help(code: str, title: str, needs: str) -> str:
    told = f" It needs {needs}." if needs else ""
    again = f"Run only this rule: batchnorm check MODEL --select {code}. Leave it out: --ignore {code}."
    return f"{why_of(code) or _sentence(title)}{told}\n\n{again}"


def _invocation(report: Report, codes: Sequence[str]) -> dict[str, Any]:
    return {
        "executionSuccessful": not report.problems,
        "toolExecutionNotifications": [
            {"level": "error", "message": {"text": f"could not be looked at: {problem}"}} for problem in report.problems
        ],
        "toolConfigurationNotifications": [
            {
                "level": "note",
                "message": {"text": f"not run: {rule}"},
                "associatedRule": {"id": rule.code, "index": codes.index(rule.code)},
            }
            for rule in report.not_run
        ],
    }


def _results(findings: Sequence[Finding], codes: Sequence[str], place: dict[str, Any]) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    results = []
    for finding in findings:
        digest = _digest(place["artifactLocation"]["uri"], finding)
        seen[digest] += 1
        location: dict[str, Any] = {"physicalLocation": place}
        if finding.layer:
            name = finding.layer.rpartition(".")[2] or finding.layer
            location["logicalLocations"] = [{"name": name, "fullyQualifiedName": finding.layer, "kind": "member"}]
        results.append(
            {
                "ruleId": finding.code,
                "ruleIndex": codes.index(finding.code),
                "level": finding.level,
                "message": {"text": _text(finding)},
                "locations": [location],
                # the name that code scanning looks for
                "partialFingerprints": {"primaryLocationLineHash": f"{digest}:{seen[digest]}"},
                "properties": {"numbers": _plain(finding.numbers)},
            }
        )
    return results


def _text(finding: Finding) -> str:
    where = f"{finding.layer}: " if finding.layer else ""
    return f"{where}{finding.message} Cure: {finding.cure}"


def _digest(uri: str, finding: Finding) -> str:
    return hashlib.sha256("\0".join((uri, finding.code, finding.layer)).encode()).hexdigest()[:16]


def _place(spec: str) -> dict[str, Any]:
    """Return the physical location of a model: its file, or the line of its factory."""
    module, _, name = spec.partition(":")
    if not name or Path(spec).exists():
        return {"artifactLocation": _artifact(Path(spec)), "region": _START}
    path, region = Path(*module.split(".")).with_suffix(".py"), _START
    try:
        factory = inspect.unwrap(getattr(sys.modules[module], name))
        path = Path(inspect.getsourcefile(factory) or path)
        lines, first = inspect.getsourcelines(factory)
        region = {"startLine": first, "startColumn": 1, "endLine": first, "endColumn": len(lines[0].rstrip()) + 1}
    except (KeyError, AttributeError, TypeError, OSError):
        # made by other code, or in no file: the module is named all the same
        pass
    return {"artifactLocation": _artifact(path), "region": region}


def _artifact(path: Path) -> dict[str, str]:
    absolute = path.absolute()
    if absolute.is_relative_to(Path.cwd()):
        return {"uri": quote(absolute.relative_to(Path.cwd()).as_posix()), "uriBaseId": "%SRCROOT%"}
    return {"uri": absolute.as_uri()}
