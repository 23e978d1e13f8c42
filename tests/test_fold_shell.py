"""`batchnorm fold`, `strip-bias` and `prune` as a user of the command line meets them."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm import cli
from batchnorm.onnx import files as onnx_files

NETS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))

def named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(2, 4), nn.BatchNorm1d(4)

        def forward(self, x, y):
            return self.norm(self.a(x) + self.b(y))

    return Two()

def unexportable():
    class Python(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x) if float(x.sum()) > 1e9 else self.net(-x)

    return Python()
"""
SHAPE = "2,3,8,8"


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net(torch.randn(16, 3, 8, 8) + 1)
        net[1].weight[1] = 0
        net[1].weight[[0, 2, 3]] = torch.tensor([0.5, 2.0, 1.5])
        net[1].bias.copy_(torch.tensor([0.1, 0.3, -0.2, 0.4]))
    return net.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of every format that needs no other framework."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "nets.py").write_text(NETS)
    state = network().state_dict()
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")
    torch.export.save(torch.export.export(network(), (torch.randn(2, 3, 8, 8),)), folder / "net.pt2")
    write_onnx(folder / "net.onnx")
    return folder


@pytest.fixture
def folder(models, elsewhere):
    for file in models.iterdir():
        shutil.copy(file, elsewhere)
    return elsewhere


def write_onnx(path):
    from onnx import TensorProto, helper, numpy_helper

    state = {name: v.numpy() for name, v in network().state_dict().items() if v.is_floating_point()}
    nodes = [
        helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["a"], name="conv"),
        helper.make_node(
            "BatchNormalization", ["a", "1.weight", "1.bias", "1.running_mean", "1.running_var"], ["b"], name="norm"
        ),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("Conv", ["c", "3.weight", "3.bias"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2, 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in state.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def expected():
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        return x, network()(x)


def run(capfd, *words):
    """Return the exit code and what was said; a traceback or a second sentence is an error."""
    code = cli.main(list(words))
    said = capfd.readouterr()
    if code:
        assert said.out == ""
        assert said.err.startswith("batchnorm: ")
        assert len(said.err.strip().splitlines()) == 1, said.err
        assert "Traceback" not in said.err
        return code, said.err
    assert said.err == ""
    return code, said.out


def loaded(path):
    from batchnorm.torch.files import load

    return load(path).module(check_guards=False)


FACTORY = ["nets:small", "--weights", "w.safetensors", "--input", SHAPE]
SOURCES = {
    "factory, safetensors": FACTORY,
    "factory, pt": ["nets:small", "--weights", "w.pt", "--input", SHAPE],
    "pt2": ["net.pt2"],
    "pt2 with a shape": ["net.pt2", "--input", SHAPE],
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_folded_program_computes_the_same(folder, capfd, source):
    code, said = run(capfd, "fold", *SOURCES[source], "-o", "out.pt2")
    assert code == 0
    x, y = expected()
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder / "out.pt2")(x), y)
    assert "1 normalization layers: 1 folded" in said
    assert re.search(r"float64, random inputs: largest difference \S+, relative \S+ \(bound 1e-12\)", said)
    assert re.search(
        r"layers \d → \d, parameters \d+ → \d+, latency × \d+\.\d\d \(\d+\.\d ms, median of \d+ pairs\)", said
    )
    assert said.endswith("written to out.pt2\n")


def test_the_line_of_before_and_after_counts_what_is_there(folder, capfd):
    said = run(capfd, "fold", *FACTORY, "-o", "out.safetensors")[1]
    # 3 · 4 · 9 + 4, 4 · 4, 4 · 2 · 9 + 2
    assert "layers 3 → 2, parameters 202 → 186" in said


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_tensors_fit_the_network_without_the_norm(folder, capfd, ending):
    assert run(capfd, "fold", *FACTORY, "-o", f"out.{ending}")[0] == 0
    tensors = load_file("out.safetensors") if ending == "safetensors" else torch.load("out.pt")
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 2, 3))
    bare.load_state_dict(tensors)
    x, y = expected()
    with torch.no_grad():
        torch.testing.assert_close(bare(x), y)


def test_an_onnx_file_is_folded(folder, capfd):
    code, said = run(capfd, "fold", "net.onnx", "-o", "out.onnx")
    assert code == 0
    assert "1 folded" in said
    model = onnx_files.load(folder / "out.onnx")
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "Conv"]
    from onnx.reference import ReferenceEvaluator

    x, y = expected()
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0], y.numpy(), atol=1e-5)


def test_a_keras_file_is_folded(elsewhere, capfd):
    import keras

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [keras.Input((5,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.ReLU()]
        model = keras.Sequential(layers)
        model.save("net.keras")
        assert cli.main(["fold", "net.keras", "-o", "out.keras"]) == 0
        again = keras.saving.load_model("out.keras", compile=False)
        x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
        # Keras' own conversion warns
        a, b = (np.asarray(keras.ops.convert_to_numpy(m(x, training=False))) for m in (model, again))
    said = capfd.readouterr().out
    assert "1 folded" in said
    assert "written to out.keras" in said
    np.testing.assert_allclose(b, a, atol=1e-5)


def test_strip_bias_writes_a_network_without_the_bias(folder, capfd):
    code, said = run(capfd, "strip-bias", *FACTORY, "-o", "out.safetensors")
    assert code == 0
    assert "4 parameters less in 1 layers" in said
    assert "parameters 202 → 198" in said
    tensors = load_file("out.safetensors")
    assert "0.bias" not in tensors
    before = network()
    torch.testing.assert_close(tensors["1.running_mean"], before[1].running_mean - before[0].bias.detach())


def test_prune_writes_a_smaller_network(folder, capfd):
    code, said = run(capfd, "prune", *FACTORY, "-o", "out.pt2")
    assert code == 0
    assert "1 of 4 channels gone" in said
    x, y = expected()
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder / "out.pt2")(x), y)


def test_prune_takes_a_threshold(folder, capfd):
    code, said = run(capfd, "prune", *FACTORY, "-o", "out.pt", "--threshold", "0.6")
    assert code == 0
    assert "2 of 4 channels gone" in said
    assert torch.load("out.pt")["0.weight"].shape[0] == 2


def test_inputs_by_name(folder, capfd):
    words = ["fold", "nets:named", "--input", "y=5,2", "--input", "x=5,3", "-o", "out.safetensors"]
    assert run(capfd, *words)[0] == 0
    assert run(capfd, "fold", "nets:named", "--input", "5,3", "--input", "5,2", "-o", "out.pt2")[0] == 0


def test_a_file_is_replaced_and_nothing_is_left_beside_it(folder, capfd):
    (folder / "out.pt2").write_text("of yesterday")
    before = set(folder.iterdir())
    assert run(capfd, "fold", "net.pt2", "-o", "out.pt2")[0] == 0
    assert (folder / "out.pt2").read_bytes()[:2] == b"PK"
    assert {p for p in folder.iterdir() if p.name != "__pycache__"} == before


def test_a_file_can_be_written_over_itself(folder, capfd):
    assert run(capfd, "fold", "net.pt2", "-o", "net.pt2")[0] == 0
    x, y = expected()
    with torch.no_grad():
        torch.testing.assert_close(loaded(folder / "net.pt2")(x), y)


def test_it_is_a_command_of_its_own_too(folder):
    words = [sys.executable, "-m", "batchnorm", "fold", *FACTORY, "-o", "out.pt2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith("written to out.pt2\n")


# --- mistakes -----------------------------------------------------------------------------------------------


def broken_weights(folder):
    state = network().state_dict()
    save_file(state | {"1.running_var": torch.full((4,), torch.nan)}, folder / "nan.safetensors")
    save_file(
        {k: torch.full_like(v, torch.nan) if k == "0.weight" else v for k, v in state.items()},
        folder / "bad.safetensors",
    )
    save_file({"0.weight": state["0.weight"]}, folder / "some.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:300])
    (folder / "cut.pt").write_bytes((folder / "w.pt").read_bytes()[:300])
    for name in ("net.pt2", "net.onnx"):
        data = (folder / name).read_bytes()
        (folder / f"cut{Path(name).suffix}").write_bytes(data[: len(data) // 2])
        (folder / f"empty{Path(name).suffix}").write_bytes(b"")
    (folder / "text.onnx").write_text("hello")
    (folder / "text.keras").write_text("hello")
    (folder / "dir.pt2").mkdir()


MISTAKES = {
    "no file, pt2": (["absent.pt2"], "out.pt2", "absent.pt2"),
    "no file, onnx": (["absent.onnx"], "out.onnx", "absent.onnx"),
    "no file, keras": (["absent.keras"], "out.keras", "absent.keras"),
    "a folder": (["dir.pt2"], "out.pt2", "dir.pt2"),
    "cut off, pt2": (["cut.pt2"], "out.pt2", "cut.pt2"),
    "cut off, onnx": (["cut.onnx"], "out.onnx", "cut.onnx"),
    "empty, pt2": (["empty.pt2"], "out.pt2", "empty.pt2"),
    "empty, onnx": (["empty.onnx"], "out.onnx", "empty.onnx"),
    "no model, onnx": (["text.onnx"], "out.onnx", "text.onnx"),
    "no model, keras": (["text.keras"], "out.keras", "text.keras"),
    "unknown ending": (["net.h5"], "out.pt2", "package.module:factory, got 'net.h5'"),
    "another format to write": (["net.onnx"], "out.pt2", "ends in .onnx, got out.pt2"),
    "a format that nobody writes": (FACTORY, "out.bin", "ends in .pt2 or .safetensors or .pt, got out.bin"),
    "no ending": (FACTORY, "out", "got out"),
    "no folder": (FACTORY, "absent/out.pt2", "absent is not"),
    "no shape": (["nets:small"], "out.pt2", "--input"),
    "a shape that does not fit": (["nets:small", "--input", "2,5,8,8"], "out.pt2", "must run on the example"),
    "a name that does not fit": (["nets:small", "--input", "z=2,3,8,8"], "out.pt2", "must run on the example"),
    "too many shapes": ([*FACTORY, "--input", SHAPE], "out.pt2", "must run on the example"),
    "a shape that does not fit a file": (["net.pt2", "--input", "2,5,8,8"], "out.pt2", "must run on the example"),
    "a name that is not in a file": (["net.onnx", "--input", "z=2,3,8,8"], "out.onnx", "z"),
    "a shape with a negative size": (["nets:small", "--input=-1,3,8,8"], "out.pt2", "-1"),
    "unknown module": (["absent:net", "--input", SHAPE], "out.pt2", "absent:net must make a model"),
    "unknown factory": (["nets:large", "--input", SHAPE], "out.pt2", "nets:large"),
    "no weights": (["nets:small", "--weights", "absent.pt", "--input", SHAPE], "out.pt2", "absent.pt"),
    "weights cut off": (["nets:small", "--weights", "cut.safetensors", "--input", SHAPE], "out.pt2", "cut.safetensors"),
    "weights cut off, pt": (["nets:small", "--weights", "cut.pt", "--input", SHAPE], "out.pt2", "cut.pt"),
    "weights that do not fit": (["nets:small", "--weights", "some.safetensors", "--input", SHAPE], "out.pt2", "fit the model"),
    "weights for a file": (["net.pt2", "--weights", "w.pt"], "out.pt2", "net.pt2 holds its own"),
    "NaN": (["nets:small", "--weights", "bad.safetensors", "--input", SHAPE], "out.pt2", "finite"),
    "can't be exported": (["nets:unexportable", "--input", SHAPE], "out.pt2", "write .safetensors instead"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_nothing_is_touched(folder, capfd, mistake):
    broken_weights(folder)
    words, out, message = MISTAKES[mistake]
    path = folder / out
    if path.parent.is_dir():
        path.write_text("of yesterday")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    code, said = run(capfd, "fold", *words, "-o", out)
    assert code == 2
    assert message in said
    assert not path.parent.is_dir() or path.read_text() == "of yesterday"
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert after == before


def test_statistics_that_are_not_finite_stay_and_are_told(folder, capfd):
    broken_weights(folder)
    code, said = run(capfd, "fold", "nets:small", "--weights", "nan.safetensors", "--input", SHAPE, "-o", "out.pt2")
    assert code == 2 or "finite" in said
    assert code == 0 or not (folder / "out.pt2").exists()


@pytest.mark.parametrize("words", [["--threshold", "-1"], ["--threshold", "nan"]], ids=str)
def test_a_threshold_that_can_not_be(folder, capfd, words):
    code, said = run(capfd, "prune", *FACTORY, "-o", "out.pt2", *words)
    assert code == 2
    assert "threshold must be 0 or positive" in said
    assert not (folder / "out.pt2").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["fold"],
        ["fold", "nets:small"],
        ["fold", "nets:small", "-o", "x.pt2", "--input", "a,b"],
        ["fold", "nets:small", "-o", "x.pt2", "--threshold", "1"],
        ["strip_bias", "nets:small", "-o", "x.pt2"],
        ["prune", "nets:small", "-o", "x.pt2", "--threshold", "much"],
    ],
    ids=" ".join,
)
def test_words_that_can_not_be_parsed(folder, capfd, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "usage: batchnorm" in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["fold", "strip-bias", "prune"])
def test_help_fits_one_screen(verb, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert len(capfd.readouterr().out.splitlines()) <= 45


# --- interrupted --------------------------------------------------------------------------------------------


WRITERS = {
    "pt2": ("torch.export.save", FACTORY),
    "pt": ("torch.save", FACTORY),
    "safetensors": ("safetensors.torch.save_file", FACTORY),
    "onnx": ("pathlib.Path.write_bytes", ["net.onnx"]),
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["stopped", "full"])
def test_an_interrupted_write_leaves_the_file_of_yesterday(folder, capfd, monkeypatch, ending, error):
    name, words = WRITERS[ending]
    path = folder / f"out.{ending}"
    path.write_text("of yesterday")
    before = {p.name for p in folder.iterdir()}

    def interrupted(*arguments, **_):
        partial = next(a for a in arguments if isinstance(a, str | Path) and Path(a).suffix == f".{ending}")
        with open(partial, "wb") as stream:
            stream.write(b"half")
        raise error

    monkeypatch.setattr(name, interrupted)
    code = cli.main(["fold", *words, "-o", str(path)])
    said = capfd.readouterr()
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert "written to" not in said.out
    assert "Traceback" not in said.err
    assert path.read_text() == "of yesterday"
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == before
