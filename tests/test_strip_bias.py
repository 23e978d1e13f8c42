"""`strip_bias`: the same outputs, gradients and training without the bias, or the bias stays and the reason is said."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import batchnorm as bn
from batchnorm import torch as ours
from batchnorm.errors import OptionError

EXACT = 1e-12


def trained(model):
    """Put statistics, weights and biases that are not 0 and 1 into a model, in float64."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.double().state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(noise.abs() + 0.5 if name.endswith(("running_var", "spread")) else noise)
    return model


def outputs(model, *inputs):
    with torch.no_grad():
        found = model.eval()(*inputs)
    return found if isinstance(found, tuple) else (found,)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= EXACT * b.abs().max()


def steps(model, x, count=5):
    """Return what five steps of gradient descent leave behind; the upstream gradients are random."""
    generator = torch.Generator().manual_seed(2)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)
    seen = []
    for _ in range(count):
        noisy = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        y = model(noisy)
        y = torch.cat([v.reshape(-1) for v in y]) if isinstance(y, tuple) else y
        optimizer.zero_grad()
        y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
        optimizer.step()
        seen.append(y.detach())
    return seen


def norm_means(model):
    kinds = nn.modules.batchnorm._BatchNorm
    return {name: m.running_mean.clone() for name, m in model.named_modules() if isinstance(m, kinds)}


class Shaped(nn.Module):
    """A linear layer behind two reshapes and a transpose."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.linear(x.reshape(-1, 5)).reshape(len(x), 3, 2, 4)
        return torch.relu(self.norm(y.permute(0, 3, 1, 2)))


class Joined(nn.Module):
    """Two branches into one normalization."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8 if join is cat else 4)
        self.join = join

    def forward(self, x):
        return torch.relu(self.norm(self.join(self.a(x), self.b(x))))


def cat(a, b):
    return torch.cat([a, b], 1)


class SharedLayer(nn.Module):
    """One convolution, read by two normalizations at two calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.conv(torch.relu(self.one(self.conv(x)))))


class TwoReaders(nn.Module):
    """One value, read by two normalizations."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.one(y), torch.tanh(self.two(y))


class CalledTwice(nn.Module):
    """The same convolution and normalization, twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        for _ in range(2):
            x = torch.relu(self.norm(self.conv(x)))
        return x


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


WORKING = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), (6, 5)),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh()), (4, 3, 9)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=2), nn.BatchNorm2d(4), nn.Tanh()), (4, 3, 9, 8)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2, dilation=2), nn.BatchNorm3d(3), nn.Tanh()), (3, 2, 5, 4, 5)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Tanh()), (4, 4, 5, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        (4, 3, 4, 4),
    ),
    "two in a row": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Sigmoid()
        ),
        (3, 3, 7, 7),
    ),
    "padding by copies": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReflectionPad2d(1), nn.BatchNorm2d(4), nn.Tanh()),
        (3, 3, 6, 6),
    ),
    "a convolution that reflects": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.Tanh()),
        (3, 3, 6, 6),
    ),
    "average pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Tanh()),
        (4, 3, 8, 8),
    ),
    "maximum pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        (4, 3, 8, 8),
    ),
    "global pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Tanh()),
        (8, 3, 6, 6),
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.Tanh()),
        (8, 3, 4, 4),
    ),
    "no dropping": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0), nn.BatchNorm1d(4), nn.Tanh()), (6, 5)),
    "without γ and β": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()), (6, 5)),
    "cumulative average": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh()), (6, 5)),
    "reshape and transpose": (Shaped, (5, 3, 2, 5)),
    "concatenation": (lambda: Joined(cat), (4, 3, 6, 6)),
    "sum": (lambda: Joined(torch.add), (4, 3, 6, 6)),
    "shared convolution": (SharedLayer, (4, 3, 6, 6)),
    "two readers": (TwoReaders, (4, 3, 6, 6)),
    "both called twice": (CalledTwice, (4, 3, 6, 6)),
    "our layer": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ours.BatchNorm2d(4), nn.Tanh()), (4, 3, 6, 6)),
    "our layer with an option": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ours.BatchNorm2d(4, activation="relu"), nn.Tanh()),
        (4, 3, 6, 6),
    ),
}
every_working = pytest.mark.parametrize(("make", "shape"), WORKING.values(), ids=WORKING)


def biases(model):
    layers = nn.Linear | nn.modules.conv._ConvNd
    return {name: module.bias for name, module in model.named_modules() if isinstance(module, layers)}


@every_working
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_computes_the_same_without_the_bias(make, shape, training):
    model, x = trained(make()).train(training), image(*shape)
    state = copy.deepcopy(model.state_dict())
    result = bn.strip_bias(model, x)
    assert result.stripped
    assert result.kept == ()
    assert all(biases(result.model)[s.layer] is None for s in result.stripped)
    assert all(a.training == training for a in result.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    less = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in result.model.parameters())
    assert less == sum(s.parameters for s in result.stripped) > 0
    assert_same(outputs(result.model, x), outputs(model, x))
    assert_same(outputs(result.model, 3 * x - 1), outputs(model, 3 * x - 1))
    assert float(result.error) <= EXACT


@every_working
def test_training_goes_on_as_it_would_have(make, shape):
    model, x = trained(make()), image(*shape)
    first = {name: bias.detach().clone() for name, bias in biases(model).items() if bias is not None}
    result = bn.strip_bias(model.train(), x)
    stripped = result.model
    shift = {name: a - norm_means(stripped)[name] for name, a in norm_means(model).items()}
    expected, got = steps(model, x), steps(stripped, x)
    assert all((a - b).abs().max() <= 1e-9 for a, b in zip(got, expected, strict=True))
    left = dict(model.named_parameters())
    for name, parameter in stripped.named_parameters():
        assert (parameter - left[name]).abs().max() <= 1e-9, name
    for name, mean in norm_means(stripped).items():
        assert (norm_means(model)[name] - mean - shift[name]).abs().max() <= 1e-9, name
    # a bias that normalization takes out has no gradient, but for rounding
    assert all((biases(model)[s.layer] - first[s.layer]).abs().max() <= 1e-9 for s in result.stripped)
    for a, b in zip(outputs(stripped, x), outputs(model, x), strict=True):
        assert (a - b).abs().max() <= 1e-9


def test_the_running_mean_moves_by_exactly_the_bias():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before, norm = copy.deepcopy(model), bn.strip_bias(model, image(2, 3, 5, 5)).model[1]
    assert torch.equal(norm.running_mean, before[1].running_mean - before[0].bias)
    for name in ("running_var", "weight", "bias", "num_batches_tracked"):
        assert torch.equal(getattr(norm, name), getattr(before[1], name))


def test_two_branches_that_are_added_move_the_mean_by_both_biases():
    model = trained(Joined(torch.add)).eval()
    norm = bn.strip_bias(model, image(2, 3, 5, 5)).model.norm
    expected = model.norm.running_mean - model.a.bias - model.b.bias
    assert (norm.running_mean - expected).abs().max() <= 1e-15 * expected.abs().max() * 4


def test_a_value_that_is_added_to_itself_counts_twice():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.linear(x)
            return self.norm(y + y)

    model, x = trained(Doubled()).eval(), image(5, 3)
    stripped = bn.strip_bias(model, x)
    assert stripped.stripped
    assert_same(outputs(stripped.model, x), outputs(model, x))


def test_a_norm_without_statistics_takes_it_in_too():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))).eval()
    x = image(4, 3, 6, 6)
    result = bn.strip_bias(model, x)
    assert [s.into for s in result.stripped] == [("1",)]
    assert_same(outputs(result.model, x), outputs(model, x))


def test_a_norm_that_was_never_trained_is_right_after_its_first_steps_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(), image(8, 3)
    stripped = bn.strip_bias(model, x).model
    expected, got = steps(model, x), steps(stripped, x)
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(got, expected, strict=True))
    assert (outputs(stripped, x)[0] - outputs(model, x)[0]).abs().max() <= 1e-12


# --- what stays ---------------------------------------------------------------------------------------------


class UsedElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + torch.tanh(y)


class Returned(UsedElsewhere):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


class TwoBiases(nn.Module):
    """A shared normalization behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.a(x)) + torch.tanh(self.norm(self.b(x)))


class OneBias(TwoBiases):
    """A shared normalization behind a convolution with a bias and one without."""

    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(3, 4, 3, bias=False)


class TwoShifts(UsedElsewhere):
    """A normalization that is called twice, once after the bias and once after twice the bias."""

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), self.norm(y + y)


class Functional(nn.Module):
    """Statistics of its own, under names of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.center, self.spread = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.ones(4))

    def forward(self, x):
        return F.batch_norm(self.conv(x), self.center, self.spread, training=self.training)


class ReadsBias(UsedElsewhere):
    def forward(self, x):
        return self.norm(self.conv(x)), 2 * self.conv.bias


class OnlySomeChannels(UsedElsewhere):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(torch.cat([y[:, :2], y[:, 2:]], 1))


class InPlace(UsedElsewhere):
    def forward(self, x):
        return self.norm(self.conv(x).add_(1).relu_())


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(look)
    return model


def look(module, args, result):
    """Look at an output, and leave it."""


def tied_weights():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 3))
    model[3].bias = model[0].bias
    return model


def parametrized():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    return model


KEPT = {
    "used elsewhere": (UsedElsewhere, ["conv"], "tanh"),
    "returned": (Returned, ["conv"], "output of the model"),
    "norm of two biases": (TwoBiases, ["a", "b"], "norm normalizes the output of other layers too"),
    "norm of one bias": (OneBias, ["a"], "norm normalizes the output of other layers too"),
    "two shifts": (TwoShifts, ["conv"], "each time after another bias"),
    "functional": (Functional, ["conv"], "not a layer of its own"),
    "bias is read": (ReadsBias, ["conv"], "reads them too"),
    "hook": (hooked, ["0"], "hook"),
    "tied": (tied_weights, ["0"], "one tensor: untie them first"),
    "parametrized": (parametrized, ["0"], "parametriz"),
    "another axis": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(16, 4), nn.BatchNorm1d(4)), None, ""),
    "debias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ours.BatchNorm2d(4, debias=True)), ["0"], "debias"),
    "domains": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), ours.BatchNorm2d(4, domains=["a", "b"])), ["0"], "1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "layers", "reason"), KEPT.values(), ids=KEPT)
def test_a_bias_that_must_stay_stays_and_the_reason_is_said(make, layers, reason):
    torch.manual_seed(0)
    model, x = trained(make()).eval(), image(2, 3, 6, 6)
    result = bn.strip_bias(model, x)
    if layers is None:
        layers = [k.layer for k in result.kept]
    assert result.stripped == ()
    assert [k.layer for k in result.kept] == layers
    assert all(reason in k.reason and k.became == "unchanged" for k in result.kept)
    assert_same(outputs(result.model, x), outputs(model, x))
    assert list(result.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_a_bias_of_zeros_stays_where_another_would(training):
    between = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5)).train(training)
    nn.init.zeros_(between[0].bias)
    found = bn.strip_bias(between, torch.randn(8, 6))
    assert not found.stripped
    assert found.model[0].bias is not None
    directly = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).train(training)
    nn.init.zeros_(directly[0].bias)
    assert [s.layer for s in bn.strip_bias(directly, torch.randn(8, 6)).stripped] == ["0"]


def test_a_norm_that_is_frozen_while_the_model_trains_needs_the_bias():
    """The gradient of a bias is zero only where the norm subtracts the mean of the batch."""
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())).train()
    model[1].eval()
    x = image(2, 3, 6, 6)
    model(x).backward(image(2, 4, 4, 4))
    assert model[0].bias.grad.abs().max() > 1e-3
    result = bn.strip_bias(model, x)
    assert result.stripped == ()
    assert [k.layer for k in result.kept] == ["0"]


def test_dropout_that_drops_keeps_the_bias_in_training():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4))).train()
    assert bn.strip_bias(model, image(2, 3, 6, 6)).stripped == ()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, padding=1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 4])),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    ],
    ids=lambda m: "-".join(type(layer).__name__ for layer in m),
)
def test_a_bias_that_no_norm_subtracts_is_not_touched(model):
    x = image(2, 3, 6, 6)
    result = bn.strip_bias(trained(model).eval(), x)
    assert result.stripped == ()
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert_same(outputs(result.model, x), outputs(model, x))


def test_one_bias_goes_and_another_stays():
    model = trained(nn.Sequential(UsedElsewhere(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))).eval()
    result = bn.strip_bias(model, image(2, 3, 8, 8))
    assert [s.layer for s in result.stripped] == ["1"]
    assert [k.layer for k in result.kept] == ["0.conv"]
    said = str(result)
    assert "1" in said
    assert "without bias" in said
    assert "into 2" in said
    assert "5 parameters less in 1 layers" in said
    assert "float64, random inputs" in said


# --- what is the user's -------------------------------------------------------------------------------------


def test_modes_gradients_and_random_numbers_are_left_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[4].eval()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes, torch_state, numpy_state = (
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        np.random.get_state(),
    )
    state = copy.deepcopy(model.state_dict())
    result = bn.strip_bias(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == modes == [m.training for m in result.model.modules()]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert result.model is not model
    ours_, theirs = ({p.data_ptr() for p in m.parameters()} for m in (result.model, model))
    assert not ours_ & theirs


def test_in_place_the_model_itself_changes_and_its_tensors_stay_the_same_objects():
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())).eval(), image(2, 3, 6, 6)
    expected, weight, mean = outputs(model, x), model[0].weight, model[1].running_mean
    before = mean.clone()
    result = bn.strip_bias(model, x, inplace=True)
    assert result.model is model
    assert model[0].bias is None
    assert model[0].weight is weight
    assert model[1].running_mean is mean
    assert not torch.equal(mean, before)
    assert_same(outputs(model, x), expected)


def test_a_stripped_model_is_stripped_already():
    x = image(2, 3, 6, 6)
    once = bn.strip_bias(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval(), x).model
    assert bn.strip_bias(once, x).stripped == ()


@pytest.mark.parametrize("training", [False, True])
def test_a_state_dict_loads_into_a_network_that_was_built_without_biases(training):
    def build(bias):
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.Tanh()).double()

    model, x = trained(build(True)).train(training), image(2, 3, 6, 6)
    fresh = build(False)
    fresh.load_state_dict(bn.strip_bias(model, x).model.state_dict())
    assert_same(outputs(fresh, x), outputs(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_keep_theirs(dtype):
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())).to(dtype).eval()
    result = bn.strip_bias(model, image(6, 5).to(dtype))
    assert result.stripped
    assert {t.dtype for t in result.model.state_dict().values() if t.is_floating_point()} == {dtype}


def test_a_model_without_an_example_is_refused():
    with pytest.raises(OptionError, match="must be given an example input"):
        bn.strip_bias(nn.Linear(2, 2))


# --- ONNX ---------------------------------------------------------------------------------------------------


def onnx_model(gemm=False):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4) if gemm else (4, 3, 3, 3))
    tensors = {"w": weight, "c": rng.normal(size=4)}
    tensors |= {name: rng.normal(size=4) for name in ("gamma", "beta", "mean")} | {"var": rng.uniform(0.5, 2, 4)}
    nodes = [
        helper.make_node("Gemm" if gemm else "Conv", ["x", "w", "c"], ["y"], name="linear"),
        helper.make_node("BatchNormalization", ["y", "gamma", "beta", "mean", "var"], ["z"], name="norm"),
        helper.make_node("Tanh", ["z"], ["out"]),
    ]
    shape = [2, 3] if gemm else [2, 3, 6, 6]
    held = [numpy_helper.from_array(np.asarray(v, np.float64), name) for name, v in tensors.items()]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.DOUBLE, shape)],
        [helper.make_tensor_value_info("out", TensorProto.DOUBLE, [2, 4] if gemm else [2, 4, 4, 4])], held,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), shape


@pytest.mark.parametrize("gemm", [False, True], ids=["Conv", "Gemm"])
def test_an_onnx_model_loses_the_bias_and_computes_the_same(gemm):
    model, shape = onnx_model(gemm)
    before = model.SerializeToString()
    x = np.random.default_rng(1).normal(size=shape)
    result = bn.strip_bias(model)
    assert [s.parameters for s in result.stripped] == [4]
    assert model.SerializeToString() == before
    onnx.checker.check_model(result.model)
    (expected,), (got,) = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (model, result.model))
    assert np.abs(got - expected).max() <= EXACT * np.abs(expected).max()
    count = [sum(numpy_helper.to_array(t).size for t in m.graph.initializer) for m in (model, result.model)]
    assert count[0] - count[1] == 4
