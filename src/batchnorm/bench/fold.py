"""Folding beside its peers: what each removes, where each is wrong or crashes, how long it takes; latency of folded models."""

import copy
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import batchnorm
from batchnorm.bench.adversarial import adversaries
from batchnorm.bench.adversarial_onnx import GRAPHS, inputs_of
from batchnorm.bench.judging import judge, judge_graph
from batchnorm.bench.machine import describe, keep
from batchnorm.bench.peers import FILE_TOOLS, MODULE_TOOLS, PACKAGES
from batchnorm.bench.ratios import interval
from batchnorm.bench.zoo import Member, timm_zoo, torchvision_zoo
from batchnorm.bench.zoo_transformers import transformers_zoo
from batchnorm.errors import MissingDependencyError, OptionError
from batchnorm.lab.train import one_thread
from batchnorm.tables import table

__all__ = ["FoldBench", "run"]

ZOOS: dict[str, Callable[[], list[Member]]] = {
    "torchvision": torchvision_zoo,
    "transformers": transformers_zoo,
    "timm": timm_zoo,
    "adversarial": adversaries,
}
QUICK = {
    "adversarial": (
        "Conv2d, 1 groups",
        "ConvTranspose2d, 2 groups",
        "convolution with and without its norm",
        "norm, Conv2d",
    )
}
# of files: a protobuf ends at 2 GiB, and regnet_y_128gf needs more
MOST_PARAMETERS = 500e6
WHOLE = ("resnet152", "efficientnet_b6")
LATENCY = ("mobilenet_v2", "resnet50", "densenet121")
ROUNDS, PAIRS = 5, 100
PARTS = (*ZOOS, "graphs", "speed")
HEAD = ("Tool", "Models", "Norms", "Removed", "Scale and shift", "Wrong", "Crashed", "Seconds")


@dataclass(frozen=True)
class FoldBench:
    """Raw values of the measurement; prints as the tables made of them."""

    parts: dict[str, dict[str, Any]]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        lines = []
        zoos = {name: part["models"] for name, part in self.parts.items() if "models" in part}
        for name, models in zoos.items():
            lines += [f"{name}: {len(models)} models", table(HEAD, _rows(models), numbers=len(HEAD) - 1), ""]
        if zoos:
            lines += [
                "Removed: absorbed, or not in the graph any more. Scale and shift: two vectors for each channel are left.",
                "Wrong: models whose outputs differ by more than rounding explains. Crashed: a process that ended, an error, a",
                "refusal. Seconds: where the tool returned.",
            ]
        speed = self.parts.get("speed", {})
        lines += [_whole(row) for row in speed.get("whole", ())]
        lines += [_latency(row) for row in speed.get("latency", ())]
        return "\n".join([*lines, f"raw values: {', '.join(map(str, self.files))}"])


def run(out: Path, *parts: str, quick: bool = False) -> FoldBench:
    """Let every tool fold every model, measure times, and keep every raw value as JSON in ``out``.

    Args:
        out: folder of the files, one for each part.
        parts: of `PARTS`; all of them by default.
        quick: few and small models.

    Raises:
        MissingDependencyError: a peer, or a library of models, is not installed.
        OptionError: there is no such part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise OptionError(f"parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    _require(() if quick else ("torchvision", "transformers", "timm", "onnx", *_imported()))
    measured, files = {}, []
    for part in parts or PARTS:
        facts: dict[str, Any] = {"machine": describe(), "date": datetime.datetime.now(datetime.UTC).isoformat()}
        facts |= _measure(part, quick)
        measured[part] = facts
        files.append(keep(facts, out, f"fold_{part}.json"))
    return FoldBench(measured, tuple(files))


def _measure(part: str, quick: bool) -> dict[str, Any]:
    if part == "speed":
        return _speed(quick)
    return _graphs(quick) if part == "graphs" else _models(part, quick)


def _graphs(quick: bool) -> dict[str, Any]:
    with one_thread():
        _warm_up()
        names = list(GRAPHS)[: 2 if quick else None]
        models = {name: GRAPHS[name]() for name in names}
        return {"models": [judge_graph(name, model, inputs_of(model)) for name, model in models.items()]}


def _models(zoo: str, quick: bool) -> dict[str, Any]:
    members = [member for member in ZOOS[zoo]() if _is_quick(member)] if quick else ZOOS[zoo]()
    # a process that is forked from one with several threads may wait for ever
    with one_thread():
        _warm_up()
        return {"models": list(_judged(members))}


def _speed(quick: bool) -> dict[str, Any]:
    rounds, pairs = (2, 5) if quick else (ROUNDS, PAIRS)
    return {
        "threads": torch.get_num_threads(),
        "whole": [_time_whole(*member, rounds) for member in _speed_models(WHOLE, quick)],
        "latency": [_time_latency(*member, pairs) for member in _speed_models(LATENCY, quick)],
    }


def _require(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if find_spec(name.partition(".")[0]) is None]
    if missing:
        raise MissingDependencyError(
            f"every peer must be there to be measured, but {', '.join(missing)} is not installed: "
            f"pip install {' '.join(missing)}"
        )


def _imported() -> tuple[str, ...]:
    return tuple(name for names in PACKAGES.values() for name in names)


def _is_quick(member: Member) -> bool:
    return member.name in QUICK.get(member.zoo, ())


def _warm_up() -> None:
    """Let every tool import what it needs, which no model shall be charged with."""
    x, tiny = torch.randn(1, 3, 8, 8), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for tool in MODULE_TOOLS.values():
        with torch.no_grad():
            tool(copy.deepcopy(tiny), x)
    for name in (
        "onnx",
        "onnxruntime",
        "onnxsim",
        "onnxoptimizer",
        "onnxslim",
        "onnxscript.optimizer",
        "onnxscript.rewriter",
    ):
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)


def _judged(members: list[Member]) -> Iterator[dict[str, Any]]:
    """Judge the tools on one model after the other; one that can't be built or run is told as such."""
    for number, member in enumerate(members, 1):
        sys.stderr.write(f"{member.zoo} {number}/{len(members)}: {member.name}\n")
        try:
            _, model, _ = member()
            small = sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS
            del model
            yield judge(member, files=small, negated=member.zoo == "adversarial")
        except Exception as error:
            yield {"zoo": member.zoo, "name": member.name, "norms": 0, "tools": {}, "not_run": f"{error}"}
        gc.collect()


# -- times ---------------------------------------------------------------------------------------------------------


def _speed_models(names: tuple[str, ...], quick: bool) -> list[tuple[str, nn.Module, torch.Tensor]]:
    if quick:
        tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        return [("a small network", tiny.eval(), torch.randn(1, 3, 32, 32))]
    built = [member() for member in torchvision_zoo() if member.name in names]
    return [(name, model, torch.randn(1, 3, 224, 224)) for name, model, _ in built]


def _time_whole(name: str, model: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Time folding with its proof, and tracing with freezing, in turns."""
    raw: dict[str, Any] = {"model": name, "shape": list(x.shape), "fold": [], "trace and freeze": []}
    for _ in range(rounds + 1):
        raw["fold"].append(_seconds(lambda: batchnorm.fold(model, x)))
        raw["trace and freeze"].append(_seconds(lambda: torch.jit.freeze(torch.jit.trace(model, x))))  # type: ignore[no-untyped-call]
    # the first round fills caches
    return raw | {key: raw[key][1:] for key in ("fold", "trace and freeze")}


def _time_latency(name: str, model: nn.Module, x: torch.Tensor, pairs: int) -> dict[str, Any]:
    """Time the folded and the unfolded model in pairs; who comes first changes from pair to pair."""
    folded = batchnorm.fold(model, x).model
    raw: dict[str, Any] = {"model": name, "folded": [], "unfolded": []}
    both = [("folded", folded), ("unfolded", model)]
    with torch.inference_mode():
        for _ in range(pairs + 3):
            for key, net in both:
                raw[key].append(_seconds(lambda net=net: net(x)))  # type: ignore[misc]
            both.reverse()
    return raw | {key: raw[key][3:] for key in ("folded", "unfolded")}


def _seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
    finally:
        gc.enable()


# -- tables --------------------------------------------------------------------------------------------------------


def _rows(models: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each tool; norms of models that a tool crashed on count as not removed."""
    rows: list[tuple[str, ...]] = []
    for tool in (*MODULE_TOOLS, *FILE_TOOLS):
        tried = [(model["norms"], model["tools"][tool]) for model in models if tool in model["tools"]]
        if not tried:
            continue
        norms = sum(n for n, _ in tried)
        returned = [(n, found) for n, found in tried if "crashed" not in found]
        removed = sum(max(0, n - found["left"]) for n, found in returned)
        plain = sum(found["plain"] for _, found in returned)
        wrong = sum(found["wrong"] for _, found in returned)
        seconds = sum(found["seconds"] for _, found in returned)
        share = f"{removed:,} ({removed / norms:.0%})" if norms else "0"
        crashed = len(tried) - len(returned)
        rows.append(
            (tool, str(len(tried)), f"{norms:,}", share, f"{plain:,}", str(wrong), str(crashed), f"{seconds:.0f}")
        )
    return rows


def _whole(row: dict[str, Any]) -> str:
    ours, theirs = row["fold"], row["trace and freeze"]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return (
        f"{row['model']}, {'×'.join(map(str, row['shape']))}: fold with its proof {median(ours):.2f} s, "
        f"trace and freeze {median(theirs):.2f} s, "
        f"median ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} interleaved pairs)"
    )


def _latency(row: dict[str, Any]) -> str:
    ratios = [a / b for a, b in zip(row["folded"], row["unfolded"], strict=True)]
    low, high = interval(ratios)
    return (
        f"{row['model']}, batch 1: folded {1e3 * median(row['folded']):.1f} ms, "
        f"unfolded {1e3 * median(row['unfolded']):.1f} ms, median ratio {median(ratios):.3f} "
        f"[{low:.3f}, {high:.3f}], {len(ratios)} interleaved pairs"
    )
