"""What a layer with no option switched on costs beside torch's own, and how exact both are, in every layout."""

import datetime
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.machine import describe, keep
from batchnorm.errors import VerificationError
from batchnorm.torch import BatchNorm1d, BatchNorm2d

__all__ = ["LayersBench", "run"]

# channels and map size of the distinct batch normalizations of ResNet-50 at 224², batch 32
RESNET_50 = (
    (64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28), (256, 14), (512, 14), (1024, 14),
    (512, 7), (2048, 7),
)  # fmt: skip
MLP = ((64, 100), (64, 300), (128, 300), (128, 784), (256, 1024), (512, 1024))
MEANS = (0.0, 1e1, 1e2, 1e3, 1e4, 1e5)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SECONDS_A_SHAPE, MOST_ROUNDS = 6.0, 2000
# errors of more than this many times torch's, plus a few units in the last place, are not timed but refused
ALLOWED, UNITS = 2.0, 8.0


@dataclass(frozen=True)
class LayersBench:
    """Raw values of the measurement; prints as the figures made of them."""

    facts: dict[str, Any]
    file: Path

    def __str__(self) -> str:
        lines = ["forward and backward, ours as a ratio to torch.nn (torch.nn to itself, in the same rounds)"]
        for group in ("ResNet-50, contiguous", "ResNet-50, channels-last", "MLP"):
            rows = [row for row in self.facts["speed"] if row["group"] == group]
            lines.append(f"{group}: geometric mean {_ratios(rows, 'ours')} ({_ratios(rows, 'again')})")
            lines.extend(
                f"  {row['shape']!s:22} {_ratio(row, 'ours'):.3f} ({_ratio(row, 'again'):.3f})"
                f"  {1e3 * median(row['torch']):9.3f} ms" + ("  unstable" if _is_unstable(row) else "")
                for row in rows
            )
        lines.append(
            "largest error of the output against float64, 32×16×14×14, unit spread: torch contiguous, torch, ours"
        )
        lines.extend(
            f"  {row['dtype']:9} {row['layout']:14} mean {row['mean']:7.0f}  "
            + "  ".join(f"{row[who]['y']:.1e}" for who in ("better", "torch", "ours"))
            for row in self.facts["numerics"]
        )
        return "\n".join([*lines, f"raw values: {self.file}"])


def run(out: Path, *, quick: bool = False) -> LayersBench:
    """Measure speed and exactness and keep every raw value as JSON in ``out``."""
    facts: dict[str, Any] = {"machine": describe(), "date": datetime.datetime.now(datetime.UTC).isoformat()}
    facts["threads"] = torch.get_num_threads()
    facts["numerics"] = _numerics(MEANS[:2] if quick else MEANS)
    facts["speed"] = [_speed(*case, seconds=0.05 if quick else SECONDS_A_SHAPE) for case in _cases(quick)]
    return LayersBench(facts, keep(facts, out, "layers.json"))


def _cases(quick: bool) -> list[tuple[str, tuple[int, ...], str]]:
    images: list[tuple[int, ...]] = [(32, channels, size, size) for channels, size in RESNET_50]
    cases = [(f"ResNet-50, {layout}", shape, layout) for layout in LAYOUTS for shape in images]
    cases += [("MLP", shape, "contiguous") for shape in MLP]
    return [case for case in cases if torch.Size(case[1]).numel() < 1e6] if quick else cases


def _speed(group: str, shape: tuple[int, ...], layout: str, *, seconds: float) -> dict[str, Any]:
    """Time forward and backward of the contestants in turns; who comes first changes from round to round."""
    theirs, ours = (nn.BatchNorm1d, BatchNorm1d) if len(shape) == 2 else (nn.BatchNorm2d, BatchNorm2d)
    x, dy = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        x, dy = (v.contiguous(memory_format=LAYOUTS[layout]) for v in (x, dy))
    x.requires_grad_()
    layers = {"torch": theirs(shape[1]), "ours": ours(shape[1]), "again": theirs(shape[1])}
    raw: dict[str, Any] = {"group": group, "shape": list(shape), "layout": layout} | {name: [] for name in layers}
    names, started = list(layers), time.perf_counter()
    gc.disable()
    try:
        while len(raw["ours"]) < 5 or (time.perf_counter() - started < seconds and len(raw["ours"]) < MOST_ROUNDS):
            for name in names:
                raw[name].append(_step(layers[name], x, dy))
            names = names[1:] + names[:1]
    finally:
        gc.enable()
    # the first round fills caches
    return raw | {name: raw[name][1:] for name in layers}


def _step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> float:
    x.grad = None
    started = time.perf_counter()
    layer(x).backward(dy)  # type: ignore[no-untyped-call]
    return time.perf_counter() - started


def _numerics(means: tuple[float, ...]) -> list[dict[str, Any]]:
    rows = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            # float16 ends at 65,504
            for mean in (m for m in means if m < torch.finfo(dtype).max):
                x = (torch.randn(32, 16, 14, 14) + mean).to(dtype)
                row = {"dtype": str(dtype).removeprefix("torch."), "layout": layout, "mean": mean}
                row["better"] = _errors(nn.BatchNorm2d(16), x)
                there = x.contiguous(memory_format=LAYOUTS[layout])
                row["torch"], row["ours"] = _errors(nn.BatchNorm2d(16), there), _errors(BatchNorm2d(16), there)
                _refuse_wrong(row, dtype)
                rows.append(row)
    return rows


def _errors(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the largest error of the output, and of the batch's variance relative to it."""
    layer.momentum = 1.0  # type: ignore[assignment]
    wide = x.double()
    mean, var = wide.mean((0, 2, 3), keepdim=True), wide.var((0, 2, 3), keepdim=True)
    biased = wide.var((0, 2, 3), correction=0, keepdim=True)
    exact = (wide - mean) / (biased + 1e-5).sqrt()
    y = layer(x).detach().double()
    running: Any = layer.running_var
    relative = (running.double() - var.flatten()).abs() / (var.flatten() + 1e-5)
    return {"y": float((y - exact).abs().max()), "variance": float(relative.max()), "range": float(exact.abs().max())}


def _refuse_wrong(row: dict[str, Any], dtype: torch.dtype) -> None:
    allowed = ALLOWED * row["better"]["y"] + UNITS * torch.finfo(dtype).eps * max(1.0, row["ours"]["range"])
    if not row["ours"]["y"] <= allowed:
        raise VerificationError(
            f"a wrong layer is not timed: error {row['ours']['y']:.1e}, allowed {allowed:.1e}, in {row}"
        )


def _ratio(row: dict[str, Any], name: str) -> float:
    return float(median(ours / theirs for ours, theirs in zip(row[name], row["torch"], strict=True)))


def _ratios(rows: list[dict[str, Any]], name: str) -> str:
    return f"{geometric_mean([_ratio(row, name) for row in rows]):.3f}" if rows else "not measured"


def _is_unstable(row: dict[str, Any]) -> bool:
    return abs(_ratio(row, "again") - 1) > 0.05
