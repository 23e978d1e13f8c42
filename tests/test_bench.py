"""The measurements are tested for what they say, never for how fast they were or how the training went."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchnorm import cli
from batchnorm.bench.compare import CompareBench
from batchnorm.bench.effects import CASES, EffectsBench
from batchnorm.lab import load_data

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
    started = []

    def run(command, **options):
        """Start a process for the comparison with two jobs; three more like it would show nothing new."""
        assert command[:3] == [sys.executable, "-m", "batchnorm"]
        if command[command.index("--jobs") + 1] == "1":
            return subprocess.CompletedProcess(command, cli.main(command[3:]))
        started.append(subprocess.run(command, check=options.pop("check"), **options))
        return started[-1]

    monkeypatch.setattr("batchnorm.bench.compare.subprocess", SimpleNamespace(run=run))
    assert cli.main(["bench", "compare", "--quick", "--out", str(tmp_path)]) == 0
    assert [process.returncode for process in started] == [0]
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert kept["jobs"][0]["2"]["runs"] == 21
    assert [point["runs"] for point in kept["growth"]] == [3, 6]
    assert kept["machine"]["cores"] >= 1
    assert kept["machine"]["packages"]["torch"].startswith("2.")
    assert re.search(r"whole comparison, 21 runs, 2 jobs: [\d.]+ s", capsys.readouterr().out)


def case(option, differences, **failed):
    """A case whose log-loss without the option is 1, and whose accuracy does not change."""
    arms = {"without": [0.0] * len(differences), "with": differences}
    outcomes = {
        arm: [
            {"seed": i, "failed": failed[arm]} if arm in failed else {"seed": i, "log_loss": 1 + d, "accuracy": 0.9}
            for i, d in enumerate(changes)
        ]
        for arm, changes in arms.items()
    }
    return {"option": option, "situation": "somewhere", **outcomes}


def effect_of(found):
    """The line of the only case of a table."""
    return str(EffectsBench({"seeds": 10, "cases": [found]}, Path("f.json"))).splitlines()[2]


def test_an_effect_is_a_difference_with_its_interval():
    line = effect_of(case("better", [-0.2 - 0.01 * i for i in range(10)]))
    found = re.search(r"1\.0000 +0\.7550 +−0\.2450 \[−0\.(\d+), −0\.(\d+)\]", line)
    assert found, line
    assert found[1] > "2450" > found[2]


@pytest.mark.parametrize(
    "differences",
    [[0.1, -0.1] * 5, [0.0] * 10, [1e-7] * 10, [-0.5] * 5],
    ids=["both ways", "equal", "rounding", "too few seeds"],
)
def test_an_interval_that_contains_zero_is_no_effect(differences):
    line = effect_of(case("none", differences))
    assert re.search(r"none measured \[[^]]+\] +none measured \[[^]]+\]$", line), line


def test_what_fails_is_counted_and_not_averaged():
    line = effect_of(case("guard", [0.0] * 10, without="the test log-loss is nan"))
    assert re.search(r"works in 0 of 10 +works in 10 of 10 +– +–$", line), line


def test_effects_are_measured_on_both_arms_of_every_case_with_every_seed(tmp_path, capsys):
    assert cli.main(["bench", "effects", "--quick", "--out", str(tmp_path)]) == 0
    kept, said = json.loads((tmp_path / "effects.json").read_text()), capsys.readouterr().out.splitlines()
    assert kept["machine"]["packages"]["torch"].startswith("2.")
    for found, made, line in zip(kept["cases"], CASES, said[2 : 2 + len(CASES)], strict=True):
        assert line.startswith(made.option)
        assert made.situation in line
        for arm in ("without", "with"):
            assert [run["seed"] for run in found[arm]] == [0, 1]
            assert all("failed" in run or 0 <= run["accuracy"] <= 1 for run in found[arm])
    # six seeds are the fewest that can show anything
    assert not any(re.search(r"\d [−+]\d", line) for line in said[2 : 2 + len(CASES)])


def test_torchs_layer_fails_where_the_guard_is_measured():
    guard = next(made for made in CASES if made.option == "guard")
    found = guard.measure([load_data("digits").split(0)], factor=20)
    assert found["without"] == [{"seed": 0, "failed": "the test log-loss is nan"}]
    assert found["with"][0]["log_loss"] > 0
