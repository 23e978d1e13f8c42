"""The numbers of a whole model in another framework: proved on both, or nothing is written."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import re
from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from keras import layers as kl
from safetensors.torch import load_file, save_file
from torch import nn

import batchnorm as bn
import batchnorm.keras
import batchnorm.torch
from batchnorm.bench.zoo import open_torchvision
from batchnorm.cli import main
from batchnorm.errors import OptionError, VerificationError
from batchnorm.graph import Graph, Layout, Linear, Norm, Normalize, Value, Weights
from batchnorm.translation.pairing import calls, paired
from transfer_models import Flattened, flattened_keras, randomized, resnet18_keras

# NumPy 2 warns of how Keras reads its variables on torch
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 3, 8, 6)


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model, x):
    """Outputs with the channels first."""
    if isinstance(model, keras.Model):
        y = model(np.moveaxis(x, 1, -1), training=False).detach().numpy()
        return np.moveaxis(y, -1, 1)
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return model.eval()(torch.from_numpy(x)).numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def assert_same(model, source, x):
    expected = run(source, x)
    np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# -- there and back ----------------------------------------------------------------------------------------------------


def test_torch_to_keras_and_back():
    source = randomized(Flattened())
    target = randomized(flattened_keras(), seed=1)
    before = [w.copy() for w in target.get_weights()]
    found = bn.transfer(source, target, torch.from_numpy(noise()))
    assert_same(found.model, source, noise(seed=5))
    assert [(c.source, c.note) for c in found.carried if "order" in c.note] == [
        ("flat", "features in another order, biased variance from now on"),
        ("head.0", "features in another order"),
    ]
    assert float(found.error) < 1e-12
    assert {layer.epsilon for layer in found.model.layers if isinstance(layer, kl.BatchNormalization)} == {1e-5}
    # the target itself is left as it is
    assert all((a == e).all() for a, e in zip(target.get_weights(), before, strict=True))
    home = randomized(Flattened(eps=0.3), seed=2)
    # without an example: Keras knows its shapes
    back = bn.transfer(found.model, home).model
    counts = [name for name in source.state_dict() if "num_batches" in name]
    for name, tensor in source.state_dict().items():
        assert name in counts or torch.equal(back.state_dict()[name], tensor), name
    assert {m.eps for m in back.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {1e-5}
    assert_same(back, source, noise(seed=6))


def test_layers_of_ours_take_the_convention_and_the_decay():
    source = randomized(flattened_keras(momentum=0.75))
    target = batchnorm.torch.convert(Flattened()).eval()
    found = bn.transfer(source, target)
    layers = [
        m for m in found.model.modules() if isinstance(m, batchnorm.torch.BatchNorm1d | batchnorm.torch.BatchNorm2d)
    ]
    assert {(m.eps, m.momentum, m.options.unbiased) for m in layers} == {(1e-3, 0.25, False)}
    assert {c.note for c in found.carried} == {"", "features in another order"}
    keras_target = flattened_keras(norm=batchnorm.keras.BatchNormalization)
    there = bn.transfer(randomized(Flattened()), keras_target, torch.from_numpy(noise()))
    ours = [layer for layer in there.model.layers if isinstance(layer, batchnorm.keras.BatchNormalization)]
    assert {(layer.epsilon, layer.momentum, layer.unbiased) for layer in ours} == {(1e-5, 0.9, True)}
    assert {c.note for c in there.carried} == {"", "features in another order"}


def to_onnx(model, path, shape=SHAPE):
    """Write a torch model with its batch normalization as nodes."""
    torch.onnx.export(
        model.eval(), (torch.zeros(shape),), path, dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    return onnx.load(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_to_onnx_and_onnx_to_keras(tmp_path):
    source = randomized(Flattened(eps=1e-3), seed=3)
    target = to_onnx(randomized(Flattened(eps=0.1), seed=4), tmp_path / "t.onnx")
    assert sum(node.op_type == "BatchNormalization" for node in target.graph.node) == 5
    found = bn.transfer(source, target, torch.from_numpy(noise()))
    assert_same(found.model, source, noise(seed=8))
    there = bn.transfer(found.model, randomized(flattened_keras(), seed=5))
    assert_same(there.model, source, noise(seed=9))
    back = bn.transfer(there.model, randomized(Flattened(), seed=6)).model
    for name, tensor in source.state_dict().items():
        assert "num_batches" in name or torch.equal(back.state_dict()[name], tensor), name


def test_resnet18_of_torchvision():
    open_torchvision()
    from torchvision.models import resnet18

    source = randomized(resnet18(num_classes=10))
    found = bn.transfer(source, resnet18_keras(size=32))
    assert len({c.target for c in found.carried}) == len({c.source for c in found.carried}) == 41
    assert float(found.error) < 1e-12
    assert_same(found.model, source, noise((1, 3, 32, 32)))


def test_an_exported_program_takes_numbers_but_no_other_eps():
    source, target = randomized(small(eps=1e-3), seed=1), randomized(small(eps=1e-3), seed=2)
    program = torch.export.export(target, (torch.zeros(SHAPE),))
    found = bn.transfer(source, program)
    with torch.no_grad():
        x = torch.from_numpy(noise(seed=3))
        torch.testing.assert_close(found.model.module()(x), source(x))
    # and back, into a module
    assert torch.equal(bn.transfer(found.model, small().eval()).model[1].running_var, source[1].running_var)
    with pytest.raises(
        OptionError, match=r"has eps = 0\.001 as a constant of its program, it must be 0\.5: export the model"
    ):
        bn.transfer(small(eps=0.5).eval(), program, torch.zeros(SHAPE))


# -- pairing -----------------------------------------------------------------------------------------------------------


def weights(name, out, into):
    array = np.zeros((out, into, 1, 1))
    return Weights(name, Layout(0, 1), lambda: (array, None), has_bias=False)


def branching(order):
    """Two branches of one shape that go into one sum; one of them has batch normalization."""
    graph, x = Graph(), Value((2, 4, 3, 3))
    norm = Norm("norm", np.zeros(4), np.ones(4), None, None, 1e-5)

    def long(x):
        (y,) = graph.add(Linear(weights("long", 4, 4), 1, 1), [x], [x.shape], "long")
        return graph.add(Normalize(norm, 1), [y], [x.shape], "norm")[0]

    def short(x):
        return graph.add(Linear(weights("short", 4, 4), 1, 1), [x], [x.shape], "short")[0]

    for branch in order:
        {"long": long, "short": short}[branch](x)
    return calls(graph, 1)


def test_branches_are_paired_by_where_they_stand():
    pairs = paired(branching(["long", "short"]), branching(["short", "long"]))
    assert {(a.layer.name, b.layer.name) for a, b in pairs} == {("long", "long"), ("short", "short"), ("norm", "norm")}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)),
            "the first that do not fit are '2' (convolution 4 → 5, kernel 1×1) of the source and '2' (convolution 4 → 6, "
            "kernel 1×1) of the target",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1)),
            "the first that do not fit are '1' (convolution 4 → 6, kernel 1×1) of the source and '1' (batch normalization of 4 "
            "channels) of the target",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
            "the first that do not fit are '3' (batch normalization of 6 channels) of the source and no layer of the target",
        ),
    ],
)
def test_layers_that_do_not_fit_are_named(change, text):
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)).eval()
    with pytest.raises(OptionError, match=re.escape(text)):
        bn.transfer(change().eval(), target, torch.zeros(SHAPE))


def test_shared_layers_must_be_shared():
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a if shared else nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(4, 3)
    both = bn.transfer(Twice(True).eval(), Twice(True).eval(), x)
    assert len(both.carried) == 1
    for source, target in ((True, False), (False, True)):
        with pytest.raises(OptionError, match=r"both models must share the same layers between their calls: '[ab]'"):
            bn.transfer(Twice(source).eval(), Twice(target).eval(), x)


# -- what is refused ---------------------------------------------------------------------------------------------------


def small(*, bias=True, affine=True, act=nn.ReLU, eps=1e-5):
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine, eps=eps), act())


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (small(), small(affine=False), "'1' (batch normalization of 4 channels) of the target must have a γ"),
        (small(), small(bias=False), "'0' (convolution 3 → 4, kernel 3×3) of the target must have a bias"),
        (
            nn.Sequential(nn.ReLU()),
            nn.Sequential(nn.ReLU()),
            "must hold dense layers, convolutions or batch normalization",
        ),
    ],
)
def test_what_the_target_has_no_room_for_is_named(source, target, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        bn.transfer(randomized(source), target.eval(), torch.zeros(SHAPE))


def test_what_only_the_target_has_is_neutral_and_noted():
    found = bn.transfer(
        randomized(small(affine=False, bias=False)), randomized(small(), seed=3), torch.from_numpy(noise())
    )
    assert [c.note for c in found.carried] == ["bias of zeros", "γ of ones, β of zeros"]
    assert (found.model[1].weight == 1).all()
    assert not found.model[0].bias.any()


def test_models_in_training_are_refused():
    with pytest.raises(
        OptionError, match=r"layer '1' of the source must normalize by running statistics, .* model\.eval\(\)"
    ):
        bn.transfer(small().train(), small().eval(), torch.zeros(SHAPE))


def test_an_example_is_asked_for():
    with pytest.raises(OptionError, match="an example input of the source must be given, neither"):
        bn.transfer(small().eval(), small().eval())


def test_an_example_that_does_not_fit_the_target():
    with pytest.raises(
        OptionError, match="both models must run on one example, but keras takes it neither as it is nor with"
    ):
        bn.transfer(small().eval(), flattened_keras(), torch.zeros(2, 3, 9, 9))


@pytest.mark.parametrize("other", [nn.Sigmoid, nn.PReLU])
def test_models_that_compute_something_else_are_refused(other):
    source, target = randomized(small()), randomized(small(act=other), seed=1)
    before = {name: v.clone() for name, v in target.state_dict().items()}
    with pytest.raises(
        VerificationError, match=r"both models must compute the same with the same numbers, .* differ by"
    ):
        bn.transfer(source, target, torch.from_numpy(noise()))
    assert all(torch.equal(v, before[name]) for name, v in target.state_dict().items())


def test_numbers_that_are_not_carried_are_named():
    with pytest.raises(VerificationError, match="numbers of other layers are not carried: 2"):
        bn.transfer(randomized(small(act=nn.PReLU)), small(act=nn.PReLU).eval(), torch.from_numpy(noise()))


@pytest.mark.parametrize("place", ["eps", "mean", "gamma", "bias"])
def test_the_proof_sees_a_small_mistake(place, monkeypatch):
    """One number off by a thousandth."""
    transferring = __import__("batchnorm.translation.transferring", fromlist=["_numbers"])
    numbers, weights = transferring._numbers, transferring._weights

    def wrong(a, b):
        norm = numbers(a, b)
        norm.eps *= 1.001 if place == "eps" else 1
        if place in ("mean", "gamma"):
            values = getattr(norm, place).copy()
            values[1] *= 1.001
            setattr(norm, place, values)
        return norm

    def biased(a, b):
        weight, bias = weights(a, b)
        return weight, bias * 1.001 if place == "bias" else bias

    monkeypatch.setattr(transferring, "_numbers", wrong)
    monkeypatch.setattr(transferring, "_weights", biased)
    with pytest.raises(VerificationError, match="allowed are 1e-09"):
        bn.transfer(randomized(small(eps=0.01)), small().eval(), torch.from_numpy(noise()))


# -- files -------------------------------------------------------------------------------------------------------------


def cnn():
    return Flattened()


def cnn_of_keras():
    return Flattened(eps=1e-3)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A torch model as tensors, a Keras model with other numbers, in the current folder."""
    monkeypatch.chdir(tmp_path)
    source = randomized(Flattened())
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    randomized(flattened_keras(), seed=1).save(tmp_path / "target.keras")
    return source


def convert(*words):
    return main(["convert", *map(str, words)])


def test_convert_writes_a_keras_file_and_tensors_again(files, capsys):
    assert convert("test_transfer:cnn", "target.keras", "--weights", "source.safetensors", "-o", "out.keras") == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^body\.4 +batch_normalization\w* +γ, β, mean, variance, eps 1e-05, decay 0\.9 +biased variance", said, re.M
    )
    assert said.endswith("written to out.keras\n")
    assert_same(keras.saving.load_model("out.keras"), files, noise(seed=4))
    assert convert("out.keras", "test_transfer:cnn", "-o", "back.safetensors") == 0
    back = load_file("back.safetensors")
    for name, tensor in files.state_dict().items():
        assert "num_batches" in name or torch.equal(back[name], tensor), name


def test_tensors_do_not_hold_eps(files, capsys):
    assert convert("target.keras", "test_transfer:cnn", "-o", "back.safetensors") == 2
    said = capsys.readouterr().err
    assert (
        "holds tensors and no eps: that of layer 'body.1' must be 0.001, test_transfer:cnn makes it with 1e-05" in said
    )
    assert not Path("back.safetensors").exists()
    assert convert("target.keras", "test_transfer:cnn_of_keras", "-o", "back.safetensors") == 0
    model = cnn_of_keras()
    model.load_state_dict(load_file("back.safetensors"))
    assert_same(model, keras.saving.load_model("target.keras"), noise(seed=4))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nothing.keras", "target.keras"], "nothing.keras must be a file that model.save() has written"),
        (["target.keras", "short.keras"], "short.keras must hold a whole Keras model: it may be damaged"),
        (["target.txt", "target.keras"], "a model is named as package.module:factory, got 'target.txt'"),
        (["test_transfer:cnn", "target.keras", "--weights", "short.safetensors"], "may be damaged or cut off"),
        (["test_transfer:cnn", "target.keras", "--weights", "nothing.safetensors"], "nothing.safetensors"),
        (["test_transfer:small", "target.keras", "--input", "2,3,8,6"], "the first that do not fit are '0' (convolution 3 → 4"),
        (["test_transfer:cnn", "target.keras", "--input", "2,3,9,9"], "the model must run on the example, but it failed"),
        (["test_transfer:cnn", "target.keras", "--input", "0,3"], "must be positive sizes, got 0,3"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_output_as_it_is(files, capsys, words, text):
    whole = Path("target.keras").read_bytes()
    Path("short.keras").write_bytes(whole[: len(whole) // 2])
    Path("short.safetensors").write_bytes(Path("source.safetensors").read_bytes()[:100])
    Path("out.keras").write_text("as it was")
    assert convert(*words, "-o", "out.keras") == 2
    assert text in capsys.readouterr().err
    assert Path("out.keras").read_text() == "as it was"
    assert {p.name for p in Path.cwd().iterdir()} == {
        "out.keras", "short.keras", "short.safetensors", "source.safetensors", "target.keras"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("out.onnx", "a model of keras is written to a file that ends in .keras"),
        ("a/b.keras", "into a folder that is there"),
    ],
)
def test_places_that_can_not_be_written_to(files, capsys, out, text):
    assert convert("test_transfer:cnn", "target.keras", "-o", out) == 2
    assert text in capsys.readouterr().err


def test_the_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 24
