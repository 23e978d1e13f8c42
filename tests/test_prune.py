"""`prune`: a smaller network that computes the same; or the channel stays and the reason is said."""

import copy

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import batchnorm as bn
from batchnorm import torch as ours
from batchnorm.errors import BatchNormError, OptionError

EXACT = 1e-12


def trained(model, **zero):
    """Put random numbers into a model, in float64 and evaluation; γ is 0 in the channels ``zero`` of a layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.double().state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                # no γ is small by itself
                noise = noise.abs() + 0.5 if name.endswith("running_var") or noise.ndim == 1 else noise
                tensor.copy_(noise)
        for layer, channels in zero.items():
            model.get_submodule(layer.strip("_")).weight[channels] = 0
    return model.eval()


def image(*shape):
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_same(model, pruned, *inputs):
    with torch.no_grad():
        got, expected = pruned(*inputs), model(*inputs)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a - b).abs().max() <= EXACT * b.abs().max()


def count(model):
    return sum(p.numel() for p in model.parameters())


def gone(result):
    return {p.layer: p.channels for p in result.pruned}


def assert_sizes_are_told(model):
    """Hold the attributes of each layer to its weight."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)
        elif isinstance(m, nn.modules.conv._ConvNd):
            outer, inner = (m.in_channels, m.out_channels) if m.transposed else (m.out_channels, m.in_channels)
            assert m.weight.shape[:2] == (outer, inner // m.groups)
            assert m.in_channels % m.groups == m.out_channels % m.groups == 0
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            vectors = (m.weight, m.bias, m.running_mean, m.running_var)
            assert {len(v) for v in vectors if v is not None} == {m.num_features}
        if getattr(m, "bias", None) is not None and not isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert len(m.bias) == getattr(m, "out_channels", None) or len(m.bias) == getattr(m, "out_features", None)


def seq(*layers):
    return nn.Sequential(*layers)


class Branches(nn.Module):
    """Two branches that a convolution reads together."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.read = nn.Conv2d(9, 2, 1)

    def forward(self, x):
        return self.read(torch.relu(torch.cat([self.na(self.a(x)), self.nb(self.b(x))], 1)))


class TwoReaders(nn.Module):
    """One value behind two paths."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.p, self.q = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.p(torch.sigmoid(y)), self.q(torch.relu(y))


class Transposed(nn.Module):
    """From channels second to channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).permute(0, 2, 3, 1))


def depthwise(multiplier=1, bias=True):
    n = 6 * multiplier
    return seq(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, n, 3, groups=6, bias=bias), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 1),
    )  # fmt: skip


def block(norm=nn.BatchNorm2d, **options):
    return seq(nn.Conv2d(3, 6, 3, **options), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3))


# model, channels whose γ is zero, shape of the input, what must be gone
WORKING = {
    "block": (block, {"_1": [0, 4]}, (), {"1": (0, 4)}),
    "without bias": (lambda: block(bias=False), {"_1": [0, 4]}, (), {"1": (0, 4)}),
    "reader without bias": (
        lambda: seq(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, bias=False)), {"_1": [2]}, (), {"1": (2,)}
    ),
    "all but one": (block, {"_1": [0, 1, 2, 4, 5]}, (), {"1": (0, 1, 2, 4, 5)}),
    "1d": (
        lambda: seq(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ELU(), nn.Conv1d(5, 4, 3)), {"_1": [1]}, (2, 3, 9), {"1": (1,)}
    ),
    "3d": (
        lambda: seq(nn.Conv3d(2, 5, 2), nn.BatchNorm3d(5), nn.SiLU(), nn.Conv3d(5, 4, 2)),
        {"_1": [1, 2]}, (2, 2, 4, 5, 4), {"1": (1, 2)},
    ),
    "linear": (
        lambda: seq(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3)), {"_1": [0, 3]}, (4, 8), {"1": (0, 3)}
    ),
    "strides and dilations": (
        lambda: seq(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 2, dilation=2)),
        {"_1": [5]}, (), {"1": (5,)},
    ),
    "depthwise": (depthwise, {"_1": [1, 2], "_4": [2, 5]}, (), {"1": (1, 2, 5), "4": (1, 2, 5)}),
    "depthwise without bias": (lambda: depthwise(bias=False), {"_1": [3]}, (), {"1": (3,), "4": (3,)}),
    "depthwise with two outputs each": (lambda: depthwise(2), {"_1": [1]}, (), {"1": (1,), "4": (2, 3)}),
    "depthwise before the norm": (
        lambda: seq(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
        {"_3": [1]}, (), {"3": (1,)},
    ),
    "two norms, other channels": (
        lambda: seq(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        {"_1": [1, 2], "_2": [2, 3]}, (), {"1": (1, 2, 3), "2": (1, 2, 3)},
    ),
    "two blocks": (
        lambda: seq(block(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        {"_0.1": [1], "_1": [0, 3]}, (), {"0.1": (1,), "1": (0, 3)},
    ),
    "flatten": (
        lambda: seq(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        ),
        {"_1": [0, 2]}, (), {"1": (0, 2)},
    ),
    "global pooling": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        {"_1": [3]}, (), {"1": (3,)},
    ),
    "maximum pooling": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2, padding=1), nn.Conv2d(4, 2, 1)),
        {"_1": [3]}, (), {"1": (3,)},
    ),
    "padding with copies": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReplicationPad2d(1), nn.Conv2d(4, 2, 3)),
        {"_1": [3]}, (), {"1": (3,)},
    ),
    "transposed": (
        lambda: seq(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        {"_1": [1, 3]}, (), {"1": (1, 3)},
    ),
    "concatenation": (Branches, {"na": [0, 1], "nb": [4]}, (), {"na": (0, 1), "nb": (4,)}),
    "two readers": (TwoReaders, {"norm": [1, 2]}, (), {"norm": (1, 2)}),
    "channels last": (Transposed, {"norm": [1]}, (), {"norm": (1,)}),
    "our layer": (lambda: block(ours.BatchNorm2d), {"_1": [1]}, (), {"1": (1,)}),
    "dropout": (
        lambda: seq(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)), {"_1": [0]}, (4, 8), {"1": (0,)}
    ),
}  # fmt: skip
every_working = pytest.mark.parametrize(("make", "zero", "shape", "expected"), WORKING.values(), ids=WORKING)


@every_working
def test_what_is_left_computes_the_same(make, zero, shape, expected):
    model, x = trained(make(), **zero), image(*shape)
    state = copy.deepcopy(model.state_dict())
    result = bn.prune(model, x)
    assert gone(result) == expected
    assert result.kept == ()
    assert result.approximation == 0
    assert float(result.error) <= EXACT
    assert_same(model, result.model, x)
    assert_same(model, result.model, 2 * x - 1)
    assert_sizes_are_told(result.model)
    assert count(result.model) < count(model)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


@every_working
def test_in_place_is_the_same(make, zero, shape, expected):
    model, x = trained(make(), **zero), image(*shape)
    original = copy.deepcopy(model)
    result = bn.prune(model, x, inplace=True)
    assert result.model is model
    assert_same(original, model, x)
    assert_sizes_are_told(model)


def test_a_state_dict_loads_into_a_network_that_was_built_smaller():
    def build(a, b, c):
        return seq(
            nn.Conv2d(3, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, a, 3, groups=a), nn.BatchNorm2d(a), nn.ReLU(),
            nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * b, c),
        ).double().eval()  # fmt: skip

    model = trained(build(8, 6, 3), _1=[0, 5], _4=[1], _7=[2, 3])
    pruned = bn.prune(model, image()).model
    fresh = build(5, 4, 3)
    fresh.load_state_dict(pruned.state_dict())
    assert_same(model, fresh, image())
    assert repr(pruned) == repr(fresh)
    assert count(pruned) == count(fresh)


def test_a_pruned_network_goes_on_training():
    pruned = bn.prune(trained(depthwise(), _1=[1, 2]), image()).model.train()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.01)
    pruned(image()).backward(torch.randn(2, 4, 6, 6, dtype=torch.float64))
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())
    assert pruned[1].num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_keep_theirs(dtype):
    model = trained(
        seq(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False)), _1=[1]
    )
    result = bn.prune(model.to(dtype), image().to(dtype))
    assert gone(result) == {"1": (1,)}
    assert {p.dtype for p in result.model.parameters()} == {dtype}


# --- thresholds ---------------------------------------------------------------------------------------------


def test_a_threshold_takes_small_channels_and_says_what_that_does():
    model, x = trained(block()), image()
    with torch.no_grad():
        model[1].weight[:3] = torch.tensor([0.01, -0.02, 0.05])
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed[1].weight[:2] = 0
    result = bn.prune(model, x, threshold=0.02)
    assert gone(result) == {"1": (0, 1)}
    assert_same(zeroed, result.model, x)
    with torch.no_grad():
        expected, got = model(x), result.model(x)
    difference = float((got - expected).abs().max() / expected.abs().max())
    assert 0 < difference < 0.1
    assert result.approximation == pytest.approx(difference, rel=1e-6)
    assert float(result.error) <= EXACT
    assert "2 channels pruned, approximation" in str(result)
    assert "2 of 6 channels gone" in str(result)


def test_small_channels_of_two_norms_in_a_row_count_as_zero_in_both():
    model, x = trained(depthwise()), image()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for net, value in ((model, 0.01), (zeroed, 0.0)):
            net[1].weight[[1, 2]] = value
            net[4].weight[[2, 4]] = -value
    result = bn.prune(model, x, threshold=0.1)
    assert gone(result) == {"1": (1, 2, 4), "4": (1, 2, 4)}
    assert_same(zeroed, result.model, x)


def test_a_small_channel_that_goes_with_the_one_it_is_computed_from_counts_as_zero():
    model, x = trained(depthwise(2)), image()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for net, value in ((model, 0.01), (zeroed, 0.0)):
            net[1].weight[1] = value
            net[4].weight[2] = -value
    result = bn.prune(model, x, threshold=0.1)
    assert gone(result) == {"1": (1,), "4": (2, 3)}
    assert_same(zeroed, result.model, x)


def test_channels_that_stay_keep_their_small_gammas():
    model, x = trained(block()), image()
    with torch.no_grad():
        model[1].weight[:] = 0.01
    result = bn.prune(model, x, threshold=0.1)
    assert len(gone(result)["1"]) == 5
    assert result.model[1].weight.item() == pytest.approx(0.01, rel=1e-12)
    with torch.no_grad():
        expected, got = model(x), result.model(x)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    assert result.approximation == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("threshold", [-1, -1e-9, float("nan")])
def test_a_threshold_below_zero_is_refused(threshold):
    with pytest.raises(OptionError, match="threshold must be 0 or positive, got"):
        bn.prune(block().eval(), torch.randn(2, 3, 8, 8), threshold=threshold)


def test_a_channel_at_the_threshold_goes_and_one_above_stays():
    model = trained(block())
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([0.25, 0.2500001])
    assert gone(bn.prune(model, image(), threshold=0.25)) == {"1": (0,)}


# --- padding ------------------------------------------------------------------------------------------------


def padded(*between):
    return seq(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), *between, nn.Conv2d(6, 4, 3, padding=1))


def test_beside_zeros_of_padding_only_a_channel_that_is_zero_goes():
    model = trained(padded(nn.ReLU()), _1=[0, 1, 2, 3])
    with torch.no_grad():
        model[1].bias[:4] = torch.tensor([0.5, 0.0, -0.5, -1e-300])
    result = bn.prune(model, image())
    assert gone(result) == {"1": (1, 2, 3)}
    assert [(k.layer, k.became) for k in result.kept] == [("1", "1 of 4 small channels kept")]
    assert "3 pads with zeros beside the constant 0.5" in result.kept[0].reason
    assert_same(model, result.model, image())


@pytest.mark.parametrize(
    "make",
    [
        padded,
        lambda: padded(nn.Sigmoid()),
        lambda: seq(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3)),
        lambda: seq(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AvgPool2d(3, padding=1), nn.Conv2d(6, 4, 1)),
        lambda: seq(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 3, stride=2)),
    ],
    ids=["convolution", "behind a sigmoid", "padding", "average", "transposed"],
)
def test_a_constant_beside_zeros_stays(make):
    model = trained(make(), _1=[0])
    result = bn.prune(model, image())
    assert result.pruned == ()
    assert [k.layer for k in result.kept] == ["1"]
    assert_same(model, result.model, image())


# --- what stays ---------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.read(torch.relu(x + self.norm(self.conv(x))))


class SharedReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.read(torch.relu(self.read(self.norm(self.conv(x)))))


class AlsoRead(TwoReaders):
    """What the norm reads is an output too."""

    def forward(self, x):
        y = self.conv(x)
        return self.p(self.norm(y)), y


class ReadBefore(TwoReaders):
    """What the norm reads is read by a convolution too."""

    def forward(self, x):
        y = self.conv(x)
        return self.p(self.norm(y)), self.q(y)


class Sliced(TwoReaders):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.p(torch.cat([y[:, 2:], y[:, :2]], 1))


class Shuffled(TwoReaders):
    def forward(self, x):
        y = self.norm(self.conv(x))
        n, c, h, w = y.shape
        return self.p(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class HardCoded(nn.Module):
    """Knows the sizes of its layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).view(-1, 144))


def hooked():
    model = block()
    model[2].register_forward_hook(look)
    return model


def look(module, args, result):
    """Look at an output, and leave it."""


def tied():
    model = seq(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1))
    model[5].weight = model[3].weight
    return model


KEPT = {
    "residual": (Residual, "norm", "can't do without the channel"),
    "output": (lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "1", "its output may not change"),
    "output behind an activation": (lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "1", "may not change"),
    "first": (lambda: seq(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), "0", "nothing of the model computes its input"),
    "grouped reader": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2)), "1", "2 is a grouped convolution"
    ),
    "grouped writer": (
        lambda: seq(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
        "2", "1 is a grouped convolution",
    ),
    "several channels from one": (
        lambda: seq(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), "2", "several"
    ),
    "shared reader": (SharedReader, "norm", "called several times"),
    "input is an output": (AlsoRead, "norm", "its input"),
    "input is read by another": (ReadBefore, "norm", "its input is used in another place too"),
    "sliced": (Sliced, "norm", "can't do without the channel"),
    "shuffled": (Shuffled, "norm", ""),
    "hard-coded sizes": (HardCoded, "norm", "wants the number of channels as it is"),
    "hook": (hooked, "1", "hook"),
    "tied": (tied, "1", "3 "),
    "softmax": (lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softmax(1), nn.Conv2d(4, 2, 1)), "1", "can't do"),
    "another norm": (lambda: seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)), "1", "can't"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "layer", "reason"), KEPT.values(), ids=KEPT)
def test_a_channel_that_must_stay_stays_and_the_reason_is_said(make, layer, reason):
    torch.manual_seed(0)
    model = make()
    x = image()
    trained(model, **{f"_{layer}" if layer.isdigit() else layer: [1]})
    result = bn.prune(model, x)
    assert result.pruned == ()
    assert [k.layer for k in result.kept] == [layer]
    assert reason in result.kept[0].reason
    assert result.kept[0].became == "1 of 1 small channels kept"
    assert count(result.model) == count(model)
    assert_same(model, result.model, x)


def test_a_norm_in_training_keeps_its_channels():
    model = trained(block(), _1=[1]).train()
    result = bn.prune(model, image())
    assert result.pruned == ()
    assert "statistics of the batch" in result.kept[0].reason
    assert all(m.training for m in model.modules())


def test_when_all_are_zero_one_channel_is_left():
    model = trained(block(), _1=list(range(6)))
    result = bn.prune(model, image())
    assert len(gone(result)["1"]) == 5
    assert "would have no channel left" in result.kept[0].reason
    assert result.kept[0].became == "1 of 6 small channels kept"
    assert_same(model, result.model, image())


def test_a_channel_that_went_with_another_is_not_told_to_be_kept():
    """Channel 2 of the second norm is cut with channel 1 of the first, which computes it."""
    result = bn.prune(trained(depthwise(2), _1=[1], _4=[2]), image())
    assert gone(result) == {"1": (1,), "4": (2, 3)}
    assert result.kept == ()


def test_a_model_without_small_channels_stays_as_it_is():
    model = trained(block())
    result = bn.prune(model, image())
    assert result.pruned == result.kept == ()
    assert_same(model, result.model, image())
    assert "0 channels pruned" in str(result)


class AsksForSizes(TwoReaders):
    """Divides by the number of channels."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.p(y) / self.conv.out_channels


def test_a_model_that_computes_with_its_sizes_never_comes_back_wrong():
    model, x = trained(AsksForSizes(), norm=[1]), image()
    before = copy.deepcopy(model.state_dict())
    try:
        result = bn.prune(model, x, inplace=True)
    except BatchNormError:
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    else:
        assert result.pruned == ()


def test_an_exported_program_keeps_its_channels_and_says_why():
    program = torch.export.export(trained(block(), _1=[1]), (image(),))
    result = bn.prune(program)
    assert result.pruned == ()
    assert len(result.kept) == 1


def test_an_onnx_model_is_either_smaller_or_keeps_its_channels():
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": (6, 3, 3, 3), "g": (6,), "b": (6,), "m": (6,), "v": (6,), "w2": (4, 6, 1, 1)}
    arrays = {name: torch.randn(shape, generator=generator).abs().numpy() + 0.1 for name, shape in tensors.items()}
    arrays["g"][[1, 4]] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node("BatchNormalization", ["y", "g", "b", "m", "v"], ["z"], name="norm"),
        helper.make_node("Conv", ["z", "w2"], ["out"], name="read"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6, 6])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 4, 4, 4])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = bn.prune(model)
    onnx.checker.check_model(result.model)
    assert len(result.pruned) + len(result.kept) == 1
    assert float(result.error) <= EXACT
