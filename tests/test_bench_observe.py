"""The measurement of what observing costs: every value is kept, and the table holds each way to its plain one."""

import json
from pathlib import Path

from batchnorm import cli
from batchnorm.bench.observe import ObserveBench


def test_it_keeps_every_value(tmp_path, capsys):
    assert cli.main(["bench", "observe", "--quick", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "observe.json").read_text())
    assert list(facts["seconds"])[:2] == ["plain evaluation", "observe"]
    assert {len(times) for times in facts["seconds"].values()} == {1}
    assert min(min(times) for times in facts["seconds"].values()) > 0
    assert "with a monitor, every=2" in capsys.readouterr().out


def test_ratios_are_to_the_plain_way_of_the_same_kind():
    seconds = {"plain evaluation": [1.0, 2.0], "observe": [1.5, 2.0], "plain training": [4.0, 4.0], "with": [5.0, 5.0]}
    told = str(ObserveBench({"seconds": seconds, "model": "Net"}, Path("raw.json")))
    rows = {line.split("  ")[0]: line for line in told.splitlines()}
    assert "1.25 (1.00 to 1.50)" in rows["observe"]
    assert "1.25 (1.25 to 1.25)" in rows["with"]
