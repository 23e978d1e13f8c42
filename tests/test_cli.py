"""The command line as a user meets it: exit codes, one clear sentence, nothing half-written."""

import html
import re
import subprocess
import sys

import numpy as np
import pytest

from batchnorm import cli

SMALL = ["--learning-rates", "0.1", "--seeds", "1", "--steps", "10", "--jobs", "1"]


def test_compare_ends_in_a_table_the_verdicts_and_the_files(elsewhere, capsys):
    assert cli.main(["compare", "digits", *SMALL, "--arms", "none", "--arm", "b16: norm=batch, batch_size=16"]) == 0
    said = capsys.readouterr().out
    for word in (
        "Layer (type)",
        "Best rate",
        "b16",
        "undecided in test log-loss",
        "Batch normalization (“b16”)",
        "report: comparison/report.html",
    ):
        assert word in said
    assert (elsewhere / "comparison" / "best" / "model.onnx").is_file()


def bad_calls(elsewhere):
    """Return each way to go wrong: the words of the command line and what must be said."""
    (elsewhere / "t.csv").write_text("a,b,kind\n" + "".join(f"{i},{i * i % 7},{i % 2}\n" for i in range(30)))
    (elsewhere / "one.csv").write_text("a,kind\n" + "".join(f"{i},1\n" for i in range(30)))
    (elsewhere / "text.csv").write_text("a,city,kind\n" + "".join(f"{i},Bern,{i % 2}\n" for i in range(30)))
    (elsewhere / "cut.npz").write_bytes(b"PK\x03\x04cut")
    (elsewhere / "busy").mkdir()
    (elsewhere / "busy" / "thesis.tex").write_text("years of work")
    return {
        "missing target": (["t.csv"], "choose one with --target: 'a', 'b', 'kind'"),
        "one class": (["one.csv", "--target", "kind"], "all 30 rows are of class 1"),
        "text column": (["text.csv", "--target", "kind"], "leave out with --drop city"),
        "few rows": (["t.csv", "--target", "kind"], "needs 64 training rows, there are 18 of 30 rows"),
        "no file": (["absent.csv"], "no such file or folder: absent.csv"),
        "truncated": (["cut.npz"], "cut.npz must be an .npz archive"),
        "unknown arm": (["digits", "--arms", "none,befor"], "unknown arm 'befor': choose from none, before, after"),
        "unknown model": (["digits", "--model", "vgg"], "unknown model 'vgg'"),
        "other files": (["digits", "--out", "busy"], "must be new or of an earlier comparison, busy holds other files"),
        "no permission": (["digits", "--out", "/proc/version/out"], "must be one that can be written"),
        "no cluster": (["digits", "--parallel", "ray", "--cluster", "127.0.0.1:1"], "needs a running cluster"),
        "bad rate": (["digits", "--learning-rates", "0"], "learning rates must be positive numbers"),
    }


CASES = ["missing target", "one class", "text column", "few rows", "no file", "truncated"]
CASES += ["unknown arm", "unknown model", "other files", "no permission", "no cluster", "bad rate"]


def test_every_bad_call_is_tried(elsewhere):
    assert list(bad_calls(elsewhere)) == CASES


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_one_sentence_and_exit_code_two(elsewhere, capsys, case):
    words, message = bad_calls(elsewhere)[case]
    before = sorted(elsewhere.rglob("*"))
    assert cli.main(["compare", *SMALL, *words] if case != "bad rate" else ["compare", *words]) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("batchnorm: ")
    assert len(said.strip().splitlines()) == 1
    assert message in said
    assert [f for f in sorted(elsewhere.rglob("*")) if "out" not in f.parts and "comparison" not in f.parts] == before
    assert not (elsewhere / "comparison" / "report.html").exists()


@pytest.mark.parametrize(
    "words",
    [[], ["compare"], ["melt"], ["compare", "digits", "--seeds", "many"], ["compare", "digits", "--image-size", "8"]],
)
def test_words_that_can_not_be_parsed_end_in_exit_code_two(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "usage: batchnorm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rates", "a,b"], "argument --learning-rates: must be numbers with commas between them, got 'a,b'"),
        (["--image-size", "8"], "argument --image-size: must be width and height, as in 32x32, got '8'"),
        (["--margins", "0.1"], "argument --margins: must be two positive numbers, as in 0.03,0.01, got '0.1'"),
    ],
)
def test_an_argument_that_can_not_be_read_says_what_it_must_be(words, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "digits", *words])
    assert message in capsys.readouterr().err


def test_the_reports_command_makes_the_same_comparison(elsewhere, capsys):
    """Its rates, arms and margins are those of the first, to the last digit."""
    import json
    import shlex

    options = [
        "--learning-rates",
        "0.1234567",
        "--arm",
        "x y: norm=batch",
        "--margins",
        "0.5,0.2",
        "--threshold",
        "0.333",
    ]
    assert cli.main(["compare", "digits", *SMALL[2:], *options]) == 0
    report = (elsewhere / "comparison" / "report.html").read_text()
    command = html.unescape(re.search(r'<pre id="command">(.*?)</pre>', report, re.DOTALL)[1])
    assert cli.main([*shlex.split(command)[1:], "--jobs", "1"]) == 0
    assert json.loads((elsewhere / "comparison" / "comparison.json").read_text())["ran"] == 0
    capsys.readouterr()


@pytest.mark.parametrize("verb", [[], ["compare"], ["summary"], ["bench"]])
def test_help_fits_one_screen(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 45


def test_summary_of_a_factory_with_weights(elsewhere, capsys):
    import torch
    from safetensors.torch import save_file

    (elsewhere / "nets.py").write_text(
        "from torch import nn\nfrom batchnorm.torch import BatchNorm1d\n"
        "def small(): return nn.Sequential(nn.Flatten(), BatchNorm1d(784), nn.Linear(784, 10))\n"
    )
    tensors = {
        "1.weight": torch.ones(784), "1.bias": torch.zeros(784), "1.running_mean": torch.zeros(784),
        "1.running_var": torch.ones(784), "1.num_batches_tracked": torch.tensor(0),
        "2.weight": torch.zeros(10, 784), "2.bias": torch.zeros(10),
    }  # fmt: skip
    save_file(tensors, elsewhere / "w.safetensors")
    torch.save(tensors, elsewhere / "w.pt")
    for weights in ("w.safetensors", "w.pt"):
        assert cli.main(["summary", "nets:small", "--input", "1,28,28", "--weights", weights]) == 0
        assert re.search(r"1 \(BatchNorm1d\) +\(None, 784\) +3,136 +1,568 +1,568", capsys.readouterr().out)


def test_weights_that_would_run_code_are_refused(elsewhere, capsys):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, ("/tmp/executed", "w"))

    (elsewhere / "evil.pt").write_bytes(pickle.dumps(Evil()))
    np.save(elsewhere / "other.npy", np.zeros(3))
    for weights in ("evil.pt", "other.npy", "absent.safetensors"):
        assert cli.main(["summary", "torch.nn:Identity", "--weights", weights]) == 2
        said = capsys.readouterr().err
        assert weights in said


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet", "a model is named as package.module:factory, got 'resnet'"),
        ("absent:f", "absent:f must make a model, but failed: ModuleNotFoundError"),
        ("torch.nn:Linear", "torch.nn:Linear must make a model, but failed: TypeError"),
        ("builtins:dict", "builtins:dict must return a torch.nn.Module, it returned a dict"),
    ],
)
def test_a_model_that_can_not_be_made(model, message, capsys):
    assert cli.main(["summary", model]) == 2
    assert message in capsys.readouterr().err


def test_python_m_batchnorm_is_the_command():
    done = subprocess.run([sys.executable, "-m", "batchnorm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("batchnorm 0.")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    """What a user sees who installed the core alone."""
    for name in [name for name in sys.modules if name.startswith("batchnorm.lab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    assert cli.main(["compare", "digits"]) == 2
    assert "needs the package 'sklearn.model_selection', which is not installed: pip install 'batchnorm[lab]'" in (
        capsys.readouterr().err
    )
