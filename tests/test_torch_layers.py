"""One contract for the three layers: whatever torch's own layer does, ours does too."""

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from batchnorm import torch as bn
from oracle import assert_near


class Pair(NamedTuple):
    """A layer, torch's layer of the same name, and the shape of an input of three channels."""

    ours: type[nn.Module]
    torchs: type[nn.Module]
    shape: tuple[int, ...]

    def both(self, **options):
        """Return one of each, with the same weights and statistics, none of them at its initial value."""
        ours, torchs = self.ours(3, **options), self.torchs(3, **options)
        with torch.no_grad():
            for v in [*ours.parameters(), ours.running_mean, ours.running_var]:
                if v is not None:
                    v.copy_(torch.rand_like(v) + 0.5)
        torchs.load_state_dict(ours.state_dict())
        return ours, torchs


PAIRS = {
    "BatchNorm1d": Pair(bn.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    "BatchNorm1d of sequences": Pair(bn.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    "BatchNorm2d": Pair(bn.BatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    "BatchNorm3d": Pair(bn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 4)),
}
OPTIONS = {
    "default": {},
    "eps and momentum": {"eps": 0.1, "momentum": 0.3},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no tracking": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "float64": {"dtype": torch.float64},
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def step(layer, x, dy):
    """Return output, input gradient, parameter gradients and statistics after one step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def assert_same(ours, torchs):
    """Hold ours to a few units in the last place of torch's: both may sum in another order."""
    for got, expected in zip(ours, torchs, strict=True):
        assert got.dtype == expected.dtype
        if got.dtype.is_floating_point:
            assert_near(got.detach(), expected.detach(), ulps=16)
        else:
            assert torch.equal(got, expected)


@every_pair
@every_option
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_outputs_gradients_and_statistics_are_those_of_torch(pair, options, training):
    ours, torchs = (layer.train(training) for layer in pair.both(**options))
    # the second step tells a cumulative average from a moving one
    for _ in range(2):
        dtype = options.get("dtype", torch.float32)
        x, dy = torch.randn(pair.shape, dtype=dtype) * 2 + 3, torch.randn(pair.shape, dtype=dtype)
        assert_same(step(ours, x, dy), step(torchs, x, dy))


@every_pair
def test_frozen_parameters_get_no_gradient(pair):
    ours, torchs = (layer.requires_grad_(False) for layer in pair.both())
    x, dy = torch.randn(pair.shape), torch.randn(pair.shape)
    for layer in (ours, torchs):
        step(layer, x, dy)
        assert [p.grad for p in layer.parameters()] == [None, None]


@every_pair
@every_option
def test_a_layer_is_an_instance_of_torchs_and_loads_its_checkpoints_both_ways(pair, options):
    ours, torchs = pair.ours(3, **options), pair.torchs(3, **options)
    assert isinstance(ours, pair.torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for source, target in [pair.both(**options), pair.both(**options)[::-1]]:
        fresh = type(target)(3, **options)
        assert str(fresh.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same(fresh.state_dict().values(), source.state_dict().values())


@every_pair
def test_a_checkpoint_is_loaded_as_weights_only(pair):
    ours, torchs = pair.both()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    torchs.load_state_dict(torch.load(file, weights_only=True))


@every_pair
@every_option
def test_repr_is_that_of_torch(pair, options):
    assert repr(pair.ours(3, **options)) == repr(pair.torchs(3, **options))


@every_pair
@every_option
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_equal_and_independent(pair, options, copied):
    layer, _ = pair.both(**options)
    twin = copied(layer)
    assert type(twin) is pair.ours
    assert repr(twin) == repr(layer)
    x, dtype = torch.randn(pair.shape), options.get("dtype", torch.float32)
    before = {name: v.clone() for name, v in layer.state_dict().items()}
    y = twin(x.to(dtype))
    assert all(torch.equal(v, before[name]) for name, v in layer.state_dict().items())
    assert torch.equal(y, layer(x.to(dtype)))


@every_pair
@every_option
def test_the_meta_device_gives_shapes_without_numbers(pair, options):
    options = {"device": "meta"} | options
    # a cumulative average needs the number of batches, which has no value there, in torch neither
    training = options.get("momentum", 0.1) is not None
    ours, torchs = (layer(3, **options).train(training) for layer in (pair.ours, pair.torchs))
    x = torch.empty(pair.shape, device="meta", dtype=options.get("dtype"))
    assert ours(x).shape == torchs(x).shape == pair.shape
    assert ours(x).is_meta
    assert {name: v.device.type for name, v in ours.state_dict().items()} == dict.fromkeys(torchs.state_dict(), "meta")


@every_pair
def test_materialized_from_meta_a_layer_is_like_new(pair):
    layer = pair.ours(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_same(layer.state_dict().values(), pair.torchs(3).state_dict().values())


def raised(layer, x):
    """Return type and text of what a call raises."""
    try:
        layer(x)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *(("BatchNorm1d", rank) for rank in (1, 4, 5)),
        *(("BatchNorm2d", rank) for rank in (1, 2, 3, 5)),
        *(("BatchNorm3d", rank) for rank in (1, 3, 4, 6)),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_input_of_another_rank_raises_as_in_torch(name, rank, training):
    ours, torchs = (layer.train(training) for layer in PAIRS[name].both())
    x = torch.zeros((4, 3, 2, 2, 2, 2)[:rank])
    assert raised(ours, x) == raised(torchs, x)
    assert raised(ours, x)[0] is ValueError


@every_pair
def test_another_number_of_channels_raises_as_in_torch(pair):
    ours, torchs = pair.both()
    x = torch.zeros((4, 7, *pair.shape[2:]))
    assert raised(ours, x)[0] is raised(torchs, x)[0]


@every_pair
@every_option
def test_a_single_value_a_channel_raises_as_in_torch_and_changes_no_statistic(pair, options):
    ours, torchs = pair.both(**options)
    x = torch.zeros((1, 3, *[1] * (len(pair.shape) - 2)), dtype=options.get("dtype"))
    statistics = [v.clone() for name, v in ours.named_buffers() if name != "num_batches_tracked"]
    assert raised(ours, x)[0] is raised(torchs, x)[0] is ValueError
    after = [v for name, v in ours.named_buffers() if name != "num_batches_tracked"]
    assert all(torch.equal(a, b) for a, b in zip(after, statistics, strict=True))


@every_pair
def test_a_single_value_a_channel_is_fine_in_evaluation(pair):
    ours, torchs = (layer.eval() for layer in pair.both())
    x = torch.randn((1, 3, *[1] * (len(pair.shape) - 2)))
    assert_same([ours(x)], [torchs(x)])
