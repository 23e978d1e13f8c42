"""Time, scaling and memory of the main job, each comparison a process of its own as a user would start it."""

import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from batchnorm.bench.machine import describe, keep
from batchnorm.errors import VerificationError

__all__ = ["CompareBench", "run"]

UNSTABLE_SPREAD = 0.10

# options of every comparison, seeds, pairs of 1 and 2 jobs, seeds of the growing comparisons
FULL: tuple[list[str], int, int, tuple[int, ...]] = ([], 10, 3, (2, 4, 8, 16))
QUICK: tuple[list[str], int, int, tuple[int, ...]] = (["--steps", "50"], 2, 1, (1, 2))


@dataclass(frozen=True)
class CompareBench:
    """Raw values of the measurement; prints as the figures made of them."""

    facts: dict[str, Any]
    file: Path

    def __str__(self) -> str:
        pairs, growth = self.facts["jobs"], self.facts["growth"]
        both = [pair["2"] for pair in pairs]
        wall, training = (median(run[key] for run in both) for key in ("wall", "seconds"))
        one, two = (median(pair[jobs]["seconds"] for pair in pairs) for jobs in ("1", "2"))
        counts, seconds = zip(*((point["runs"], point["seconds"]) for point in growth), strict=True)
        slope, start = np.polyfit(counts, seconds, 1)
        worst = max(abs(s - (slope * n + start)) / s for n, s in zip(counts, seconds, strict=True))
        ratios = [pair["1"]["seconds"] / pair["2"]["seconds"] for pair in pairs]
        spread = (max(ratios) - min(ratios)) / median(ratios)
        lines = [
            f"whole comparison, {both[0]['runs']} runs, 2 jobs: {wall:.1f} s, of which {training:.1f} s training",
            f"training with 2 jobs against 1, {len(pairs)} interleaved pairs: {median(ratios):.2f}× "
            f"({min(ratios):.2f} to {max(ratios):.2f}; {one:.1f} s and {two:.1f} s)",
            f"time by number of runs, 1 job: {slope:.3f} s a run + {start:.2f} s, off the line by {100 * worst:.1f} % at most",
            f"most memory of a worker: {max(run['worker_memory_mb'] for run in both):.0f} MB; "
            f"threads of a worker: {max(run['worker_threads'] for run in both)}",
            f"raw values: {self.file}",
        ]
        if spread > UNSTABLE_SPREAD:
            lines.insert(
                2,
                f"unstable: the pairs differ by {100 * spread:.0f} %; close other programs and measure again",
            )
        return "\n".join(lines)


def run(out: Path, *, quick: bool = False) -> CompareBench:
    """Measure `batchnorm.compare` on digits and keep every raw value as JSON in ``out``."""
    options, seeds, pairs, growth = QUICK if quick else FULL
    facts: dict[str, Any] = {"machine": describe(), "date": datetime.datetime.now(datetime.UTC).isoformat()}
    facts["jobs"] = [{str(jobs): _compare(seeds, jobs, options) for jobs in (1, 2)} for _ in range(pairs)]
    facts["growth"] = [_compare(n, 1, [*options, "--learning-rates", "0.1"]) for n in growth]
    return CompareBench(facts, keep(facts, out, "compare.json"))


def _compare(seeds: int, jobs: int, options: list[str]) -> dict[str, Any]:
    """Run one comparison in a new folder; ``wall`` is the whole process, ``seconds`` its training runs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "batchnorm", "compare", "digits", "--out", str(Path(folder, "out"))]
        command += ["--seeds", str(seeds), "--jobs", str(jobs), *options]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
        wall = time.perf_counter() - started
        if done.returncode:
            raise VerificationError(f"{' '.join(command)} must succeed to be timed, it said: {done.stderr.strip()}")
        facts = json.loads(Path(folder, "out", "comparison.json").read_text(encoding="utf-8"))
    kept = ("seconds", "worker_memory_mb", "worker_threads")
    return {"seeds": seeds, "jobs": jobs, "runs": facts["ran"], "wall": wall} | {key: facts[key] for key in kept}
