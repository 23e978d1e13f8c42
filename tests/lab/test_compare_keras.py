import dataclasses
import html
import itertools
import json
import random
import shlex
import sys

import keras
import numpy as np
import onnxruntime
import pytest

import batchnorm as bn
from batchnorm import cli
from batchnorm.errors import MissingDependencyError, OptionError, OutputError
from batchnorm.fold import fold
from batchnorm.keras.internals import as_array, quietly
from batchnorm.lab import ARMS, Arm
from batchnorm.lab.data import load_data
from batchnorm.lab.keras import deploying, hidden
from batchnorm.lab.keras.framework import FRAMEWORK
from batchnorm.lab.keras.heads import bare, take_off
from batchnorm.lab.keras.networks import NETWORKS, build
from batchnorm.lab.keras.training import channels_last, train_network
from batchnorm.lab.keras.watching import Watch, logits_of, score
from batchnorm.lab.tasks import Recipe, Task, batches

SMALL = {"model": "keras:dense", "learning_rates": [0.3], "seeds": 2, "steps": 12, "jobs": 1}
ONE = {"learning_rates": [0.1], "seeds": 1, "steps": 2, "jobs": 1, "batch_size": 16}
DIGITS = load_data("digits")
NUMBERS = ("status", "steps", "val_log_loss", "val_accuracy", "test_log_loss", "test_accuracy", "curve", "units")


def built(arm="everywhere", model="dense", seed=0, x=None):
    x = np.random.default_rng(0).random((20, 8, 8, 1), np.float32) if x is None else x
    return build(model, x.shape[1:], 10, ARMS[arm] if isinstance(arm, str) else arm, seed, x)


def kernels(network):
    return [as_array(layer.kernel.value) for layer in network.model.layers if hasattr(layer, "kernel")]


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A comparison whose best network has batch normalization everywhere, small but whole."""
    return bn.compare("digits", arms=["everywhere"], out=tmp_path_factory.mktemp("keras") / "out", **SMALL)


# -- networks ------------------------------------------------------------------------------------------------------


def test_everywhere_is_the_network_that_courses_teach():
    """Flatten, BN, Dense 300, BN, Dense 100, BN, Dense 10, with the numbers of its summary on 28×28 images."""
    model = built(x=np.random.default_rng(0).random((4, 28, 28, 1), np.float32)).finished()
    assert kinds(model) == ["Flatten", *["BatchNormalization", "Dense"] * 3]
    assert [layer.count_params() for layer in model.layers] == [0, 3136, 235_500, 1200, 30_100, 400, 1010]
    assert [layer.activation.__name__ for layer in model.layers[2::2]] == ["relu", "relu", "softmax"]
    assert [layer.name for layer in model.layers[:4]] == [
        "flatten",
        "batch_normalization",
        "dense",
        "batch_normalization_1",
    ]


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("none", ["Flatten", "BatchNormalization", "Dense", "Dense", "Dense"]),
        ("raw", ["Flatten", "Dense", "Dense", "Dense"]),
        ("before", ["Flatten", "BatchNormalization", *["Dense", "BatchNormalization", "Activation"] * 2, "Dense"]),
        ("layer", ["Flatten", "BatchNormalization", *["Dense", "LayerNormalization", "Activation"] * 2, "Dense"]),
        ("group", ["Flatten", "BatchNormalization", *["Dense", "GroupNormalization", "Activation"] * 2, "Dense"]),
    ],
)
def test_the_order_of_an_arm(arm, expected):
    network = built(arm)
    assert kinds(network.model) == expected
    assert network.model.layers[-3].use_bias if arm == "none" else True


@pytest.mark.parametrize("model", NETWORKS)
def test_every_arm_starts_from_the_same_weights(model):
    reference = kernels(built("none", model))
    for arm in ARMS:
        assert all(map(np.array_equal, kernels(built(arm, model)), reference)), arm
    assert not np.array_equal(kernels(built("none", model, seed=1))[0], reference[0])


def test_building_leaves_the_process_as_it_was():
    name = keras.layers.Dense(1).name
    before = random.getstate(), np.random.get_state()[1].tolist()
    built()
    number = int(name.rpartition("_")[2]) if "_" in name else 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert keras.layers.Dense(1).name == f"dense_{number + 1}"


def test_rows_are_standardized_by_feature_and_by_channel():
    x = np.random.default_rng(0).normal(5, 3, (40, 8, 8, 2)).astype(np.float32)
    x[:, 0, 0, 0] = 7.0
    for model, rows in (("dense", x.reshape(40, -1)), ("cnn", x)):
        layer = built("none", model, x=x).model.get_layer("standardize")
        axes = tuple(range(rows.ndim - 1))
        std = rows.astype(np.float64).std(axes)
        expected = (rows - rows.astype(np.float64).mean(axes)) / np.where(std == 0, 1, std)
        np.testing.assert_allclose(layer(rows).detach().numpy(), expected, atol=2e-6)
        assert layer.trainable_variables == []


# -- training ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_run_can_be_recomputed_by_hand():
    """Plain Keras, with its own layers and `train_on_batch`, gives the numbers of a run."""
    _, row = train_network(Task(ARMS["everywhere"], 0.3, 1), Recipe("keras:dense", 20, 64), DIGITS)
    layers, split = keras.layers, DIGITS.split(1)
    x, y = channels_last(split.x_train), split.y_train
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.BatchNormalization()])
    for width in (300, 100):
        model.add(layers.Dense(width, activation="relu"))
        model.add(layers.BatchNormalization())
    model.add(layers.Dense(10))
    start = build("dense", (8, 8, 1), 10, ARMS["everywhere"], 1, x)
    for own, given in zip(model.variables, start.variables, strict=True):
        own.assign(given.value)
    model.compile(keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    stream = batches(len(y), 64, 1)
    with quietly():
        for rows in itertools.islice(stream, 20):
            model.train_on_batch(x[rows], y[rows])
    loss = model.loss(split.y_test, model(channels_last(split.x_test), training=False)).item()
    assert row["test_log_loss"] == pytest.approx(loss, rel=1e-4)
    assert row["curve"][-1][2:] == [row["val_log_loss"], row["val_accuracy"]]


def test_the_same_task_gives_the_same_numbers_whatever_was_trained_between():
    recipe = Recipe("keras:dense", 6, 64)
    task = Task(ARMS["before"], 0.1, 0)
    _, first = train_network(task, recipe, DIGITS)
    train_network(Task(ARMS["before"], 0.1, 1), recipe, DIGITS)
    _, wild = train_network(Task(ARMS["before"], 1e30, 0), Recipe("keras:dense", 40, 64), DIGITS)
    _, again = train_network(task, recipe, DIGITS)
    assert [again[key] for key in NUMBERS] == [first[key] for key in NUMBERS]
    assert wild["status"] == "diverged"
    assert wild["steps"] < 40
    assert wild["test_log_loss"] is wild["val_accuracy"] is None


def test_watching_changes_nothing_and_sees_what_units_receive():
    network, split = built("none"), DIGITS.split(0)
    split = dataclasses.replace(split, x_val=channels_last(split.x_val))
    layer = network.model.get_layer("dense")
    before = [as_array(v.value).copy() for v in network.variables], layer.activation, set(vars(layer))
    watch = Watch(split, 4)
    watch.set_model(network.model)
    network.model.compile(loss="mse")
    watch.on_train_batch_end(0, {"loss": 0.5})
    assert all(np.array_equal(old, as_array(v.value)) for old, v in zip(before[0], network.variables, strict=True))
    assert (layer.activation, set(vars(layer))) == before[1:]
    received = network.model.layers[1](split.x_val[:256].reshape(-1, 64)).detach().numpy() @ as_array(
        layer.kernel.value
    )
    expected = np.quantile(received[:, 0].astype(np.float64), [0.15, 0.5, 0.85])
    np.testing.assert_allclose(watch.units()[0]["percentiles"][0], expected, rtol=1e-4)
    assert len(watch.units()) == 2


def test_a_loss_that_is_not_finite_stops_the_run():
    watch = Watch(DIGITS.split(0), 4)
    watch.set_model(model := keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))
    watch.on_train_batch_end(0, {"loss": float("nan")})
    assert watch.diverged
    assert model.stop_training


def test_score_is_the_closed_form():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Identity()])
    x = np.array([[0.0, 0.0], [np.log(3.0), 0.0], [-np.log(3.0), 0.0]], dtype=np.float32)
    loss, accuracy = score(model, x, np.array([0, 0, 0]))
    np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.75) + np.log(0.25)) / 3, rtol=1e-6)
    assert accuracy == 2 / 3


# -- the whole way -------------------------------------------------------------------------------------------------


def test_the_output_folder_is_whole(found):
    names = sorted(str(f.relative_to(found.out)) for f in found.out.rglob("*") if f.is_file())
    assert names == [
        "best/model.keras",
        "best/model.onnx",
        "comparison.json",
        "report.html",
        "runs.csv",
        "runs.sqlite",
    ]
    facts = json.loads((found.out / "comparison.json").read_text())
    assert facts["identity"].keys() >= {"keras", "backend"}
    assert facts["identity"]["backend"].startswith("torch ")
    assert facts["best"]["left_out"] == ""
    page = (found.out / "report.html").read_text()
    assert "batch_normalization_2 (BatchNormalization) forward into dense_2" in page
    assert f"keras {keras.__version__}" in page


def test_the_winner_is_folded_forward_and_proved(found):
    deployed = found.best.deployed
    assert deployed.folded == tuple(
        f"batch_normalization{n} (BatchNormalization) forward into dense{n}" for n in ("", "_1", "_2")
    )
    assert kinds(deployed.network) == ["Flatten", "Dense", "Dense", "Dense"]
    assert not deployed.kept
    assert 0 < deployed.error <= deployed.bound < 1e-2
    assert deployed.exact_error < 1e-12
    assert "batch_normalization_2 (BatchNormalization)" in str(found.best.summary)


def test_what_is_saved_gives_the_scores_of_the_result(found):
    split = DIGITS.split(found.best.task.seed)
    x, y = channels_last(split.x_test), split.y_test
    model = keras.saving.load_model(found.out / "best" / "model.keras")
    session = onnxruntime.InferenceSession(found.out / "best" / "model.onnx", providers=["CPUExecutionProvider"])
    [from_onnx] = session.run(None, {session.get_inputs()[0].name: x})
    for outputs in (logits_of(model, x), from_onnx):
        np.testing.assert_allclose(outputs.sum(1), 1, rtol=1e-5)
        loss = -np.log(outputs[np.arange(len(y)), y].astype(np.float64)).mean()
        assert (loss, (outputs.argmax(1) == y).mean()) == pytest.approx(found.best.recalibrated, rel=1e-3)
    [row] = [r for r in found.rows if r["seed"] == found.best.task.seed]
    assert found.best.before == (row["test_log_loss"], row["test_accuracy"])


def test_the_command_makes_the_same_comparison_and_finds_its_runs(found):
    page = html.unescape((found.out / "report.html").read_text())
    words = shlex.split(page[page.index('id="command">') + 13 :].split("</pre>")[0])
    given = cli._parser().parse_args(words[1:])
    assert (given.model, given.arm, given.steps, given.seeds) == ("keras:dense", ["everywhere"], 12, 2)
    with pytest.raises(OutputError, match=r'model "keras:dense" there, "mlp" here'):
        bn.compare("digits", arms=["everywhere"], out=found.out, **SMALL | {"model": "mlp"})


def test_other_versions_and_backends_are_not_mixed_in(found, monkeypatch):
    monkeypatch.setattr(keras, "__version__", "9.9")
    with pytest.raises(OutputError, match=r'keras "3.* there, "9.9" here'):
        bn.compare("digits", arms=["everywhere"], out=found.out, **SMALL)


def test_images_with_channels_and_the_cnn_to_the_end(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(100, 30, (60, 3, 8, 6)).astype(np.float32), np.arange(60) % 3
    x[:, 1] += 60 * y[:, None, None]
    done = bn.compare((x, y), model="keras:cnn", arms=["before"], out=tmp_path / "o", **ONE)
    assert done.best.deployed.network.input_shape == (None, 8, 6, 3)
    assert [line.split(" ", 1)[0] for line in done.best.deployed.folded] == [
        "batch_normalization",
        "batch_normalization_1",
    ]
    assert done.best.onnx["norms"] == 0
    assert "bn.compare((x, y), model='keras:cnn'" in html.unescape((tmp_path / "o" / "report.html").read_text())


def test_the_cnn_needs_images():
    with pytest.raises(OptionError, match=r"keras:cnn needs images of at least 4×4 pixels.* rows of shape \(7,\)"):
        built("none", "cnn", x=np.ones((4, 7), np.float32))


# -- deployment ----------------------------------------------------------------------------------------------------


def _shifted(model, example):
    done = fold(model, example)
    bias = done.model.layers[-1].bias
    bias.assign(bias + 1e-2)
    return done


def test_a_fold_that_changes_the_outputs_is_undone(monkeypatch):
    x = channels_last(DIGITS.x[:80])
    network = built()
    before = [as_array(v.value).copy() for v in network.variables]
    monkeypatch.setattr(deploying, "fold", _shifted)
    deployed = deploying.deploy(network, x, x)
    assert deployed.folded == ()
    assert "folding was undone: logits differed by" in deployed.kept[0]
    assert "BatchNormalization" in kinds(deployed.network)
    assert all(np.array_equal(old, as_array(v.value)) for old, v in zip(before, network.variables, strict=True))


def test_norms_of_each_row_are_kept_with_the_reason():
    x = channels_last(DIGITS.x[:80])
    deployed = deploying.deploy(built("layer"), x, x)
    assert [line.split(":")[0] for line in deployed.kept] == [
        "layer_normalization (LayerNormalization)",
        "layer_normalization_1 (LayerNormalization)",
    ]
    assert "standardize (BatchNormalization) forward into dense" in deployed.folded


def test_a_file_that_computes_something_else_is_not_left_behind(monkeypatch, tmp_path):
    x = channels_last(DIGITS.x[:80])
    deployed = deploying.deploy(built("none"), x, x)
    monkeypatch.setattr(deploying.files, "load", lambda path: built("none", seed=1).finished())
    with pytest.raises(bn.BatchNormError, match=r"model\.keras must agree within"):
        deploying.save(deployed, tmp_path / "best", x)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_that_can_not_be_written_is_said(monkeypatch, tmp_path):
    x = channels_last(DIGITS.x[:80])
    deployed = deploying.deploy(built("none"), x, x)

    def fails(model, path):
        path.write_text("half")
        raise ImportError("needs a converter")

    monkeypatch.setattr(deploying, "_export", fails)
    saved = deploying.save(deployed, tmp_path / "best", x)
    assert saved.files == ("model.keras",)
    assert saved.left_out.endswith("on the backend torch here: needs a converter.")
    assert [f.name for f in (tmp_path / "best").iterdir()] == ["model.keras"]


# -- softmax -------------------------------------------------------------------------------------------------------

HEADS = {
    "fused": keras.layers.Dense(3, activation="softmax"),
    "layer": lambda x: keras.layers.Softmax()(keras.layers.Dense(3)(x)),
    "activation": lambda x: keras.layers.Activation("softmax")(keras.layers.Dense(3)(x)),
    "operation": lambda x: keras.ops.softmax(keras.layers.Dense(3)(x)),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_softmax_is_taken_off_and_put_back(head):
    start = keras.Input((4,))
    model = keras.Model(start, HEADS[head](start))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = logits_of(model, x)
    with bare(model) as without:
        logits = logits_of(without, x)
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), expected, rtol=1e-5)
    assert not np.allclose(logits.sum(1), 1)
    np.testing.assert_array_equal(logits_of(model, x), expected)
    shorter, put_back = take_off(model)
    np.testing.assert_allclose(logits_of(shorter, x), logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits_of(put_back(shorter), x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "last", [keras.layers.Dense(3), keras.layers.Dense(3, activation="sigmoid"), keras.layers.Softmax(axis=0)]
)
def test_what_is_no_softmax_over_classes_stays(last):
    model = keras.Sequential([keras.Input((3,)), last])
    assert take_off(model) == (model, None)


# -- networks of one's own -----------------------------------------------------------------------------------------

OWN = """
import keras
from keras import layers
from batchnorm.lab.keras import hidden

def narrow(shape, classes, arm):
    return keras.Sequential([layers.Flatten(), *hidden(arm, layers.Dense(8, use_bias=arm.linear_bias)), layers.Dense(classes)])

def functional(shape, classes, arm):
    x = start = keras.Input(shape)
    for layer in [layers.Flatten(), *hidden(arm, layers.Dense(8)), layers.Dropout(0.2), layers.Dense(classes)]:
        x = layer(x)
    x = layers.Softmax()(x)
    return keras.Model(start, x)

class Own(keras.Model):
    def __init__(self, classes, softmax):
        super().__init__()
        self.flat, self.norm = layers.Flatten(), layers.BatchNormalization()
        self.out, self.softmax = layers.Dense(classes), softmax
    def call(self, x, training=False):
        y = self.out(self.norm(self.flat(x), training=training))
        return keras.ops.softmax(y) if self.softmax else y

def opaque(shape, classes, arm): return Own(classes, False)
def hides(shape, classes, arm): return Own(classes, True)
def breaks(shape, classes, arm): raise RuntimeError("no such width")
def wrong(shape, classes, arm): return 3
def few(shape, classes, arm): return keras.Sequential([layers.Flatten(), layers.Dense(classes - 1)])
def misfit(shape, classes, arm): return keras.Sequential([keras.Input((3,)), layers.Dense(classes)])
def two(shape, classes, arm):
    start = keras.Input(shape)
    return keras.Model(start, [layers.Flatten()(start), layers.Flatten()(start)])
def zero(): return None
"""


@pytest.fixture
def own(elsewhere):
    (elsewhere / "own.py").write_text(OWN)
    return elsewhere


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("model", "last", "folded"),
    [("narrow", "Dense", 2), ("functional", "Softmax", 2), ("opaque", "Own", 0)],
)
def test_a_network_of_ones_own_to_the_end(model, last, folded, tmp_path):
    done = bn.compare("digits", model=f"keras:own:{model}", arms=["after"], out=tmp_path / "out", **ONE)
    deployed = done.best.deployed
    assert kinds(deployed.network)[-1] == last
    assert len(deployed.folded) == folded
    if model == "opaque":
        assert "folding was undone: the layer own of class Own must be copied" in deployed.kept[0]
        assert done.best.left_out.startswith("model.keras is left out, only the weights are saved: ")
        assert (tmp_path / "out" / "best" / "model.weights.h5").is_file()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["identity"]["model source"]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("own:breaks", "keras:own:breaks.*arm='none'.* must return a model of Keras, but raised RuntimeError: no such"),
        ("own:wrong", "keras:own:wrong must return a keras.Model, it returned a int"),
        ("own:zero", r"keras:own:zero must take the arguments \(shape, classes, arm\)"),
        ("own:few", r"one logit or probability for each class, \(16, 10\), got \(16, 9\)"),
        ("own:two", r"one logit or probability for each class, \(16, 10\), got list"),
        ("own:hides", "keras:own:hides must end in a softmax that can be seen, or return logits"),
        ("own:misfit", r"keras:own:misfit with arm 'none' must .*rows of shape \(8, 8, 1\)"),
        ("own:absent", "model 'keras:own:absent' can't be loaded"),
        ("absent:good", "model 'keras:absent:good' can't be loaded: No module named 'absent'"),
        ("vgg", "unknown model 'keras:vgg': choose from keras:dense, keras:cnn, or name your own as keras:package"),
        ("", "unknown model 'keras:': choose from keras:dense"),
    ],
)
def test_a_wrong_model_is_named_before_anything_is_written(model, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        bn.compare("digits", model=f"keras:{model}", arms=["none"], out=tmp_path / "out", **ONE)
    assert not (tmp_path / "out").exists()


# -- Keras itself --------------------------------------------------------------------------------------------------


def test_networks_of_torch_are_compared_without_keras(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    assert bn.compare("digits", arms=["none"], **ONE).best.deployed.folded


def test_without_keras_it_is_said_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("batchnorm.keras", "batchnorm.lab.keras"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'keras'.*pip install 'batchnorm\[keras\]'"):
        bn.compare("digits", model="keras:dense", arms=["none"], **ONE)


def test_a_backend_that_can_not_train_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(
        OptionError, match="must run on a backend that trains, one of jax, tensorflow, torch, got numpy"
    ):
        FRAMEWORK.check("keras:dense", DIGITS, ARMS["none"], DIGITS.x[:16])


def test_processes_get_the_backend():
    assert FRAMEWORK.environment() == {"KERAS_BACKEND": "torch"}


def test_hidden_gives_every_activation_its_name():
    for activation in ("relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"):
        fused, _ = hidden(Arm("a", norm="batch", place="after", activation=activation), keras.layers.Dense(4))
        assert fused.activation is keras.activations.get(activation)
