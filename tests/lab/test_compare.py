import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

import batchnorm as bn
from batchnorm import cli
from batchnorm.errors import DataError, OptionError, OutputError
from batchnorm.lab.data import load_data
from batchnorm.lab.networks import build
from batchnorm.lab.store import Store

SMALL = {"learning_rates": [0.03, 0.3], "seeds": 2, "steps": 40, "jobs": 1}


def test_the_output_folder_is_whole(small):
    names = sorted(str(f.relative_to(small.out)) for f in small.out.rglob("*") if f.is_file())
    assert names == [
        "best/model.onnx",
        "best/model.safetensors",
        "comparison.json",
        "report.html",
        "runs.csv",
        "runs.sqlite",
    ]
    facts = json.loads((small.out / "comparison.json").read_text())
    assert [arm["name"] for arm in facts["arms"]] == ["none", "before", "after"]
    assert len(facts["verdicts"]) == 12
    assert facts["ran"] == 12


def test_the_numbers_of_an_arm_can_be_recomputed_by_hand(small):
    """Plain PyTorch, written from the documentation, gives the numbers of a run."""
    from torch import nn

    data = load_data("digits")
    split = data.split(1)
    x, y = torch.from_numpy(split.x_train).flatten(1), torch.from_numpy(split.y_train)
    start = build("mlp", data.shape, 10, small.table[1].arm, 1, torch.from_numpy(split.x_train))
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False)
    mean, std = mean.float(), torch.where(std == 0, 1.0, std).float()
    layers = []
    for old in (m for m in start.modules() if isinstance(m, nn.Linear)):
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        new.load_state_dict(old.state_dict())
        layers += [new, nn.BatchNorm1d(new.out_features), nn.ReLU()]
    network = nn.Sequential(*layers[:-2])
    optimizer, rng, step = torch.optim.SGD(network.parameters(), lr=0.3), np.random.default_rng(1), 0
    while step < 40:
        order = rng.permutation(len(y))
        for i in range(0, len(y) - 63, 64):
            if step == 40:
                break
            rows = torch.from_numpy(order[i : i + 64])
            loss = nn.functional.cross_entropy(network((x[rows] - mean) / std), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    network.eval()
    with torch.no_grad():
        logits = network((torch.from_numpy(split.x_test).flatten(1) - mean) / std).double()
    expected = nn.functional.cross_entropy(logits, torch.from_numpy(split.y_test)).item()
    [row] = [r for r in small.rows if (r["arm"], r["learning_rate"], r["seed"]) == ("before", 0.3, 1)]
    assert row["test_log_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_same_comparison_gives_the_same_file(small, tmp_path):
    again = bn.compare("digits", out=tmp_path / "out", **SMALL)
    assert (again.out / "runs.csv").read_bytes() == (small.out / "runs.csv").read_bytes()
    assert str(again) == str(small)


def test_more_seeds_and_arms_are_added_to_what_is_there(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    bn.compare("digits", out=out, arms=["none", "before"], **SMALL)
    added = []
    add = Store.add
    monkeypatch.setattr(Store, "add", lambda self, task, row: (added.append(task), add(self, task, row)))
    found = bn.compare("digits", out=out, **SMALL | {"seeds": 3})
    assert len(added) == 18 - 8
    assert len(found.rows) == 18
    assert [r for r in found.rows if r["seed"] < 2 and r["arm"] != "after"] != []


def test_the_best_network_is_the_one_of_the_table(small):
    best = small.best
    assert best.task.arm == small.evidence.best.arm
    [row] = [
        r
        for r in small.rows
        if (r["arm"], r["learning_rate"], r["seed"]) == (best.task.arm.name, best.task.learning_rate, best.task.seed)
    ]
    assert best.before == (row["test_log_loss"], row["test_accuracy"])


def test_arrays_are_repeated_by_a_call_in_python(tmp_path):
    rng = np.random.default_rng(0)
    options = {"arms": ["before"], "learning_rates": [0.1], "seeds": 1, "steps": 5, "jobs": 1, "batch_size": 8}
    found = bn.compare((rng.normal(size=(60, 3)), np.arange(60) % 2), out=tmp_path / "o", **options)
    assert "bn.compare((x, y), model=" in (found.out / "report.html").read_text()


def test_without_an_output_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = bn.compare("digits", arms=["none"], learning_rates=[0.1], seeds=1, steps=5, jobs=1)
    assert list(tmp_path.iterdir()) == []
    assert found.best.files == ()
    assert "none" in str(found)


@pytest.mark.parametrize(
    "arm", ["raw", "input-norm", "layer", "group", "x: norm=batch, batch_size=16, activation=tanh"]
)
def test_every_kind_of_arm_goes_to_the_end(tmp_path, arm):
    found = bn.compare("digits", arms=[arm], learning_rates=[0.1], seeds=1, steps=10, jobs=1, out=tmp_path / "o")
    assert found.best.onnx["norms"] == len([k for k in found.best.deployed.kept if "BatchNorm" in k])


def test_images_and_the_cnn_to_the_end(tmp_path):
    found = bn.compare(
        "digits", model="cnn", arms=["before"], learning_rates=[0.1], seeds=1, steps=10, jobs=1, out=tmp_path
    )
    assert found.best.onnx["norms"] == 0
    assert not found.best.deployed.kept
    assert any("Standardize" in line for line in found.best.deployed.folded)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learning_rates": []}, OptionError, r"learning rates must be positive numbers, got \[\]"),
        ({"learning_rates": [-1.0]}, OptionError, r"learning rates must be positive numbers, got \[-1.0\]"),
        ({"seeds": 0}, OptionError, "seeds must be at least 1, got 0"),
        ({"steps": 0}, OptionError, "steps must be at least 1, got 0"),
        ({"batch_size": 1}, OptionError, "batch_size must be at least 2, got 1"),
        ({"jobs": 0}, OptionError, "jobs must be at least 1, got 0"),
        ({"threshold": 90}, OptionError, "threshold must be an accuracy between 0 and 1, got 90"),
        ({"batch_size": 1500}, DataError, "needs 1500 training rows, there are 1078 of 1797 rows: choose a smaller"),
        ({"arms": ["big: batch_size=2000"]}, DataError, "a batch of arm 'big' needs 2000 training rows"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        bn.compare("digits", out=tmp_path / "out", **SMALL | options)
    assert not (tmp_path / "out").exists()


def test_a_network_with_the_wrong_number_of_logits(elsewhere):
    (elsewhere / "few.py").write_text("from torch import nn\ndef make(shape, classes, arm): return nn.Flatten()\n")
    with pytest.raises(OptionError, match=r"one logit for each class, \(64, 10\), got \(64, 64\)"):
        bn.compare("digits", model="few:make", **SMALL)


def test_rows_of_another_torch_are_not_mixed_in(small, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(OutputError, match=r'torch "2.* there, "9.9" here'):
        bn.compare("digits", out=small.out, **SMALL)


def test_a_folder_of_another_comparison_is_refused(small):
    before = {f: f.stat().st_mtime_ns for f in small.out.rglob("*")}
    with pytest.raises(OutputError, match="steps 40 there, 41 here"):
        bn.compare("digits", out=small.out, **SMALL | {"steps": 41})
    assert before == {f: f.stat().st_mtime_ns for f in small.out.rglob("*")}


COMMAND = ["compare", "digits", "--learning-rates", "0.1", "--steps", "150", "--seeds", "3"]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The rows of the comparison that is stopped below, had it not been."""
    out = tmp_path_factory.mktemp("unstopped")
    bn.compare("digits", learning_rates=[0.1], steps=150, seeds=3, jobs=1, out=out)
    return (out / "runs.csv").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_what_was_stopped_goes_on_where_it_was(tmp_path, how, unstopped):
    """Stopped in the middle, the same command computes what is missing and nothing else."""
    out = tmp_path / "out"
    command = [*COMMAND, "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm", *command, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    kept = _wait_for_rows(out, 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert "Traceback" not in said
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    # who goes on is no other for being this process, or for training one run at a time: the rows are the same
    assert cli.main([*command, "--jobs", "1"]) == 0
    facts = json.loads((out / "comparison.json").read_text())
    assert facts["ran"] <= 9 - kept
    assert (out / "runs.csv").read_bytes() == unstopped


def _wait_for_rows(out, least, process):
    import sqlite3

    for _ in range(600):
        time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        if (out / "runs.sqlite").is_file():
            rows = sqlite3.connect(out / "runs.sqlite", timeout=30)
            try:
                count = rows.execute("SELECT count(*) FROM runs").fetchone()[0]
            except sqlite3.OperationalError:
                count = 0
            rows.close()
            if count >= least:
                return count
    raise AssertionError("no rows after a minute")
