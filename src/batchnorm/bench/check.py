"""What `check` finds of planted faults and says of healthy models, whether it names the cause of a gap, and what it costs."""

import copy
import datetime
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from batchnorm.bench import gaps, healthy, planting_training
from batchnorm.bench.grown import Grown, Seed, grow, seeds
from batchnorm.bench.machine import describe, keep
from batchnorm.bench.planting import plant
from batchnorm.check import RULES, Report, check
from batchnorm.errors import OptionError
from batchnorm.lab.train import one_thread
from batchnorm.observe import observe
from batchnorm.tables import table

__all__ = ["PARTS", "CheckBench", "run"]

PARTS = ("planted", "healthy", "gap", "speed")
# models of each rule; networks with a gap, and without one; timed pairs
EACH, NETWORKS, WELL, ROUNDS = 20, 50, 20, 9
PER_MODEL, KERAS_ROUNDS = 8, 2
# importing it has entered its plants
_ROOMS = (planting_training,)


@dataclass(frozen=True)
class CheckBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        shown = {"planted": _planted_table, "healthy": healthy.told, "gap": _gap_table, "speed": _speed_table}
        parts = [shown[part](self.facts[part]["found"]) for part in PARTS if part in self.facts]
        return "\n\n".join([*parts, f"raw values: {', '.join(map(str, self.files))}"])


def run(out: Path, *parts: str, quick: bool = False) -> CheckBench:
    """Measure some parts (all where none is named), and keep every raw value as JSON in ``out``.

    Raises:
        OptionError: an unknown part.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise OptionError(f"the parts of bench check are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    measured: dict[str, Callable[[bool], Any]] = {
        "planted": _planted, "healthy": healthy.measure, "gap": _gap, "speed": _speed
    }  # fmt: skip
    facts: dict[str, Any] = {}
    files = []
    for part in parts or PARTS:
        with one_thread():
            found = measured[part](quick)
        facts[part] = {"machine": describe(), "date": datetime.datetime.now(datetime.UTC).isoformat(), "found": found}
        files.append(keep(facts[part], out, f"check_{part}.json"))
    return CheckBench(facts, tuple(files))


# -- planted faults ----------------------------------------------------------------------------------------------------


def _planted(quick: bool) -> Any:
    """Plant faults of all rules, until each has its number of models."""
    each = 1 if quick else EACH
    counts = Counter[str](dict.fromkeys(RULES, 0))
    rows: list[dict[str, Any]] = []
    unfit: list[dict[str, str]] = []
    for seed in _endless():
        wanted = [code for code in RULES if counts[code] < each]
        if not wanted or seed.number > (20 if quick else 2 * EACH):
            break
        grown = _grown(seed, unfit)
        if grown is None:
            continue
        rng = np.random.default_rng([seed.number, *seed.name.encode()])
        # those with the fewest models first
        order = sorted(wanted, key=lambda code: (counts[code], rng.random()))
        for code in order[: len(order) if quick else PER_MODEL]:
            row = _tried(code, seed, grown, unfit)
            if row is not None:
                counts[code] += 1
                rows.append(row)
        _said(f"{grown.name}: {sum(row['right'] for row in rows)} of {len(rows)} found")
    if not quick and find_spec("keras") is not None:
        rows += _planted_keras(unfit)
    return {"rows": rows, "unfit": unfit}


def _planted_keras(unfit: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Plant faults in models of Keras, each rule's in one of each family and number."""
    from batchnorm.bench import planting_keras as keras_plants

    for number in range(KERAS_ROUNDS):
        for name in keras_plants.FAMILIES:
            model, batches = keras_plants.grow_keras(name, number)
            report = check(model, batches[0], data=batches)
            before = {(finding.code, finding.layer) for finding in report}
            for code in keras_plants.KERAS_PLANTS:
                rng = np.random.default_rng([number, *f"{code} {name}".encode()])
                row: dict[str, Any] = {"code": code, "zoo": "keras", "model": f"{name}-{number}"}
                try:
                    planted = keras_plants.plant_keras(code, model, batches, rng)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"[:200]
                    unfit.append({"model": row["model"], "code": code, "reason": reason})
                    continue
                row |= {"kind": planted.kind, "layers": list(planted.layers)}
                yield row | judge(code, planted.layers, check(planted.model, **planted.given), before)


def _endless() -> Iterator[Seed]:
    """Yield what models grow from, of the zoos by turns, with other numbers again and again."""
    number = 0
    while True:
        vision, theirs = seeds("torchvision"), seeds("transformers")
        count = len(vision)
        # so many of each zoo in a round
        part = [theirs[(number * count + i) % len(theirs)] for i in range(count)]
        for pair in zip(vision, part, strict=True):
            yield from (Seed(seed.zoo, seed.name, seed.build, number) for seed in pair)
        number += 1


def _grown(seed: Seed, unfit: list[dict[str, str]]) -> Grown | None:
    try:
        return grow(seed)
    except Exception as error:
        unfit.append(
            {"model": f"{seed.name}-{seed.number}", "code": "", "reason": f"{type(error).__name__}: {error}"[:200]}
        )
        return None


def _tried(code: str, seed: Seed, grown: Grown, unfit: list[dict[str, str]]) -> dict[str, Any] | None:
    """Plant one fault and look for it; ``None`` where it can't be planted."""
    try:
        before = _before(grown)
        planted = plant(code, grown, np.random.default_rng([seed.number, *f"{code} {seed.name}".encode()]))
    except Exception as error:
        # a model that has no place for it, or can't be operated on so
        unfit.append({"model": grown.name, "code": code, "reason": f"{type(error).__name__}: {error}"[:200]})
        return None
    if any((code, layer) in before for layer in planted.layers):
        unfit.append({"model": grown.name, "code": code, "reason": "it is there already"})
        return None
    row: dict[str, Any] = {"code": code, "zoo": seed.zoo, "model": grown.name, "kind": planted.kind}
    row |= {"layers": list(planted.layers)}
    try:
        report = check(planted.model, **planted.given)
    except Exception as error:
        return row | {"right": False, "raised": f"{type(error).__name__}: {error}"[:300]}
    row |= judge(code, planted.layers, report, before, planted.allowed)
    if not row["right"]:
        _said(f"  missed: {row}")
    return row


def _before(grown: Grown) -> set[tuple[str, str]]:
    """Return what is found in the model before anything is planted."""
    if grown.findings is None:
        report = check(grown.model, grown.example, data=grown.batches)
        grown.findings = {(finding.code, finding.layer) for finding in report}
    return grown.findings


def judge(
    code: str,
    layers: tuple[str, ...],
    report: Report,
    before: set[tuple[str, str]],
    allowed: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Say whether a fault was found with the right code in the right layers, and what else was found.

    Right: each planted layer is named, and the worst finding of the rule, which the healthy model has not, is one of them.
    """
    found = [finding.layer for finding in report if finding.code == code]
    new = [layer for layer in found if (code, layer) not in before]
    others = {(finding.code, finding.layer) for finding in report if finding.code != code} - before
    right = set(layers) <= set(found) and bool(new) and new[0] in (*layers, *allowed)
    facts: dict[str, Any] = {"right": right, "also": [layer for layer in new if layer not in (*layers, *allowed)]}
    facts["others"] = sorted(Counter(other for other, _ in others).items())
    if not right:
        reasons = [str(rule) for rule in report.not_run if rule.code == code]
        facts |= {"found": new, "problems": list(report.problems), "not_run": reasons}
    return facts


def _planted_table(found: dict[str, Any]) -> str:
    rows = []
    for code, entry in sorted(RULES.items()):
        own = [row for row in found["rows"] if row["code"] == code]
        kinds = Counter(row["zoo"] for row in own)
        right, alone = sum(row["right"] for row in own), sum(not row.get("also") and row["right"] for row in own)
        zoos = ", ".join(f"{count} {zoo}" for zoo, count in sorted(kinds.items()))
        rows.append((f"{code} {entry.title}", f"{right} of {len(own)}", f"{alone}", zoos))
    right, total = sum(row["right"] for row in found["rows"]), len(found["rows"])
    share = 100 * right / max(1, total)
    rows.append(("all", f"{right} of {total}", f"{share:.1f} %", ""))
    return table(("Planted", "Found in the right layer", "And nowhere else", "Models"), rows)


# -- causes of a gap ---------------------------------------------------------------------------------------------------


def _gap(quick: bool) -> Any:
    """Let the first finding name the cause of a gap between training and evaluation."""
    networks = []
    for number in range(len(gaps.CAUSES) if quick else NETWORKS):
        cause, one = gaps.planted(number)
        report = check(one.model, data=one.data, **one.given)
        first = report[0] if len(report) else None
        named = first is not None and first.code == cause.code and all(word in first.message for word in cause.words)
        said = "" if first is None else str(first)
        networks.append({"number": number, "cause": cause.name, "named": named, "first": said})
        _said(f"gap {number} {cause.name}: {'named' if named else said}")
    well = []
    for number in range(1 if quick else WELL):
        one = gaps.healthy_network(1000 + number)
        well.append([str(finding) for finding in check(one.model, data=one.data, **one.given)])
    return {"networks": networks, "healthy": well}


def _gap_table(found: dict[str, Any]) -> str:
    rows = []
    for cause in gaps.CAUSES:
        own = [one for one in found["networks"] if one["cause"] == cause.name]
        rows.append((cause.name, f"{sum(one['named'] for one in own)} of {len(own)}"))
    rows.append(("all", f"{sum(one['named'] for one in found['networks'])} of {len(found['networks'])}"))
    well = found["healthy"]
    rows.append(("healthy, nothing found", f"{sum(not one for one in well)} of {len(well)}"))
    return table(("Cause of the gap", "Named by the first finding"), rows)


# -- what it costs -----------------------------------------------------------------------------------------------------


def _speed(quick: bool) -> Any:
    """Time a check without data, and one pass over data beside a plain evaluation of it, in turns."""
    from batchnorm.bench.zoo import open_torchvision

    open_torchvision()
    import torchvision

    torch.manual_seed(0)
    deep = (torchvision.models.resnet18 if quick else torchvision.models.resnet152)(weights=None).eval()
    size, count = ((2, 3, 64, 64), 1) if quick else ((2, 3, 224, 224), 2)
    x = torch.randn(size)
    whole = {"nothing": lambda: check(deep), f"an example {size}": lambda: check(deep, x)}
    seconds = {given: [_seconds(work) for _ in range(2 if quick else 5)] for given, work in whole.items()}
    wide = (torchvision.models.resnet18 if quick else torchvision.models.resnet50)(weights=None).eval()
    data = [torch.randn(4 if quick else 32, *size[1:]) for _ in range(count)]
    twin = copy.deepcopy(wide)
    ways = {"plain": lambda: _evaluate(wide, data), "observe": lambda: observe(twin, data, progress=False)}
    turns: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 if quick else ROUNDS + 1):
        for name, way in ways.items():
            turns[name].append(_seconds(way))
    # the first round fills caches
    turns = {name: values[1:] for name, values in turns.items()}
    layers = f"ResNet-{18 if quick else 152}", f"ResNet-{18 if quick else 50}, {count} x {tuple(data[0].shape)}"
    return {
        "checked": layers[0],
        "whole": seconds,
        "passed": layers[1],
        "turns": turns,
        "threads": torch.get_num_threads(),
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _evaluate(model: nn.Module, data: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for x in data:
            model(x)


def _speed_table(found: dict[str, Any]) -> str:
    rows = [
        (f"check {found['checked']}, given {given}", f"{median(values):.2f} s", "")
        for given, values in found["whole"].items()
    ]
    plain, own = found["turns"]["plain"], found["turns"]["observe"]
    ratios = [a / b for a, b in zip(own, plain, strict=True)]
    told = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    rows.append((f"one pass over {found['passed']}", f"{median(own):.2f} s", told))
    return table(("What", "Median", "Ratio to plain evaluation, in turns"), rows)


def _said(line: str) -> None:
    sys.stderr.write(f"{line}\n")
