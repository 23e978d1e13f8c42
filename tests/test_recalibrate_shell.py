"""`batchnorm recalibrate` as a user of the command line meets it, in one process and in two."""

import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import batchnorm as bn
from batchnorm import cli
from test_recalibrate_onnx import network as onnx_network

# NumPy 2 says it whenever Keras makes an array of a torch tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NETS = """
import time
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    body = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, a, b):
        return self.norm(a + b)

def batches():
    torch.manual_seed(1)
    return [(torch.randn(n, 1, 8, 8), torch.zeros(n)) for n in (5, 7, 3, 8, 1)]

def uneven():
    return batches()[:1]

def slow():
    for x, _ in batches():
        yield x
        open("started", "w").close()
        time.sleep(60)

def broken():
    raise ValueError("no disk")
"""


@pytest.fixture
def nets(elsewhere):
    (elsewhere / "nets.py").write_text(NETS)
    import nets

    return nets


def run(*words):
    return cli.main(["recalibrate", *map(str, words)])


def expected(nets, data="batches", **options):
    model = nets.small()
    bn.recalibrate(model.eval(), getattr(nets, data)(), progress=False, **options)
    return {name: v for name, v in model.state_dict().items() if "tracked" not in name}


def assert_equal(path, tensors, exactly=True):
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    for name, v in tensors.items():
        torch.testing.assert_close(found[name], v, rtol=0 if exactly else 1e-6, atol=0 if exactly else 1e-7)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("method", ["one-pass", "sequential"])
def test_a_factory_becomes_a_file_of_tensors(nets, elsewhere, capsys, ending, method):
    out = elsewhere / f"out.{ending}"
    assert run("nets:small", "--data", "nets:batches", "-o", out, "--method", method) == 0
    said = capsys.readouterr().out
    assert "2 of 2 layers have new statistics" in said
    assert f"written to {out}" in said
    assert_equal(out, expected(nets, method=method))


def test_arrays_from_files(nets, elsewhere):
    x = torch.cat([x for x, _ in nets.batches()])
    np.save("x.npy", x.numpy().astype(np.float64))
    np.savez("named.npz", x=x.numpy(), y=np.zeros(len(x)))
    model = nets.small()
    bn.recalibrate(model.eval(), [x[:10], x[10:20], x[20:]], progress=False)
    tensors = {name: v for name, v in model.state_dict().items() if "running" in name}
    for data in ("x.npy", "named.npz"):
        assert run("nets:small", "--data", data, "-o", "out.pt", "--batch-size", 10) == 0
        assert_equal(elsewhere / "out.pt", tensors)


def test_named_arrays_and_options(nets, elsewhere, capsys):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 200, 2)).astype(np.float32)
    np.savez("two.npz", a=a, b=b)
    assert (
        run("nets:Two", "--data", "two.npz", "-o", "out.pt", "--batch-size", 50, "--samples", 100, "--prior", 100) == 0
    )
    assert "100 samples in 2 batches" in capsys.readouterr().out
    mean = torch.load("out.pt", weights_only=True)["norm.running_mean"].numpy()
    np.testing.assert_allclose(mean, (a + b)[:100].mean(0) / 2, rtol=1e-5, atol=1e-7)
    assert run("nets:Two", "--data", "two.npz", "-o", "out.pt", "--batches", 1, "--tolerance", 0.5) == 0


def test_the_data_that_compare_takes(elsewhere, nets, capsys):
    assert run("nets:small", "--data", "digits", "-o", "out.pt") == 0
    assert "1,797 samples in 29 batches" in capsys.readouterr().out


def test_onnx_keras_and_programs(nets, elsewhere, capsys):
    rng = np.random.default_rng(0)
    onnx.save(onnx_network()[0], "net.onnx")
    np.save("x.npy", rng.standard_normal((20, 3, 6, 6)).astype(np.float32))
    assert run("net.onnx", "--data", "x.npy", "-o", "new.onnx") == 0
    keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]).save("net.keras")
    np.save("rows.npy", rng.standard_normal((20, 4)).astype(np.float32) + 3)
    assert run("net.keras", "--data", "rows.npy", "-o", "new.keras") == 0
    program = torch.export.export(nn.Sequential(nn.BatchNorm1d(4)).eval(), (torch.zeros(10, 4),))
    torch.export.save(program, "net.pt2")
    assert run("net.pt2", "--data", "rows.npy", "-o", "new.pt2", "--batch-size", 10) == 0
    assert capsys.readouterr().out.count("written to") == 3
    assert onnx.load("new.onnx") != onnx.load("net.onnx")
    assert keras.saving.load_model("new.keras").layers[0].moving_mean.numpy().min() > 2
    assert torch.export.load("new.pt2").state_dict["0.running_mean"].min() > 2


MISTAKES = {
    "no data": (["nets:small", "--data", "nowhere.npy", "-o", "out.pt"], "nowhere.npy must hold arrays"),
    "no source": (["nets:small", "--data", "nowhere", "-o", "out.pt"], "no such file or folder: nowhere"),
    "no folder": (["nets:small", "--data", "nets:batches", "-o", "no/out.pt"], "folder that is there"),
    "ending": (["nets:small", "--data", "nets:batches", "-o", "out.onnx"], "ends in .pt2 or .safetensors or .pt"),
    "broken": (["nets:small", "--data", "nets:broken", "-o", "out.pt"], "ValueError: no disk"),
    "number": (["nets:small", "--data", "nets:batches", "-o", "out.pt", "--batches", "0"], "batches must be"),
    "batch size": (["nets:small", "--data", "x.npy", "-o", "out.pt", "--batch-size", "0"], "batch size must be"),
    "sizes": (["nets:small", "--data", "x.npy", "-o", "out.pt"], "must take the batches"),
    "cut off": (["nets:small", "--data", "cut.npz", "-o", "out.pt"], "cut.npz must hold arrays"),
    "objects": (["nets:small", "--data", "objects.npy", "-o", "out.pt"], "objects.npy must hold arrays"),
    "lengths": (["nets:small", "--data", "lengths.npz", "-o", "out.pt"], "arrays of one length"),
    "no model": (["nets:none", "--data", "x.npy", "-o", "out.pt"], "must make a model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence_and_nothing_is_written(nets, elsewhere, capsys, name):
    np.save("x.npy", np.zeros((4, 2), np.float32))
    np.savez("lengths.npz", a=np.zeros(3), b=np.zeros(4))
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    whole = (elsewhere / "lengths.npz").read_bytes()
    (elsewhere / "cut.npz").write_bytes(whole[: len(whole) // 2])
    words, said = MISTAKES[name]
    before = sorted(elsewhere.iterdir())
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("batchnorm: ")
    assert said in error
    assert "Traceback" not in error
    assert {p for p in elsewhere.iterdir() if p.name != "__pycache__"} == {p for p in before if p.name != "__pycache__"}


def test_ctrl_c_writes_nothing(nets, elsewhere):
    command = [sys.executable, "-m", "batchnorm", "recalibrate", "nets:small", "--data", "nets:slow", "-o", "out.pt"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (elsewhere / "started").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; nothing was written" in said
    assert not (elsewhere / "out.pt").exists()


def torchrun(elsewhere, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "batchnorm", "recalibrate", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_torchrun_gives_what_one_process_gives(nets, elsewhere):
    done = torchrun(
        elsewhere, "nets:small", "--data", "nets:batches", "-o", "out.safetensors", "--method", "sequential"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert "24 samples in 5 batches" in done.stdout
    assert_equal(elsewhere / "out.safetensors", expected(nets, method="sequential"), exactly=False)


def test_torchrun_with_fewer_batches_than_processes(nets, elsewhere):
    done = torchrun(elsewhere, "nets:small", "--data", "nets:uneven", "-o", "out.pt", "--method", "one-pass")
    assert done.returncode == 0, done.stderr
    assert "5 samples in 1 batches" in done.stdout
    assert_equal(elsewhere / "out.pt", expected(nets, "uneven", method="one-pass"), exactly=False)
