"""Watching a training: the numbers are those of each batch, and the training is the same to the bit."""

import copy
import io
import json
import random
import sys

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import batchnorm.keras
from batchnorm import torch as bnt
from batchnorm.errors import MissingDependencyError, OptionError

keras_ok = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class Net(nn.Module):
    def __init__(self, kind=nn):
        super().__init__()
        self.conv, self.one, self.drop = nn.Conv2d(3, 6, 3), kind.BatchNorm2d(6), nn.Dropout(0.5)
        self.head, self.two = nn.Linear(6, 4), kind.BatchNorm1d(4)

    def forward(self, x):
        x = self.drop(F.relu(self.one(self.conv(x))))
        return self.two(self.head(x.mean((2, 3))))


def net(kind=nn):
    torch.manual_seed(0)
    return Net(kind).train()


def train(model, steps=5, optimizer=None, call=None):
    """Train, and return everything that could have become different."""
    torch.manual_seed(1)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = (call or model)(torch.randn(8, 3, 6, 6))
        y.square().mean().backward()
        found += [y.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
    return [*found, *(v.clone() for v in model.state_dict().values()), torch.get_rng_state()]


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
def test_the_training_is_the_same_to_the_bit(kind):
    expected = train(net(kind))
    model = net(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    numbers = np.random.get_state()[1].tolist(), random.getstate()
    with bnt.Monitor(model, every=2, optimizer=optimizer) as monitor:
        found = train(model, optimizer=optimizer)
        assert list(model.state_dict()) == list(net(kind).state_dict())
    assert_same(found, expected)
    assert numbers == (np.random.get_state()[1].tolist(), random.getstate())
    assert [record["step"] for record in monitor.history] == [0, 2, 4]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_numbers_are_those_of_the_batch():
    model = net()
    nn.init.normal_(model.one.weight)
    nn.init.normal_(model.one.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    x = torch.randn(8, 3, 6, 6)
    seen = model.conv(x).detach().double()
    flat = seen.movedim(1, 0).flatten(1).numpy()
    m, v = model.one.running_mean.double().numpy().copy(), model.one.running_var.double().numpy().copy()
    with bnt.Monitor(model, every=1, optimizer=optimizer) as monitor:
        model(x).square().mean().backward()
        w, g = (t.detach().double().clone() for t in (model.conv.weight, model.conv.weight.grad))
        optimizer.step()
    one, eps = monitor.history[0]["layers"]["one"], model.one.eps
    own = flat.var(1, ddof=1) + eps
    kl = 0.5 * (np.log((v + eps) / own) + (own + (flat.mean(1) - m) ** 2) / (v + eps) - 1)
    assert one["distance"] == pytest.approx(kl.mean(), rel=1e-5)
    gamma, beta = (t.detach().double().numpy()[:, None] for t in (model.one.weight, model.one.bias))
    # the optimizer has moved them since
    gamma, beta = (
        t + 0.25 * p.grad.double().numpy()[:, None] for t, p in ((gamma, model.one.weight), (beta, model.one.bias))
    )
    y = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + eps) * gamma + beta
    assert one["off"] == (y <= 0).all(1).mean()
    assert one["saturated"] == pytest.approx((np.abs(y) > 3).mean(), abs=1e-3)
    assert one["gamma"] == pytest.approx(np.abs(gamma).mean(), rel=1e-6)
    assert (one["dead"], one["values"]) == (0.0, 128)
    weights = monitor.history[0]["weights"]
    assert list(weights) == ["conv", "head"]
    assert weights["conv"]["effective_rate"] == pytest.approx(0.25 / float((w**2).sum()), rel=1e-6)
    assert weights["conv"]["gradient"] == pytest.approx(float(g.norm() / w.norm()), rel=1e-6)
    json.dumps(monitor.to_dict())


def test_evaluation_is_no_step_and_frozen_layers_are_observed():
    model = net()
    model.one.eval()
    with bnt.Monitor(model, every=2) as monitor:
        for _ in range(3):
            model.train()(torch.randn(4, 3, 6, 6))
            model.eval()(torch.randn(4, 3, 6, 6))
            model.train().one.eval()
    assert [record["step"] for record in monitor.history] == [0, 2]
    assert list(monitor.history[1]["layers"]) == ["one", "two"]


def test_an_error_in_the_training_leaves_the_model_as_it_was():
    model, monitors = net(), []

    def fail():
        with bnt.Monitor(model, every=1) as monitor:
            monitors.append(monitor)
            model(torch.randn(4, 3, 6, 6))
            model(torch.randn(4, 2, 6, 6))

    with pytest.raises(RuntimeError, match="channels"):
        fail()
    (monitor,) = monitors
    assert [record["step"] for record in monitor.history] == [0]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_none_and_stop_nothing(bad):
    model, x = net(), torch.randn(4, 3, 6, 6)
    x[0, 0, 0, 0] = bad
    with bnt.Monitor(model, every=1) as monitor:
        model(x)
    assert monitor.history[0]["layers"]["one"]["distance"] is None
    json.dumps(monitor.to_dict(), allow_nan=False)


def test_a_compiled_model_is_observed_in_eager_steps_and_compiled_in_others():
    model = net()
    compiled, runs = [], []

    def backend(graph, _):
        compiled.append(graph)

        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    fast = torch.compile(model, backend=backend)
    with bnt.Monitor(fast, every=3) as monitor:
        for _ in range(6):
            fast(torch.randn(8, 3, 6, 6))
    assert [record["step"] for record in monitor.history] == [0, 3]
    assert len(monitor.history[0]["layers"]) == 2
    assert len(compiled) == 1
    assert len(runs) == 4
    torch._dynamo.reset()
    model.compile(backend=backend)
    with pytest.raises(OptionError, match="compiled in place"), bnt.Monitor(model):
        pass


def test_compiled_parts_are_observed_too():
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(torch.compile(part, backend="eager"), nn.ReLU())
    with bnt.Monitor(model, every=2) as monitor:
        for _ in range(3):
            model(torch.randn(4, 3, 6, 6))
    torch._dynamo.reset()
    assert [len(record["layers"]) for record in monitor.history] == [1, 1]
    assert part[1].num_batches_tracked == 3


def test_copies_of_a_model_are_not_observed_and_can_be_made_and_saved():
    model = net()
    with bnt.Monitor(model, every=1) as monitor:
        twin = copy.deepcopy(model)
        twin(torch.randn(4, 3, 6, 6))
        assert monitor.history == []
        kept = io.BytesIO()
        torch.save(model, kept)
        kept.seek(0)
        torch.load(kept, weights_only=False)(torch.randn(4, 3, 6, 6))
        assert monitor.history == []
        model(torch.randn(4, 3, 6, 6))
        assert len(monitor.history) == 1


def test_masks_count_as_in_the_layer():
    layer, x, mask = bnt.BatchNorm1d(3), torch.randn(6, 3, 4), torch.rand(6, 4) < 0.5
    with bnt.Monitor(layer, every=1) as monitor:
        layer(x, mask=mask)
    (numbers,) = monitor.history[0]["layers"].values()
    values = x.movedim(1, -1)[mask].double().numpy()
    own, var = values.var(0, ddof=1) + layer.eps, 1 + layer.eps
    kl = 0.5 * (np.log(var / own) + (own + values.mean(0) ** 2) / var - 1)
    assert numbers["distance"] == pytest.approx(kl.mean(), rel=1e-5)
    assert (numbers["values"], numbers["off"], numbers["saturated"]) == (len(values), None, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bnt.Monitor("net"), "must be a torch.nn.Module, got a str"),
        (lambda: bnt.Monitor(net(), every=0), "every must be a whole number of steps"),
        (lambda: bnt.Monitor(net(), every=2.5), "every must be a whole number of steps"),
        (lambda: bnt.Monitor(net(), optimizer="sgd"), "optimizer must be"),
        (lambda: batchnorm.keras.Monitor(every=True), "every must be a whole number of steps"),
    ],
)
def test_bad_options_are_told(make, words):
    with pytest.raises(OptionError, match=words):
        make()


@pytest.mark.parametrize("make", [lambda folder: bnt.Monitor(net(), folder), batchnorm.keras.Monitor])
def test_without_the_writer_it_says_what_to_install(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingDependencyError, match=r"batchnorm\[monitor\]"):
        make(tmp_path)


def read(folder):
    """Read event files back, by TensorBoard's own reader."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = events.EventAccumulator(str(folder), size_guidance={events.HISTOGRAMS: 0, events.SCALARS: 0})
    return found.Reload()


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with bnt.Monitor(model, tmp_path, every=2, optimizer=optimizer) as monitor:
        train(model, optimizer=optimizer)
    found = read(tmp_path)
    names = {
        f"{what}/{layer}"
        for what in ("distance", "dead", "off", "saturated", "gamma", "values")
        for layer in ("one", "two")
    }
    names |= {f"{what}/{layer}" for what in ("effective_rate", "gradient") for layer in ("conv", "head")}
    assert set(found.Tags()["scalars"]) == names
    kinds = ("gamma_of_channels", "beta_of_channels", "running_mean", "running_variance", "input")
    assert set(found.Tags()["histograms"]) == {f"{what}/{layer}" for what in kinds for layer in ("one", "two")}
    told = found.Scalars("distance/one")
    assert [event.step for event in told] == [0, 2, 4]
    kept = [record["layers"]["one"]["distance"] for record in monitor.history]
    np.testing.assert_allclose([event.value for event in told], kept, rtol=1e-6)
    histogram = found.Histograms("input/one")[0].histogram_value
    assert histogram.num == 8 * 6 * 4 * 4
    assert len(list(tmp_path.iterdir())) == 1


# -- Keras -------------------------------------------------------------------------------------------------------------


def keras_model(momentum=0.9):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, name="dense"), layers.BatchNormalization(momentum=momentum, name="norm")]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def keras_data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((24, 5)).astype(np.float32), rng.standard_normal((24, 4)).astype(np.float32)


@keras_ok
def test_a_dead_channel_is_seen_in_keras_and_written(tmp_path):
    model = keras_model(momentum=0.99)
    x, y = keras_data()
    kernel, bias = model.get_layer("dense").get_weights()
    kernel[:, 2] = 0.0
    model.get_layer("dense").set_weights([kernel, bias])
    monitor = batchnorm.keras.Monitor(every=1)
    model.fit(x, y, batch_size=24, epochs=1, verbose=0, callbacks=[monitor])
    assert monitor.history[0]["layers"]["norm"]["dead"] == 0.25
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    monitor = batchnorm.keras.Monitor(tmp_path, every=1)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[monitor])
    read_back = read(tmp_path)
    assert set(read_back.Tags()["scalars"]) == {"distance/norm", "dead/norm", "gamma/norm", "effective_rate/dense"}
    assert [event.step for event in read_back.Scalars("dead/norm")] == [0, 1, 2]


@keras_ok
def test_several_batches_at_once_are_refused():
    model = keras_model()
    model.compile(keras.optimizers.SGD(0.1), "mse", steps_per_execution=2)
    monitor = batchnorm.keras.Monitor()
    monitor.set_model(model)
    with pytest.raises(OptionError, match="steps_per_execution must be 1"):
        monitor.on_train_begin()
