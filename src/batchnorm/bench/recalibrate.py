"""Recalibration beside other tools: what goes wrong, what it costs; and what it gives back to small networks."""

import copy
import datetime
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from math import isinf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from batchnorm.bench import repairs
from batchnorm.bench.effects import paired_effect
from batchnorm.bench.machine import describe, keep
from batchnorm.bench.statistics_cases import CASES, Tool
from batchnorm.errors import OptionError
from batchnorm.lab.data import load_data
from batchnorm.lab.train import one_thread
from batchnorm.recalibrate import recalibrate
from batchnorm.rooms import require
from batchnorm.tables import table

__all__ = ["PARTS", "RecalibrateBench", "run"]

PARTS = ("checks", "speed", "repairs")
SEEDS, QUICK_SEEDS, QUICK_FACTOR = 10, 2, 20
ROUNDS, IMAGES = 9, (2, 32)


@dataclass(frozen=True)
class RecalibrateBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        shown = {"checks": _checks_table, "speed": _speed_table, "repairs": _repairs_table}
        parts = [shown[part](self.facts[part]) for part in PARTS if part in self.facts]
        return "\n\n".join([*parts, f"raw values: {', '.join(map(str, self.files))}"])


def run(out: Path, *parts: str, quick: bool = False) -> RecalibrateBench:
    """Measure some parts (all where none is named), and keep every raw value as JSON in ``out``.

    Raises:
        OptionError: an unknown part.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise OptionError(f"the parts of bench recalibrate are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    measured: dict[str, Callable[[bool], Any]] = {"checks": _checks, "speed": _speed, "repairs": _repairs}
    facts: dict[str, Any] = {}
    files = []
    for part in parts or PARTS:
        facts[part] = {
            "machine": describe(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(),
            "found": measured[part](quick),
        }
        files.append(keep(facts[part], out, f"recalibrate_{part}.json"))
    return RecalibrateBench(facts, tuple(files))


# -- the tools ---------------------------------------------------------------------------------------------------------


def _ours(model: nn.Module, data: Any, **options: Any) -> None:
    recalibrate(model, data, progress=False, **options)


def _update_bn(model: nn.Module, data: Any) -> None:
    """torch's own; it has no options."""  # noqa: D403
    update_bn(data, model)


def _precise_bn(model: nn.Module, data: Any, batches: int | None = None) -> None:
    """fvcore's, called as its users do: on a model in training, with the number of batches where there is one."""
    size = len(data) if hasattr(data, "__len__") else 200
    model.train() if not any(module.training for module in model.modules()) else None
    _fvcore().update_bn_stats(model, data, batches or size)


def _fvcore() -> Any:
    with warnings.catch_warnings():
        # it compiles a function of its own while it is imported
        warnings.simplefilter("ignore", DeprecationWarning)
        require("fvcore.nn.precise_bn", "zoo")
        return import_module("fvcore.nn.precise_bn")


TOOLS: dict[str, Tool] = {"batchnorm": _ours, "swa_utils.update_bn": _update_bn, "fvcore precise_bn": _precise_bn}


# -- what they get right -----------------------------------------------------------------------------------------------


def _checks(quick: bool) -> Any:
    _fvcore()
    found = []
    for case in CASES[:: 5 if quick else 1]:
        errors = {name: case.error(tool) for name, tool in TOOLS.items()}
        passes = {name: error <= case.bound for name, error in errors.items()}
        found.append({"case": case.name, "kind": case.kind, "errors": errors, "passes": passes})
    return found


def _checks_table(facts: dict[str, Any]) -> str:
    found = facts["found"]
    rows = [(one["kind"], one["case"], *(told(one, name) for name in TOOLS)) for one in found]
    rows.append(("", f"of {len(found)}", *(str(sum(one["passes"][name] for one in found)) for name in TOOLS)))
    return table(("Kind", "Case", *TOOLS), rows)


def told(one: dict[str, Any], tool: str) -> str:
    """Return what was found of a tool in a case, in a word."""
    error = one["errors"][tool]
    if one["kind"] == "exact":
        return ("" if one["passes"][tool] else "no: ") + ("it raises" if isinf(error) else f"{error:.0e}")
    return "yes" if one["passes"][tool] else "no"


# -- what it costs -----------------------------------------------------------------------------------------------------


def _speed(quick: bool) -> Any:
    """Time one pass of each tool over the same batches, and a plain evaluation of them, in turns."""
    from batchnorm.bench.zoo import open_torchvision

    open_torchvision()
    import torchvision

    torch.manual_seed(0)
    model = (torchvision.models.resnet18 if quick else torchvision.models.resnet50)(weights=None)
    count, size = (1, 2) if quick else IMAGES
    data = [torch.randn(size, 3, 224, 224) for _ in range(count)]
    models = {name: copy.deepcopy(model) for name in TOOLS}
    models["fvcore precise_bn"].train()
    ways: dict[str, Callable[[], None]] = {"plain evaluation": lambda: _evaluate(model, data)}
    ways |= {name: lambda tool=tool, name=name: tool(models[name], data) for name, tool in TOOLS.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(3 if quick else ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {"model": type(model).__name__, "batches": [count, size], "seconds": seconds}


def _evaluate(model: nn.Module, data: list[torch.Tensor]) -> None:
    model.eval()
    with torch.no_grad():
        for x in data:
            model(x)


def _speed_table(facts: dict[str, Any]) -> str:
    seconds = facts["found"]["seconds"]
    plain = seconds["plain evaluation"]
    rows = []
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, plain, strict=True)]
        rows.append((name, f"{median(times):.2f} s", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"))
    count, size = facts["found"]["batches"]
    return table((f"One pass over {count} batches of {size}", "Median", "Ratio to plain evaluation"), rows)


# -- what it gives back ------------------------------------------------------------------------------------------------


def _repairs(quick: bool) -> Any:
    seeds, factor = (QUICK_SEEDS, QUICK_FACTOR) if quick else (SEEDS, 1)
    data = load_data("digits")
    with one_thread():
        splits = [data.split(seed) for seed in range(seeds)]
        return [
            {"case": one.name, "runs": [one.measure(split, seed, factor) for seed, split in enumerate(splits)]}
            for one in repairs.CASES
        ]


def _repairs_table(facts: dict[str, Any]) -> str:
    rows = []
    for one in facts["found"]:
        pairs = [(run["before"], run["after"]) for run in one["runs"]]
        means = [f"{100 * np.mean([arm['accuracy'] for arm in arms]):.1f} %" for arms in zip(*pairs, strict=True)]
        effects = paired_effect(pairs, "accuracy", 100, 2), paired_effect(pairs, "log_loss", 1, 4)
        rows.append((one["case"], *means, *effects))
    runs = len(facts["found"][0]["runs"])
    head = ("Situation", "Accuracy before", "After", "Points", "Log-loss, nats")
    note = f"After minus before, on test rows: mean of {runs} paired seeds, 95 % interval of the sign-flip test."
    return f"{table(head, rows)}\n{note}"
