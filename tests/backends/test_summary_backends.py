"""What the table of a Keras model says of batch normalization, on every backend, from Python and on the command line."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
from keras import layers as L  # noqa: N812

import batchnorm as bn
from batchnorm import cli

# NumPy 2 says it whenever Keras makes an array of a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def one(size=4, **options):
    layer = L.BatchNormalization(name="bn", **options)
    return keras.Sequential([keras.Input((size,)), layer])


def network():
    norms = [L.BatchNormalization(name=name) for name in ("first", "second", "third")]
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            L.Flatten(),
            norms[0],
            L.Dense(300, "relu"),
            norms[1],
            L.Dense(100, "relu"),
            norms[2],
            L.Dense(10),
        ]
    )


def last(model):
    return str(bn.summary(model)).splitlines()[-1]


def test_half_of_the_numbers_of_the_network_of_the_notes_are_trained():
    model = network()
    found = bn.summary(model)
    norms = [layer for layer in found.layers if layer.norm]
    assert [layer.parameters for layer in norms] == [3136, 1200, 400]
    assert [layer.trainable for layer in norms] == [layer.statistics for layer in norms] == [1568, 600, 200]
    assert (found.trainable, found.statistics, found.parameters) == (268_978, 2_368, model.count_params())
    assert str(found).splitlines()[-3] == (
        "first: 4 × 784 = 3,136: γ and β are trained (1,568), mean and variance are updated by forward passes (1,568)"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable": False}, "bn: 4 × 4 = 16: γ and β are frozen (8), mean and variance are not updated (8)"),
        ({"scale": False}, "bn: 3 × 4 = 12: β is trained (4), mean and variance are updated by forward passes (8)"),
        ({"center": False}, "bn: 3 × 4 = 12: γ is trained (4), mean and variance are updated by forward passes (8)"),
        ({"scale": False, "center": False}, "bn: 2 × 4 = 8: mean and variance are updated by forward passes (8)"),
        (
            {"renorm": True},
            "bn: 7 × 4 = 28: γ and β are trained (8), mean, variance, deviation, mean of renormalization and deviation of "
            "renormalization are updated by forward passes (20)",
        ),
    ],
    ids=["frozen", "no scale", "no center", "neither", "renorm"],
)
def test_options_of_a_layer(options, words):
    model = one(**options)
    assert last(model) == words
    assert bn.summary(model).parameters == model.count_params()
    # as Keras counts
    assert bn.summary(model).trainable == sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def test_a_shared_layer_counts_once():
    x, layer = keras.Input((4,)), L.BatchNormalization(name="bn")
    model = keras.Model(x, [layer(x), layer(L.Dense(4)(layer(x)))])
    assert str(bn.summary(model)).count("bn: 4 × 4 = 16: γ and β are trained (8)") == 1


def test_the_command_line_reads_files_and_factories(elsewhere, capsys):
    one().save("model.keras")
    assert cli.main(["summary", "model.keras", "--input", "2,4"]) == 0
    assert "bn: 4 × 4 = 16: γ and β are trained (8)" in capsys.readouterr().out
    code = "import keras\ndef make():\n    return keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])\n"
    (elsewhere / "own_keras_nets.py").write_text(code)
    assert cli.main(["summary", "own_keras_nets:make"]) == 0
    assert "16 parameters: 8 trainable, 8 running statistics, 0 frozen" in capsys.readouterr().out
    assert cli.main(["fold", "own_keras_nets:make", "-o", "folded.keras"]) == 0
    capsys.readouterr()
    assert cli.main(["summary", "own_keras_nets:make", "--weights", "w.pt"]) == 2
    assert "holds its own" in capsys.readouterr().err


BAD = {
    "cut.keras": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "text.keras": lambda path: path.write_text("hello"),
    "none.keras": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(
    "words", [["summary"], ["fold", "-o", "out.keras"], ["check"], ["strip-bias", "-o", "out.keras"]]
)
def test_bad_files_on_the_command_line(elsewhere, capsys, name, words):
    one().save(name)
    BAD[name](elsewhere / name)
    before = sorted(os.listdir(elsewhere))
    assert cli.main([words[0], name, *words[1:]]) == 2
    assert f"{name} must" in capsys.readouterr().err
    assert sorted(os.listdir(elsewhere)) == before


@pytest.mark.parametrize("verb", ["fold", "recalibrate"])
def test_a_file_with_code_is_refused_on_the_command_line(elsewhere, capsys, verb):
    x = keras.Input((7,))
    keras.Model(x, L.Lambda(lambda v: v + 1)(x)).save("code.keras")
    np.save("x.npy", np.zeros((4, 7), np.float32))
    data = ["--data", "x.npy"] if verb == "recalibrate" else []
    assert cli.main([verb, "code.keras", *data, "-o", "out.keras"]) == 2
    assert "holds Python code (a Lambda layer), which is not executed" in capsys.readouterr().err
    assert not (elsewhere / "out.keras").exists()
