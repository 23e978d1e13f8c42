"""Batch normalization and ReLU, forward and backward, beside torch, torch.compile, JAX and copies of as many bytes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchnorm.bench.contest import begin, hold
from batchnorm.bench.contestants import COMPILED, COPIES, JAX, NEW, OURS, TORCH, contestants, facts_of
from batchnorm.bench.machine import keep
from batchnorm.bench.oracle import LAYOUTS, Case
from batchnorm.bench.plots import dots
from batchnorm.bench.ratios import multiple
from batchnorm.bench.scores import NOTES, busy, groups, left_out, means, scores, shape_of
from batchnorm.progress import Progress

__all__ = ["RESNET_50", "OpBench", "run"]

# channels and map size of the distinct batch normalizations of ResNet-50 at 224²
RESNET_50 = (
    (64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28), (256, 14), (512, 14), (1024, 14),
    (512, 7), (2048, 7),
)  # fmt: skip
SAMPLES = 32
QUICK = ((8, 14), (16, 7))
# compiling takes long: on some shapes only
SLOW = ((64, 56), (256, 28), (512, 7))
SECONDS, QUICK_SECONDS = 3.5, 0.01


@dataclass(frozen=True)
class OpBench:
    """Raw values of the measurement; prints as tables."""

    facts: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        rows = self.facts["rows"]
        lines = []
        for group, some in groups(rows).items():
            lines += [group, scores(some), means(some, OURS), *_to_copies(some, self.facts["machine"]["caches"]), ""]
        lines += [*left_out(rows), *NOTES, *busy(self.facts["machine"])]
        return "\n".join([*lines, f"raw values and picture: {', '.join(map(str, self.files))}"])


def run(out: Path, *, quick: bool = False) -> OpBench:
    """Measure, keep every raw value as JSON in ``out``, and draw the picture beside it."""
    facts = begin()
    shapes = QUICK if quick else RESNET_50
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16)
    seconds = QUICK_SECONDS if quick else SECONDS
    rows = []
    with Progress("measuring", "contests", len(shapes) * (2 * len(dtypes) + 1), shown=not quick) as progress:
        for channels, size in shapes:
            shape = (SAMPLES, channels, size, size)
            for dtype, activation in (*((dtype, "relu") for dtype in dtypes), (torch.float32, None)):
                for group, case, slow in _cases(shape, dtype, activation):
                    makers = contestants(case, slow=slow and (channels, size) in SLOW + QUICK[:1])
                    if quick:
                        makers.pop(COMPILED, None)
                    rows.append(hold({"group": group, **facts_of(case)}, makers, seconds=seconds))
                    progress.advance()
    # shapes were drawn once for all groups
    facts["rows"] = [row for some in groups(rows).values() for row in some]
    picture = dots(
        facts["rows"],
        (TORCH, COMPILED, JAX, OURS, NEW),
        COPIES,
        "time as a multiple of the copies' (log)",
        out / "op.svg",
    )
    return OpBench(facts, (keep(facts, out, "op.json"), picture))


def _cases(shape: tuple[int, ...], dtype: torch.dtype, activation: str | None) -> list[tuple[str, Case, bool]]:
    """Return group, case, and whether those take part that compile first; one oracle serves both layouts."""
    case = Case.drawn(shape, dtype, activation)
    name = str(dtype).removeprefix("torch.")
    if activation is None:
        return [(f"BN alone, {name}, contiguous", case, False)]
    return [
        (f"BN + ReLU, {name}, {layout}", case.laid_out(layout), dtype is torch.float32 and layout == "contiguous")
        for layout in LAYOUTS
    ]


def _to_copies(rows: list[dict[str, Any]], caches: dict[str, int]) -> list[str]:
    """Say how many times the copies' time ours takes, for tensors that no L2 holds."""
    large = [
        (multiple(row, OURS, COPIES).value, shape_of(row))
        for row in rows
        if row["bytes"] > caches.get("L2", 0) and {OURS, COPIES} <= set(row["seconds"])
    ]
    if not large:
        return []
    mean = math.exp(math.fsum(math.log(value) for value, _ in large) / len(large))
    worst = max(large)
    return [f"{OURS}, tensors larger than L2: {mean:.2f} times the copies' time, at most {worst[0]:.2f} at {worst[1]}"]
