"""The measurement of synchronized layers: real processes, every value kept, and a failing process is told."""

import json
from types import SimpleNamespace

import pytest

from batchnorm import cli
from batchnorm.bench import sync as bench
from batchnorm.errors import WorkerError
from processes import warm


def test_it_measures_real_processes_and_keeps_every_value(tmp_path, capsys, monkeypatch):
    # those of the test below are spawned, as in a measurement
    monkeypatch.setattr(bench, "multiprocessing", SimpleNamespace(get_context=lambda _: warm()))
    assert cli.main(["bench", "sync", "--quick", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "sync.json").read_text())
    for one, bound in zip(facts["exactness"], (1e-6, 1e-12), strict=True):
        assert one["pieces"] == "8, 8"
        assert 0 < max(one["errors"].values()) <= bound
    (speed,) = facts["speed"]
    assert {len(times) for times in speed["seconds"].values()} == {3}
    said = capsys.readouterr().out
    assert "8, 8" in said
    assert "Synced to torch" in said


def _broken(rank):
    raise RuntimeError("no")


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 1)
    with pytest.raises(WorkerError, match="all 2 processes"):
        bench._on_ranks(2, _broken)
