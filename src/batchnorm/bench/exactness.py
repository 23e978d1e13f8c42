"""How exact the layers are far from zero: torch's and ours in every layout and dtype, against float64."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.oracle import LAYOUTS
from batchnorm.tables import table
from batchnorm.torch import BatchNorm2d

__all__ = ["MEANS", "exactness", "measure_exactness"]

MEANS = (0.0, 1e1, 1e2, 1e3, 1e4, 1e5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (32, 16, 14, 14)
# more than this many times torch's error, plus a few units in the last place, is wrong
ALLOWED, UNITS = 2.0, 8.0


def measure_exactness(means: tuple[float, ...] = MEANS) -> list[dict[str, Any]]:
    """Return a row of errors for each dtype, layout and mean of values of unit spread."""
    rows = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            # float16 ends at 65,504
            for mean in (m for m in means if m < torch.finfo(dtype).max):
                x = (torch.randn(SHAPE) + mean).to(dtype)
                row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "layout": layout, "mean": mean}
                row["better"] = _errors(nn.BatchNorm2d(16), x)
                there = x.contiguous(memory_format=LAYOUTS[layout])
                row["torch"], row["ours"] = _errors(nn.BatchNorm2d(16), there), _errors(BatchNorm2d(16), there)
                row["wrong"] = _is_wrong(row, dtype)
                rows.append(row)
    return rows


def exactness(rows: list[dict[str, Any]]) -> str:
    """Return the errors of the output as a table."""
    lines = [
        (
            row["dtype"],
            row["layout"],
            f"{row['mean']:,.0f}",
            *(f"{row[who]['y']:.1e}" for who in ("better", "torch", "ours")),
            "wrong: more than twice torch's, contiguous" if row["wrong"] else "",
        )
        for row in rows
    ]
    head = ("dtype", "Layout", "Mean", "torch, contiguous", "torch", "ours", "")
    size = "×".join(map(str, SHAPE))
    return f"largest error of the output, {size}, unit spread\n{table(head, lines)}"


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


def _is_wrong(row: dict[str, Any], dtype: torch.dtype) -> bool:
    allowed = ALLOWED * row["better"]["y"] + UNITS * torch.finfo(dtype).eps * max(1.0, row["ours"]["range"])
    return not row["ours"]["y"] <= allowed
