"""One layer beside torch's own: training and evaluation, images and rows, large and tiny, every activation; its errors."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from batchnorm.bench.contest import begin, hold
from batchnorm.bench.contestants import COPIES, NEW, OURS, TORCH, contestants, facts_of
from batchnorm.bench.exactness import MEANS, exactness, measure_exactness
from batchnorm.bench.machine import keep
from batchnorm.bench.op import RESNET_50, SAMPLES
from batchnorm.bench.oracle import ACTIVATIONS, LAYOUTS, Case
from batchnorm.bench.plots import dots, lines
from batchnorm.bench.scores import NOTES, busy, groups, left_out, means, scores
from batchnorm.progress import Progress
from batchnorm.tables import table

__all__ = ["LayerBench", "run"]

ROWS = (
    (128, 300), (128, 784), (256, 1024), (512, 512), (512, 1024), (1024, 1024), (1024, 4096), (2048, 2048), (4096, 1024),
    (4096, 4096),
)  # fmt: skip
EVALUATED = ((32, 64, 56, 56), (32, 256, 14, 14), (512, 1024))
ACTIVATED = (32, 128, 28, 28)
TINY = ((2, 4), (64, 100), (64, 300), (1, 8, 4, 4), (4, 16, 7, 7))
# 64 channels of 28 × 28: 10⁵ to 10⁸ elements
SIZES = tuple((samples, 64, 28, 28) for samples in (2, 20, 200, 1994))
SECONDS, QUICK_SECONDS = 2.5, 0.01
SIZE = "time per element"


@dataclass(frozen=True)
class LayerBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        rows, said = self.facts["rows"], []
        for group, some in groups(rows).items():
            said += [group, _sizes(some) if group == SIZE else scores(some), means(some, OURS), ""]
        said += [exactness(self.facts["exactness"]), "", *left_out(rows), *NOTES, *busy(self.facts["machine"])]
        return "\n".join([*said, f"raw values and pictures: {', '.join(map(str, self.files))}"])


def run(out: Path, *, quick: bool = False) -> LayerBench:
    """Measure, keep every raw value as JSON in ``out``, and draw the pictures beside it."""
    facts = begin()
    facts["exactness"] = measure_exactness(MEANS[:2] if quick else MEANS)
    cases = _quick() if quick else _cases()
    facts["rows"] = []
    with Progress("measuring", "contests", len(cases), shown=not quick) as progress:
        for what in cases:
            facts["rows"].append(_held(*what, seconds=QUICK_SECONDS if quick else SECONDS))
            progress.advance()
    others = [row for row in facts["rows"] if row["group"] != SIZE]
    pictures = (
        dots(others, (OURS,), TORCH, "time as a multiple of torch's (log)", out / "layer.svg"),
        lines([row for row in facts["rows"] if row["group"] == SIZE], (TORCH, OURS, COPIES), out / "layer_sizes.svg"),
    )
    return LayerBench(facts, (keep(facts, out, "layer.json"), *pictures))


What = tuple[str, tuple[int, ...], str, str | None, bool]


def _cases() -> list[What]:
    """Return group, shape, layout, activation, and whether it is training."""
    return [*_images(), *_rows(), *_others()]


def _images() -> Iterator[What]:
    for layout in LAYOUTS:
        for channels, size in RESNET_50:
            yield f"ResNet-50, {layout}", (SAMPLES, channels, size, size), layout, None, True


def _rows() -> Iterator[What]:
    for shape in ROWS:
        yield "(N, C)", shape, "contiguous", None, True


def _others() -> Iterator[What]:
    for shape in EVALUATED:
        for layout in LAYOUTS if len(shape) == 4 else ("contiguous",):
            yield f"evaluation, {layout}", shape, layout, None, False
    for activation in ACTIVATIONS:
        yield "activations", ACTIVATED, "contiguous", activation, True
    for shape in TINY:
        yield "tiny", shape, "contiguous", None, True
    for shape in SIZES:
        yield SIZE, shape, "contiguous", None, True


def _quick() -> list[What]:
    """Return the smallest of each group, with few samples of images."""
    found: dict[str, What] = {}
    for what in _cases():
        smallest = found.setdefault(what[0], what)
        if prod(what[1]) < prod(smallest[1]):
            found[what[0]] = what
    return [
        (group, (min(2, shape[0]), *shape[1:]) if len(shape) > 2 else shape, layout, activation, training)
        for group, shape, layout, activation, training in found.values()
    ]


def _held(
    group: str, shape: tuple[int, ...], layout: str, activation: str | None, training: bool, *, seconds: float
) -> dict[str, Any]:
    case = Case.drawn(shape, torch.float32, activation, training=training)
    if len(shape) == 4:
        case = case.laid_out(layout)
    makers = contestants(case)
    if group != SIZE:
        del makers[NEW]
    facts = {"group": group, "layout": layout, **facts_of(case)}
    if activation is not None:
        facts["name"] = activation
    return hold(facts, makers, seconds=seconds)


def _sizes(rows: list[dict[str, Any]]) -> str:
    """Return the time per element as a table, and how flat it is."""
    names = [name for name in (TORCH, OURS, COPIES, NEW) if any(name in row["seconds"] for row in rows)]
    told = [(f"{row['elements']:,}", *(_said(_nanoseconds(row, name)) for name in names)) for row in rows]
    flat = []
    for name in names:
        times = [one for row in rows if (one := _nanoseconds(row, name)) is not None]
        flat.append(f"{name} {max(times) / min(times):.2f}")
    spread = f"largest time per element to smallest: {', '.join(flat)}"
    return f"{table(('Elements', *(f'{name}, ns an element' for name in names)), told)}\n{spread}"


def _nanoseconds(row: dict[str, Any], name: str) -> float | None:
    return 1e9 * median(row["seconds"][name]) / row["elements"] if name in row["seconds"] else None


def _said(nanoseconds: float | None) -> str:
    return "–" if nanoseconds is None else f"{nanoseconds:.3f}"
