"""The measurement is tested for what it says, never for how fast it was."""

import json
import re
from pathlib import Path

from batchnorm import cli
from batchnorm.bench.compare import CompareBench

POINT = {"seconds": 10.0, "worker_memory_mb": 400.0, "worker_threads": 1, "runs": 90, "wall": 15.0}


def facts(one, two):
    pairs = [{"1": POINT | {"seconds": a}, "2": POINT | {"seconds": b}} for a, b in zip(one, two, strict=True)]
    growth = [{"runs": n, "seconds": 0.5 * n + 0.1} for n in (6, 12, 24)]
    return {"jobs": pairs, "growth": growth}


def test_figures_come_from_the_recorded_values():
    said = str(CompareBench(facts([40, 42, 41], [20, 21, 20.5]), Path("f.json")))
    assert "training with 2 jobs against 1, 3 interleaved pairs: 2.00× (2.00 to 2.00; 41.0 s and 20.5 s)" in said
    assert "0.500 s a run + 0.10 s, off the line by 0.0 % at most" in said
    assert "unstable" not in said


def test_noise_is_called_noise():
    said = str(CompareBench(facts([40, 40, 40], [20, 30, 25]), Path("f.json")))
    assert "unstable: the pairs differ by 42 %" in said


def test_it_measures_real_processes_and_keeps_every_value(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("batchnorm.bench.compare.QUICK", (["--steps", "5"], 1, 1, (1, 2)))
    assert cli.main(["bench", "compare", "--quick", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert kept["jobs"][0]["2"]["runs"] == 21
    assert [point["runs"] for point in kept["growth"]] == [3, 6]
    assert kept["machine"]["cores"] >= 1
    assert kept["machine"]["packages"]["torch"].startswith("2.")
    assert re.search(r"whole comparison, 21 runs, 2 jobs: [\d.]+ s", capsys.readouterr().out)
