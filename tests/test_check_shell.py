"""`batchnorm check` as a user of the command line meets it."""

import json
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import cli
from batchnorm.check import RULES, shell
from batchnorm.check.mended import Left, Mended, Step
from batchnorm.check.report import Finding, Report

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NETS = """
import time
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.99), nn.ReLU(), nn.Flatten(), nn.Linear(800, 2))

def healthy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    for _ in range(200):
        net(torch.randn(8, 3, 12, 12))
    return net.eval()

def moved():
    net = healthy()
    net[1].running_mean += 3
    return net

def batches():
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 12, 12), torch.zeros(16)) for _ in range(4)]

def once():
    yield from batches()

def narrow():
    return [torch.randn(4, 2)]

def slow():
    for x, _ in batches():
        yield x
        open("started", "w").close()
        time.sleep(60)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of every format, with a fault that is known."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with torch.no_grad():
        net[1].running_var[2] = -1.0
        net[1].running_mean += 0.5
    state = {name: v.numpy() for name, v in net.state_dict().items() if v.is_floating_point()}
    torch.save(net.state_dict(), folder / "w.pt")
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 8, 8),)), folder / "net.pt2")
    write_onnx(folder / "net.onnx", state)
    layers = [
        keras.Input((8, 8, 3)),
        keras.layers.Conv2D(4, 3),
        keras.layers.BatchNormalization(momentum=0.01, name="bn"),
    ]
    keras.Sequential(layers).save(folder / "net.keras")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32))
    np.save(folder / "last.npy", np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32))
    (folder / "junk.onnx").write_bytes(b"no model")
    return folder


def write_onnx(path, state):
    from onnx import TensorProto, helper, numpy_helper

    stored = ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    nodes = [
        helper.make_node("Conv", ["x", "0.weight"], ["a"], name="conv"),
        helper.make_node("BatchNormalization", ["a", *stored], ["b"], name="norm"),
        helper.make_node("Relu", ["b"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [numpy_helper.from_array(array, name) for name, array in state.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def folder(models, elsewhere):
    for file in models.iterdir():
        if file.is_file():
            shutil.copy(file, elsewhere)
    return elsewhere


def run(*words):
    return cli.main(["check", *map(str, words)])


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "__pycache__"}


SHAPE = ["--input", "4,3,12,12"]


def test_findings_are_printed_and_end_in_exit_code_one(folder, capsys):
    assert run("nets:small", *SHAPE) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("BN110 1: momentum = 0.99")
    assert "BN301 0: its bias (8 parameters)" in said.out
    assert "not run (needs data): BN103" in said.out


def test_without_findings_the_exit_code_is_zero(folder, capsys):
    assert run("nets:healthy", "--data", "nets:batches", "--ignore", "BN3") == 0
    assert capsys.readouterr().out.startswith("nothing found in 1 normalization layers")


def test_data_and_codes_and_modes(folder, capsys):
    assert run("nets:moved", "--data", "nets:batches", "--select", "BN103") == 1
    assert "BN103 1:" in capsys.readouterr().out
    assert run("nets:moved", "--data", "nets:once", "--select", "bn103,BN2", "--batches", 1) == 1
    assert "BN103 1:" in capsys.readouterr().out
    assert run("nets:moved", "--data", "nets:batches", "--ignore", "BN1,BN3") == 0
    capsys.readouterr()
    # what a factory makes is in training mode, unless it is said that it is not
    assert run("nets:small", *SHAPE, "--select", "BN302", "--inference") == 1
    assert "BN302 1: it can be folded into 0" in capsys.readouterr().out
    assert run("nets:small", *SHAPE, "--select", "BN302", "--training") == 0
    assert "not run" in capsys.readouterr().out


FILES = {
    "net.onnx": (["--data", "x.npy"], "BN102 norm:"),
    "net.pt2": (["--data", "x.npy"], "BN102 1:"),
    "net.keras": (["--data", "last.npy"], "BN110 bn:"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_models(folder, capsys, name):
    words, said = FILES[name]
    assert run(name, *words) in (1, 2)
    assert said in capsys.readouterr().out
    assert run(name, "--select", said[:5]) == 1
    assert said in capsys.readouterr().out
    assert run(name, "--select", said[:5], "--format", "sarif") == 1
    result = json.loads(capsys.readouterr().out)["runs"][0]["results"][0]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == name


def test_weights_of_a_factory(folder, capsys):
    torch.save(sys.modules["nets"].healthy().state_dict() if "nets" in sys.modules else {}, "w.pt")
    state = __import__("nets").moved().state_dict()
    torch.save(state, "w.pt")
    assert run("nets:healthy", "--weights", "w.pt", "--data", "nets:batches", "--select", "BN103") == 1
    assert "BN103 1" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["text", "json", "sarif", "html"])
def test_every_format_goes_to_a_file_by_its_ending_or_by_name(folder, capsys, form):
    out = f"report.{ {'text': 'txt'}.get(form, form) }"
    assert run("nets:small", *SHAPE, "-o", out) == 1
    assert capsys.readouterr().out == f"2 findings, report written to {out}\n"
    assert run("nets:small", *SHAPE, "-o", "other", "--format", form) == 1
    first, second = ((folder / name).read_text() for name in (out, "other"))
    assert {"text": "BN110", "json": '{\n  "version"', "sarif": '{\n  "$schema"', "html": "<!doctype"}[form] == first[
        : {"text": 5, "json": 13, "sarif": 13, "html": 9}[form]
    ]
    assert second.splitlines()[:3] == first.splitlines()[:3]
    capsys.readouterr()
    if form == "html":
        assert "batchnorm check nets:small --input 4,3,12,12 -o report.html</pre>" in first
        assert run("nets:small", *SHAPE, "--format", "html") == 1
        assert (folder / "check.html").exists()
        return
    assert run("nets:small", *SHAPE, "--format", form) == 1
    assert capsys.readouterr().out == first


def test_the_report_of_data_is_a_page_with_pictures(folder):
    assert run("nets:moved", "--data", "nets:batches", "-o", "page.html") == 1
    page = (folder / "page.html").read_text()
    assert 'id="distributions"' in page
    assert 'class="bars"' in page


def test_a_mended_model_is_written_and_healthy(folder, capsys):
    words = ["nets:moved", "--data", "nets:batches", "--select", "BN103"]
    assert run(*words, "--fix", "healthy.pt") == 0
    said = capsys.readouterr().out
    assert "BN103 1: statistics are those of the data" in said
    assert "model written to healthy.pt" in said
    assert "tensors alone" in said
    assert run(*words, "--weights", "healthy.pt") == 0
    assert run("nets:moved", "--data", "nets:batches", "--fix", "healthy.pt2", "--select", "BN103") == 0
    assert run("healthy.pt2", "--data", "nets:batches", "--select", "BN103") == 0


def test_mending_an_onnx_and_a_keras_file(folder, capsys):
    assert run("net.onnx", "--data", "x.npy", "--select", "BN102", "--fix", "mended.onnx") == 0
    assert run("mended.onnx", "--select", "BN102") == 0
    assert run("net.keras", "--select", "BN110", "--fix", "mended.keras") == 0
    assert run("mended.keras", "--select", "BN110") == 0
    capsys.readouterr()


def fake(monkeypatch, report):
    """Let the verb return a report, and return what it was called with."""
    seen = {}

    def check(model, example, **options):
        seen.update(options, example=example)
        return report

    monkeypatch.setattr(shell, "check", check)
    return seen


FINDINGS = {
    level: Finding("BN103", f"{level}.bn", "It is off.", "Mend it.", level) for level in ("error", "warning", "note")
}


def mending(findings, left):
    return Report(
        tuple(findings),
        mend=lambda report: Mended(
            nn.Identity(), (Step("BN110", ("bn",), "done"),), tuple(Left(f.code, f.layer, "why") for f in left)
        ),
    )


@pytest.mark.parametrize(("left", "code"), [([], 0), (["note"], 0), (["warning"], 1), (["error", "note"], 1)], ids=str)
def test_what_was_left_decides_the_exit_code_of_mending(folder, capsys, monkeypatch, left, code):
    fake(monkeypatch, mending(FINDINGS.values(), [FINDINGS[level] for level in left]))
    assert run("nets:small", "--fix", "out.pt") == code
    said = capsys.readouterr().out
    assert "BN110 bn: done" in said
    assert said.count("left") == bool(left)
    assert (folder / "out.pt").exists()


def test_json_on_the_standard_output_stays_json_when_a_model_is_mended(folder, capsys, monkeypatch):
    fake(monkeypatch, mending(FINDINGS.values(), []))
    assert run("nets:small", "--fix", "out.pt", "--format", "json") == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["findings"]) == 3
    assert "model written to out.pt" in said.err


@pytest.mark.parametrize("findings", [(), (FINDINGS["error"],)], ids=["healthy", "sick"])
@pytest.mark.parametrize("form", ["text", "json", "sarif"])
def test_a_problem_ends_in_two_and_the_findings_are_printed_all_the_same(folder, capsys, monkeypatch, findings, form):
    problem = "the data must fit the model, it does not"
    fake(monkeypatch, Report(findings, problems=(problem,)))
    assert run("nets:small", "--format", form) == 2
    said = capsys.readouterr()
    assert said.err == f"batchnorm: {problem}\n"
    assert ("It is off." in said.out) == bool(findings)


def test_a_real_problem(folder, capsys):
    assert run("nets:small", "--data", "nets:narrow") == 2
    said = capsys.readouterr()
    assert "BN110" in said.out
    assert all(line.startswith("batchnorm: ") for line in said.err.splitlines())
    assert "[4, 2]" in said.err
    assert "Traceback" not in said.err


def test_what_is_not_given_is_not_passed_on(folder, monkeypatch, capsys):
    seen = fake(monkeypatch, Report(()))
    assert run("nets:small") == 0
    assert seen == {"example": None, "data": None, "training": None, "select": None, "ignore": None}
    assert run("net.keras", "--input", "1,8,8,3", "--data", "last.npy", "--batch-size", 3, "--batches", 2) == 0
    assert [len(batch) for batch in seen["data"]] == [3, 3, 2]
    assert seen["batches"] == 2
    capsys.readouterr()


def test_the_rules_are_listed(capsys):
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Code", "Finds", "Needs"]
    assert [line.split()[0] for line in lines[2:-1]] == sorted(RULES)
    assert all(rule.title in line for line, (_, rule) in zip(lines[2:], sorted(RULES.items()), strict=False))


MISTAKES = {
    "no model": ([], "check needs a model"),
    "no file": (["absent.onnx"], "absent.onnx"),
    "junk": (["junk.onnx"], "junk.onnx"),
    "another file": (["x.npy"], "x.npy"),
    "no factory": (["nets:none"], "nets:none must make a model"),
    "code": (["nets:small", "--select", "BN9"], "got 'BN9'"),
    "ignored code": (["nets:small", "--ignore", "BN1,E501"], "got 'E501'"),
    "data": (["nets:small", "--data", "absent.npy"], "absent.npy must hold arrays"),
    "batch size": (["nets:small", "--data", "x.npy", "--batch-size", "0"], "batch size must be"),
    "shape": (["nets:small", "--input", "0,3"], "shape of an input must be positive"),
    "weights": (["net.onnx", "--weights", "w.pt"], "weights are given for"),
    "folder": (["nets:small", "-o", "no/report.html"], "folder that is there"),
    "folder of the model": (["nets:small", "--fix", "no/out.pt"], "folder that is there"),
    "ending": (["nets:small", "--fix", "out.onnx"], "ends in .pt2 or .safetensors or .pt"),
    "program": (["nets:healthy", "--fix", "out.pt2"], "give --input or --data"),
    "itself": (["net.onnx", "-o", "net.onnx"], "a file of its own"),
    "one file": (["net.onnx", "-o", "a.onnx", "--fix", "a.onnx"], "a file of its own"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence_and_nothing_is_written(folder, capsys, name):
    words, said = MISTAKES[name]
    before = files(folder)
    assert run(*words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("batchnorm: ")
    assert said in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert files(folder) == before


def test_modes_exclude_each_other_and_formats_are_known(capsys):
    for words in (["--training", "--inference"], ["--format", "xml"]):
        with pytest.raises(SystemExit) as ended:
            run("nets:small", *words)
        assert ended.value.code == 2
    capsys.readouterr()


def test_help_fits_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run("--help")
    assert len(capsys.readouterr().out.splitlines()) <= 45


def test_a_page_needs_the_lab_and_says_so_before_anything_runs(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "batchnorm.check.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run("nets:absent", "--format", "html") == 2
    assert "pip install 'batchnorm[lab]'" in capsys.readouterr().err


def test_without_jinja_everything_else_runs(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "batchnorm.check.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for form in ("text", "json", "sarif"):
        assert run("nets:small", *SHAPE, "--select", "BN110", "--format", form) == 1
        assert "BN110" in capsys.readouterr().out


@pytest.mark.parametrize("interrupted", ["report", "model"])
def test_what_was_there_stays_when_writing_is_stopped(folder, capsys, monkeypatch, interrupted):
    kept = folder / ("out.html" if interrupted == "report" else "out.pt")
    kept.write_text("of yesterday")
    before = files(folder)

    def stop(*_, **__):
        raise KeyboardInterrupt

    if interrupted == "report":
        monkeypatch.setattr("pathlib.Path.write_text", stop)
        words = ["-o", "out.html"]
    else:
        monkeypatch.setattr("torch.save", stop)
        words = ["--fix", "out.pt"]
    assert run("nets:small", *SHAPE, *words) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert files(folder) == before


def test_ctrl_c_while_the_data_is_read_writes_nothing(folder):
    before = set(files(folder))
    words = ["nets:healthy", "--data", "nets:slow", "--select", "BN103", "-o", "out.html", "--fix", "out.pt"]
    with subprocess.Popen(
        [sys.executable, "-m", "batchnorm", "check", *words], stderr=subprocess.PIPE, text=True
    ) as process:
        while not (folder / "started").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; nothing was written" in said
    assert set(files(folder)) == before | {"started"}


def test_a_reader_that_has_heard_enough_is_no_error():
    words = [sys.executable, "-m", "batchnorm", "check", "--list"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


def test_the_model_is_the_one_that_the_verb_sees(folder, capsys):
    """The command line and the verb say the same."""
    nets = __import__("nets")
    assert run("nets:moved", "--data", "nets:batches") == 1
    said = capsys.readouterr().out
    assert said == f"{bn.check(nets.moved(), data=nets.batches())}\n"
