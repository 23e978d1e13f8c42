"""The measurement of recalibration: ours passes every case, a tool that does nothing passes none, tables say what was found."""

import json
from importlib.util import find_spec

import pytest

from batchnorm import cli
from batchnorm.bench import recalibrate as bench
from batchnorm.bench.repairs import CASES as REPAIRS
from batchnorm.bench.statistics_cases import CASES
from batchnorm.errors import MissingDependencyError, OptionError
from batchnorm.lab.data import load_data


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recalibrate_passes_every_case(case):
    assert case.passes(bench.TOOLS["batchnorm"])


# what no tool changes when it does nothing at all
HARMLESS = {"modes of modules", "a frozen layer", "random generators", "the count of batches goes on"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_tool_that_does_nothing_passes_only_what_asks_for_nothing(case):
    assert case.passes(lambda model, data, **options: None) is (case.name in HARMLESS)


def test_torchs_own_tool_is_not_wronged():
    passed = {case.name for case in CASES if case.passes(bench.TOOLS["swa_utils.update_bn"])}
    assert passed == {"buffers stay the same objects", "(x, y)", "generator", "iterable data set"}


@pytest.mark.skipif(find_spec("fvcore") is not None, reason="fvcore is installed here")
def test_without_the_other_tools_it_says_what_to_install():
    with pytest.raises(MissingDependencyError, match=r"batchnorm\[zoo\]"):
        bench._checks(True)


def test_a_repair_measures_before_and_after_on_the_same_rows():
    split = load_data("digits").split(0)
    dim = next(case for case in REPAIRS if "contrast" in case.name)
    run = dim.measure(split, 0, 1)
    assert run["after"]["accuracy"] > run["before"]["accuracy"] + 0.2
    assert run["after"]["log_loss"] < run["before"]["log_loss"]
    assert run == dim.measure(split, 0, 1)


def test_the_command_line_runs_a_part_and_keeps_every_value(tmp_path, capsys):
    assert cli.main(["bench", "recalibrate", "repairs", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "recalibrate_repairs.json").read_text())
    for one, case in zip(facts["found"], REPAIRS, strict=True):
        assert one["case"] == case.name
        assert one["case"] in said
        assert len(one["runs"]) == 2
    assert cli.main(["bench", "recalibrate", "all", "--out", str(tmp_path)]) == 2
    with pytest.raises(OptionError, match="the parts of bench recalibrate are"):
        bench.run(tmp_path, "everything")


def test_tables_are_made_of_the_recorded_values():
    checks = {
        "found": [
            {
                "case": "a",
                "kind": "exact",
                "errors": dict.fromkeys(bench.TOOLS, 3e-8),
                "passes": dict.fromkeys(bench.TOOLS, True),
            }
        ]
    }
    assert "of 1" in bench._checks_table(checks)
    assert "3e-08" in bench._checks_table(checks)
    seconds = {"plain evaluation": [1.0, 2.0], "batchnorm": [1.1, 2.4]}
    assert "1.15 (1.10 to 1.20)" in bench._speed_table({"found": {"batches": [2, 32], "seconds": seconds}})
