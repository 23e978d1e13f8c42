"""What reaches the layers of torch models, held against oracles of NumPy over all activations; and the model stays as it is."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import batchnorm as bn
from batchnorm import torch as bnt
from batchnorm.errors import BatchNormError, DataError, OptionError
from batchnorm.observed import divergence, outputs
from batchnorm.protocol import PIECE, piece


class Twice(nn.Module):
    """A layer that is called twice, dropout, dense and convolutional layers."""

    def __init__(self, kind=nn):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.shared = kind.BatchNorm2d(6)
        self.drop = nn.Dropout(0.9)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.last = kind.BatchNorm1d(5)

    def forward(self, x):
        x = self.drop(F.relu(self.shared(self.conv(x))))
        x = F.relu(self.shared(self.again(x)))
        return self.last(self.head(x.mean((2, 3))))


def network(kind=nn):
    torch.manual_seed(0)
    model = Twice(kind)
    for layer in (model.shared, model.last):
        for v in (layer.weight, layer.bias, layer.running_mean):
            nn.init.normal_(v)
        nn.init.uniform_(layer.running_var, 0.5, 3.0)
    return model


def images(sizes=(7, 1, 32), mean=0.0):
    torch.manual_seed(0)
    return [torch.randn(n, 3, 8, 8) + mean for n in sizes]


def seen_by(model, names=("shared", "last")):
    """Note what reaches layers from now on, by hooks that know nothing of the library."""
    seen = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().double().clone())
        )
    return seen


def columns(x):
    return x.movedim(1, 0).flatten(1).numpy()


def everything(model):
    return (
        {name: v.clone() for name, v in model.state_dict().items()},
        {name: id(v) for name, v in (*model.named_buffers(), *model.named_parameters())},
        {name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][name]) for name, v in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert before[4:] == after[4:]


def observe(model, data, **options):
    return bn.observe(model, data, progress=False, **options)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("use", ["batch", "running"])
def test_numbers_are_those_of_all_activations(kind, mean, use):
    model, data = network(kind), images(mean=mean)
    seen = seen_by(model)
    found = observe(model, data, use=use)
    assert [one.layer for one in found] == ["shared", "last"]
    assert (found.batches, found.samples, found.use, found.unreached) == (3, 40, use, ())
    for name, calls in (("shared", 2), ("last", 1)):
        one, layer = found[name], model.get_submodule(name)
        batches = [
            np.concatenate([columns(x) for x in seen[name][i : i + calls]], 1) for i in range(0, 3 * calls, calls)
        ]
        x = np.concatenate(batches, 1)
        exact = {"rtol": 1e-6, "atol": 1e-6 * x.std()}
        np.testing.assert_allclose(one.mean, x.mean(1), **exact)
        np.testing.assert_allclose(one.variance, x.var(1, ddof=1), rtol=1e-6)
        m, v = (t.double().numpy() for t in (layer.running_mean, layer.running_var))
        assert np.array_equal(one.stored_mean, m)
        assert np.array_equal(one.stored_variance, v)
        own = x.var(1, ddof=1) + layer.eps
        kl = 0.5 * (np.log((v + layer.eps) / own) + (own + (x.mean(1) - m) ** 2) / (v + layer.eps) - 1)
        np.testing.assert_allclose(one.kl, kl, rtol=1e-5)
        assert one.distance == pytest.approx(kl.mean(), rel=1e-5)
        within = sum(part.var(1) * part.shape[1] for part in batches)
        assert one.between == pytest.approx((1 - within / (x.var(1) * x.shape[1])).mean(), rel=1e-4, abs=1e-7)
        assert one.count == x.shape[1]
        assert one.values == min(columns(part).shape[1] for part in seen[name])
        assert (one.dead, one.unbiased, one.fixed) == (0.0, True, "")


def test_calls_are_kept_apart():
    model, data = network(), images((4, 8))
    seen = seen_by(model)
    one = observe(model, data)["shared"]
    assert len(one.calls) == 2
    for number, moments in enumerate(one.calls):
        x = np.concatenate([columns(part) for part in seen["shared"][number::2]], 1)
        assert moments.count == x.shape[1]
        np.testing.assert_allclose(moments.mean, x.mean(1), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(moments.variance, x.var(1), rtol=1e-6)
    assert abs(one.calls[0].mean - one.calls[1].mean).max() > 0.1


def test_running_is_what_evaluation_sees_and_batch_is_not():
    model, data = network(), images((8, 8))
    twin = copy.deepcopy(model).eval()
    seen = seen_by(twin)
    with torch.no_grad():
        for x in data:
            twin(x)
    x = np.concatenate([columns(part) for part in seen["last"]], 1)
    np.testing.assert_allclose(observe(model, data, use="running")["last"].mean, x.mean(1), rtol=1e-5, atol=1e-6)
    assert abs(observe(model, data)["last"].mean - x.mean(1)).max() > 0.01


def test_the_distance_of_equal_distributions_is_zero_and_grows_with_a_shift():
    model, data = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(500, 3)
    assert observe(model, data)["0"].distance > 1e-4
    bn.recalibrate(model, data, progress=False)
    assert observe(model, data)["0"].distance < 1e-12
    assert observe(model, data + 2)["0"].distance == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_constant_channel_has_a_finite_distance(eps):
    kl = divergence((np.zeros(2), np.zeros(2)), (np.zeros(2), np.array([0.0, 1.0])), eps)
    assert np.isfinite(kl).all()
    assert kl[0] == 0.0 < kl[1]


def test_dead_channels_are_those_that_never_move():
    x = torch.randn(64, 6, 4, 4)
    # zero, one number, a number with rounding, a small spread around a large mean, the smallest that counts
    x[:, 0], x[:, 1] = 0.0, 1.7
    x[:, 2] = 1e6
    x[3, 2, 1, 1] += 0.0625
    x[:, 3] = 1000 + 0.01 * x[:, 3]
    x[:, 4] *= 1e-20
    one = observe(nn.Sequential(nn.BatchNorm2d(6)), x)["0"]
    assert one.dead_channels.tolist() == [True, True, True, False, False, False]
    assert one.dead == 0.5


def test_variance_between_batches():
    x = torch.randn(8, 50, 2)
    shifted = x + torch.arange(8.0).view(8, 1, 1) * 5
    model = nn.Sequential(nn.BatchNorm1d(2))
    assert observe(model, list(shifted))["0"].between > 0.99
    assert observe(model, list(x))["0"].between < 0.05
    assert observe(model, [x.flatten(0, 1)])["0"].between == 0.0


# -- the piece of what came first --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(100, 7), (3, 5, 9), (32, 256, 56, 56), (8, 64, 112, 112), (2, 3, 1500, 900), (1, 2**19)]
)
def test_a_piece_is_small_and_evenly_spread(shape):
    parts = piece(shape)
    kept = [len(range(*part.indices(size))) for part, size in zip(parts, shape, strict=True)]
    assert np.prod(kept) <= PIECE
    assert kept[0] <= 64
    assert kept[1] >= min(shape[1], 16) or np.prod(kept[2:]) > PIECE // 16
    # the distance is known from the numbers of channels alone
    assert parts[1].step == -(-shape[1] // kept[1])
    if np.prod(shape) <= PIECE:
        assert kept == [min(64, shape[0]), *shape[1:]]


def test_inputs_are_a_piece_of_the_first_call_of_the_first_batch():
    model, data = network(), images((5, 9))
    seen = seen_by(model)
    found = observe(model, data)
    for name in ("shared", "last"):
        np.testing.assert_array_equal(found[name].inputs, seen[name][0].numpy())
        assert found[name].inputs.dtype == np.float32
    wide = nn.Sequential(nn.BatchNorm2d(40))
    x = torch.randn(70, 40, 30, 31)
    one = observe(wide, [x, x])["0"]
    n, kept = one.inputs.shape[:2]
    np.testing.assert_array_equal(one.inputs, x[:n, one.channels].numpy())
    assert (n, kept) == (17, 14) or one.inputs.size > PIECE // 2


def test_silent_channels_and_large_outputs():
    torch.manual_seed(0)
    x, layer = torch.randn(50, 4, 3), nn.BatchNorm1d(4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.01, -3.0, 0.0]))
        layer.bias.copy_(torch.tensor([0.0, -1.0, 0.5, 0.0]))
    y = layer(x).detach().double()
    gamma, beta = (v.detach().double().numpy() for v in (layer.weight, layer.bias))
    used = x.double().mean((0, 2)).numpy(), x.double().var((0, 2), correction=0).numpy()
    off, saturated = outputs(x.numpy(), used, gamma, beta, layer.eps)
    assert off == ((y <= 0).all(2).all(0)).double().mean().item() == 0.5
    assert saturated == pytest.approx((y.abs() > 3).double().mean().item(), abs=1e-9)
    found = observe(nn.Sequential(layer), [x])["0"]
    assert (found.off, found.saturated) == pytest.approx((off, saturated))
    np.testing.assert_array_equal(found.gamma, gamma)
    np.testing.assert_array_equal(found.beta, beta)
    # by what is stored, which is nowhere near
    layer.running_mean.fill_(100.0)
    assert observe(nn.Sequential(layer), [x], use="running")["0"].off == 0.75
    assert observe(nn.Sequential(layer), [x])["0"].off == 0.5


# -- kinds of layers ---------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.norm, self.after = layer, nn.BatchNorm2d(3)

    def forward(self, x):
        return self.after(self.norm(x))


class FrozenBatchNorm2d(nn.Module):
    """As detectors have it: buffers, and arithmetic of its own."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def evaluating(model):
    model.train().norm.eval()
    return model


FROZEN = {
    "in evaluation": lambda: evaluating(Frozen(nn.BatchNorm2d(3))),
    "ours in evaluation": lambda: evaluating(Frozen(bnt.BatchNorm2d(3))),
    "ours, for good": lambda: Frozen(bnt.freeze(bnt.BatchNorm2d(3))).train(),
    "a class of its own": lambda: Frozen(FrozenBatchNorm2d(3)),
}


@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_frozen_layers_are_measured_and_normalize_by_what_they_store(make):
    model, x = make(), torch.randn(20, 3, 5, 5) + 2
    model.norm.running_mean.fill_(1.0)
    model.norm.running_var.fill_(4.0)
    seen, before = seen_by(model, ("norm", "after")), everything(model)
    found = observe(model, [x])
    assert_same(before, everything(model))
    assert "frozen" in found["norm"].fixed
    assert found["after"].fixed == ""
    np.testing.assert_allclose(found["norm"].mean, columns(x.double()).mean(1), rtol=1e-6)
    assert found["norm"].count == 500
    assert len(found["norm"].calls) == 1
    np.testing.assert_allclose(found["norm"].inputs, x.numpy())
    np.testing.assert_allclose(seen["after"][0], (x.double() - 1) / (4 + 1e-5) ** 0.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["after"].mean, columns(seen["after"][0]).mean(1), rtol=1e-5)


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
@pytest.mark.parametrize("use", ["batch", "running"])
def test_layers_without_statistics_are_measured(kind, use):
    x = torch.randn(20, 3, 5, 5) + 2
    one = observe(nn.Sequential(kind.BatchNorm2d(3, track_running_stats=False)), [x, x], use=use)["0"]
    np.testing.assert_allclose(one.mean, columns(x.double()).mean(1), rtol=1e-6)
    assert (one.count, one.kl, one.distance, one.stored_mean, one.stored_variance) == (1000, None, None, None, None)
    assert one.inputs.shape == x.shape
    assert one.off == 0.0


@pytest.mark.parametrize("given", ["mask", "sample_weight"])
def test_masked_values_do_not_count(given):
    torch.manual_seed(0)
    layer, x = bnt.BatchNorm1d(3), torch.randn(6, 3, 4)
    mask = torch.rand(6, 4) < 0.5
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0])
    options = {"mask": mask, "sample_weight": weight}
    x[2] = float("nan") if given == "sample_weight" else x[2]
    found = observe(layer, [{"x": x, given: options[given]}])
    one = found["BatchNorm1d"]
    values = x.movedim(1, -1)[mask] if given == "mask" else x.movedim(1, -1)[weight > 0].flatten(0, 1)
    w = np.ones(len(values)) if given == "mask" else weight[weight > 0].repeat_interleave(4).numpy()
    assert one.count == w.sum()
    np.testing.assert_allclose(one.mean, (w @ values.double().numpy()) / w.sum(), rtol=1e-6)
    assert (one.inputs, one.off, one.saturated, one.channels.tolist()) == (None, None, None, [])
    json.dumps(found.to_dict())


def test_a_layer_whose_values_are_all_masked_is_not_reached():
    found = observe(bnt.BatchNorm1d(2), [{"x": torch.randn(3, 2, 4), "mask": torch.zeros(3, 4, dtype=torch.bool)}])
    assert (found.layers, found.unreached) == ((), ("BatchNorm1d",))


def test_a_single_value_has_no_distance():
    one = observe(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(1, 2)])["0"]
    assert (one.count, one.values, one.kl, one.distance, one.dead) == (1, 1, None, None, 0.0)


class ByHand(nn.Module):
    """Batch normalization as a function, with buffers under other names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("spread", torch.ones(3))

    def forward(self, x):
        return F.batch_norm(x, self.average, self.spread, training=self.training)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.unused = ByHand(), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x)


def test_functions_are_seen_and_layers_that_are_never_called_are_listed():
    x = torch.randn(50, 3) + 1
    found = observe(Model(), [x])
    assert (len(found), found.unreached) == (1, ("unused",))
    np.testing.assert_allclose(found["norm"].mean, x.double().mean(0), rtol=1e-6)
    np.testing.assert_array_equal(found["norm"].inputs, x)
    assert "norm" in found
    assert "unused" not in found


def test_a_program_is_observed():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 6, 6)
    program = torch.export.export(model, (x,))
    expected, found = observe(model, [x])["1"], observe(program, [x])
    (one,) = found
    np.testing.assert_allclose(one.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(one.kl, expected.kl, rtol=1e-6)
    np.testing.assert_array_equal(one.inputs, expected.inputs)
    with pytest.raises(OptionError, match="is not trained"):
        observe(program, [x], optimizer=torch.optim.SGD(model.parameters()))


class ChannelsLast(nn.Module):
    """Keeps statistics of the last axis, in a way of its own."""

    def __init__(self):
        super().__init__()
        for name, value in (("weight", 1.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((5,), value))

    def forward(self, *, hidden):
        return (hidden - self.running_mean) / self.running_var.sqrt() * self.weight


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.norm = ChannelsLast(), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.odd(hidden=x))


def test_statistics_of_something_else_are_left_alone():
    model, x = Odd(), torch.randn(8, 3, 5)
    found = observe(model, [x])
    assert ([one.layer for one in found], found.unreached) == (["norm"], ("odd",))
    with bnt.Monitor(model.train(), every=1) as monitor:
        model(x)
    assert list(monitor.history[0]["layers"]) == ["norm"]


# -- how fast weights turn ---------------------------------------------------------------------------------------------


class Paths(nn.Module):
    """Convolutions directly before a norm, before something that writes over their output, and before nothing."""

    def __init__(self):
        super().__init__()
        self.direct, self.changed, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.one(self.direct(x))
        return self.head(self.two(F.relu_(self.changed(x))).mean((2, 3)))


def test_effective_learning_rates_are_of_weights_directly_before_a_layer():
    model, x = Paths(), torch.randn(8, 3, 6, 6)
    model(x).square().sum().backward()
    groups = [{"params": [model.direct.weight], "lr": 0.5}, {"params": model.head.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    found = observe(model, [x], optimizer=optimizer)
    (rate,) = found.rates
    w, g = (v.detach().double().numpy() for v in (model.direct.weight, model.direct.weight.grad))
    assert (rate.layer, rate.norm, rate.learning_rate) == ("direct", "one", 0.5)
    assert rate.size == pytest.approx(np.sqrt((w**2).sum()), rel=1e-12)
    assert rate.effective == pytest.approx(0.5 / (w**2).sum(), rel=1e-12)
    assert rate.gradient == pytest.approx(np.sqrt((g**2).sum() / (w**2).sum()), rel=1e-12)
    assert [one.linear for one in found] == ["direct", ""]
    assert "lr/‖w‖²" in str(found)


def test_without_a_layer_that_is_seen_all_linear_layers_are_told():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    found = observe(model, [torch.randn(9, 3)], optimizer=torch.optim.Adam(model.parameters(), lr=1e-3))
    assert [(rate.layer, rate.norm, rate.gradient) for rate in found.rates] == [("0", "", None), ("4", "", None)]


@pytest.mark.parametrize("optimizer", ["sgd", 0.1, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)])
def test_an_optimizer_of_something_else_is_refused(optimizer):
    with pytest.raises(OptionError, match="optimizer must"):
        observe(network(), images(), optimizer=optimizer)


# -- nothing changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
@pytest.mark.parametrize("use", ["batch", "running"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was_to_the_bit(kind, use, training):
    model = network(kind).train(training)
    model.drop.train(not training)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = images()
    before = everything(model)
    observe(model, data, use=use, optimizer=optimizer)
    assert_same(before, everything(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model_is_observed_without_compiling(monkeypatch):
    model, data = network(), images((4,))
    expected = observe(model, data)
    found = observe(torch.compile(model, backend="eager"), data)
    assert [one.distance for one in found] == [one.distance for one in expected]


def failing():
    yield torch.randn(4, 3, 8, 8)
    raise RuntimeError("no more disk")


BAD = {
    "empty": (list, "at least one batch"),
    "used up": (lambda: iter(()), "at least one batch"),
    "wrong shape": (lambda: [torch.randn(4, 2, 8, 8)], "must take the batches"),
    "inf": (lambda: [torch.full((4, 3, 8, 8), float("inf"))], "layer 'shared' must be finite"),
    "NaN in the second batch": (lambda: [*images((4,)), torch.full((4, 3, 8, 8), float("nan"))], "must be finite"),
    "it fails": (failing, "failed after 1 of them: RuntimeError: no more disk"),
}


@pytest.mark.parametrize(("data", "words"), BAD.values(), ids=BAD)
def test_bad_data_is_told_and_the_model_is_as_it_was(data, words):
    model = network()
    given, before = data(), everything(model)
    with pytest.raises(DataError, match=words):
        observe(model, given)
    assert_same(before, everything(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use": "both"}, "use must be 'batch' or 'running', got 'both'"),
        ({"batches": 0}, "batches must be"),
        ({"samples": 1.5}, "samples must be"),
        ({"forward": 3}, "forward must be a function"),
    ],
)
def test_bad_options_are_told(options, words):
    with pytest.raises(OptionError, match=words):
        observe(network(), images(), **options)


def test_a_model_without_batch_normalization_is_refused():
    with pytest.raises(OptionError, match="must have batch normalization"):
        observe(nn.Linear(3, 3), [torch.randn(2, 3)])


# -- data and results --------------------------------------------------------------------------------------------------


def test_iterators_limits_and_calls_of_ones_own():
    model = network()
    found = observe(model, iter(images((4, 4, 4))), batches=2)
    assert (found.batches, found.samples) == (2, 8)
    assert observe(model, iter(images((4, 4, 4))), samples=5).samples == 8
    assert observe(model, torch.cat(images((130,)))).batches == 3
    pairs = [{"image": x} for x in images((4, 4))]
    by_name = observe(model, pairs, forward=lambda model, batch: model(batch["image"]))
    assert by_name["last"].distance == observe(model, images((4, 4)))["last"].distance


def test_it_prints_and_can_be_written_as_json():
    found = observe(network(), images(), optimizer=None)
    told = str(found)
    assert told.splitlines()[0].split()[:3] == ["Layer", "Values", "Distance"]
    assert told.endswith("40 samples in 3 batches, each normalized by its own statistics")
    read = json.loads(json.dumps(found.to_dict()))
    assert [one["layer"] for one in read["layers"]] == ["shared", "last"]
    assert read["layers"][0]["kl"] == pytest.approx(found["shared"].kl.tolist())
    assert read["layers"][0]["gamma_summary"]["near_zero"] == 0
    assert len(read["layers"][0]["calls"]) == 2
    with pytest.raises(BatchNormError, match="'drop' is not one of the layers: shared, last"):
        found["drop"]
