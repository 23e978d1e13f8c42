"""`sync` and `unsync` on models in one process: which layers change, what stays, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import fold
from batchnorm import torch as bn
from batchnorm.errors import BatchNormWarning, DistributedError, OptionError, ShapeError

SHAPES = {"BatchNorm1d": (6, 3), "BatchNorm2d": (4, 3, 5, 2), "BatchNorm3d": (2, 3, 3, 2, 4)}


@pytest.fixture
def group_of_one(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def prepared(layer):
    with torch.no_grad():
        for v in [*layer.parameters(), layer.running_mean, layer.running_var]:
            v.copy_(torch.rand_like(v) + 0.5)
    return layer


@pytest.mark.parametrize("options", [{}, {"activation": "silu", "virtual_batch_size": 2}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_group_of_one_changes_no_number(group_of_one, name, options):
    plain = prepared(getattr(bn, name)(3, **options))
    synced = bn.sync(copy.deepcopy(plain))
    results = []
    for layer in (plain, synced):
        x = (torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1)) + 2).requires_grad_()
        y = layer(x)
        (y**3).sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_training_without_a_group_says_what_to_call():
    model = bn.sync(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(DistributedError, match=r"layer '1'.*torchrun.*init_process_group.*unsync\(model\)"):
        model(torch.randn(4, 3))


def test_shapes_are_computed_without_a_group():
    layer = bn.sync(bn.BatchNorm1d(3, device="meta"))
    assert layer(torch.empty(5, 3, device="meta")).shape == (5, 3)


def test_a_synchronized_model_is_folded():
    model = bn.sync(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.SyncBatchNorm(3))
    )
    for layer in (model[1], model[4]):
        prepared(layer)
    folded = fold(model.eval(), torch.randn(2, 3, 4, 4))
    assert not [m for m in folded.model[:3].modules() if isinstance(m, _BatchNorm)]


def test_evaluation_and_frozen_layers_need_no_group():
    model = bn.sync(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    x = torch.randn(4, 3)
    frozen = bn.freeze(copy.deepcopy(model)).train()
    assert torch.equal(frozen(x), model.eval()(x))
    untracked = bn.sync(bn.BatchNorm1d(3, track_running_stats=False)).eval()
    assert torch.equal(untracked(x), bn.BatchNorm1d(3, track_running_stats=False)(x))


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_stays_the_same_object_with_everything_it_has(name):
    layer = getattr(nn, name)(3, eps=0.1, momentum=0.3)
    layer.weight.requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = (list(layer.state_dict()), list(layer.parameters()), list(layer.buffers()))
    model = nn.Sequential(layer)
    assert bn.sync(model) is model
    assert model[0] is layer
    assert type(layer) is getattr(bn, name)
    assert (layer.eps, layer.momentum, layer.weight.requires_grad) == (0.1, 0.3, False)
    after = (list(layer.state_dict()), list(layer.parameters()), list(layer.buffers()))
    assert after[0] == before[0]
    assert all(a is b for i in (1, 2) for a, b in zip(before[i], after[i], strict=True))
    assert "process_group='default'" in repr(layer)
    layer.eval()(torch.randn(SHAPES[name]))
    assert calls == [1]
    assert bn.unsync(model) is model
    assert layer.options.changed() == {}
    assert type(bn.revert(model)[0]) is getattr(nn, name)
    assert set(vars(layer)) == set(vars(getattr(nn, name)(3)))


def test_a_synchronized_layer_is_not_reverted_by_the_way():
    model = bn.sync(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(OptionError, match=r"layer '0' is synchronized.*unsync\(model\) first"):
        bn.revert(model)


def test_options_and_synchronization_do_not_disturb_each_other():
    layer = bn.sync(bn.BatchNorm2d(3, activation="relu"))
    bn.convert(layer, on_single="skip")
    assert list(layer.options.changed()) == ["activation", "on_single", "process_group"]
    assert list(bn.unsync(layer).options.changed()) == ["activation", "on_single"]
    assert bn.BatchNorm2d(3, process_group="default").options == bn.sync(bn.BatchNorm2d(3)).options


@pytest.mark.parametrize("wrong", [3.5, [0, 1], object(), nn.Linear(1, 1)], ids=lambda v: type(v).__name__)
def test_something_that_is_no_group_is_refused(wrong):
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(OptionError, match="process_group must be None, 'default', a ProcessGroup or a DeviceMesh"):
        bn.sync(model, wrong)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_misspelt_word_is_refused():
    with pytest.raises(OptionError, match="got 'world'"):
        bn.BatchNorm1d(3, process_group="world")


def test_copies_and_pickles_are_synchronized_too(group_of_one):
    layer = bn.sync(bn.BatchNorm1d(3))
    layer(torch.randn(4, 3))
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.options == layer.options
        assert torch.equal(other.running_mean, layer.running_mean)
    assert bn.BatchNorm1d(3, process_group=group_of_one).options == layer.options


class Any(nn.Module):
    """A model whose layers of torch's own are called in no order that could be read off it."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b, self.c, self.d = nn.Conv2d(3, 3, 1), *(nn.SyncBatchNorm(3) for _ in range(4))

    def forward(self, x):
        x = self.a(self.conv(x))
        y = self.b(x.flatten(2))
        return self.c(y) + self.c(y.mean(2))[..., None]


def kinds(model):
    return [type(m).__name__ for m in model.modules() if isinstance(m, _BatchNorm)]


def test_an_example_tells_the_dimensions_of_torchs_synchronized_layers():
    model = Any()
    modes = [m.training for m in model.modules()]
    bn.sync(model, example=torch.randn(2, 3, 4, 4))
    # c is 1d in both calls, d is not called
    assert kinds(model) == ["BatchNorm2d", "BatchNorm1d", "BatchNorm1d", "BatchNormAny"]
    assert [m.training for m in model.modules()] == modes
    assert not model.a._forward_pre_hooks
    assert model.a.num_batches_tracked == 0


def test_without_an_example_only_what_is_certain_is_concluded():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.SyncBatchNorm(3),
        nn.ReLU(),
        nn.SyncBatchNorm(3),
        nn.ConvTranspose1d(3, 3, 1),
        nn.SyncBatchNorm(3),
    )
    bn.sync(model)
    assert kinds(model) == ["BatchNorm2d", "BatchNormAny", "BatchNorm1d"]
    assert kinds(bn.sync(Any())) == ["BatchNormAny"] * 4


def test_a_layer_that_takes_any_dimension_normalizes_all_of_them():
    layer = bn.unsync(nn.SyncBatchNorm(3))
    for shape in [*SHAPES.values(), (4, 3, 5)]:
        x = torch.randn(shape)
        axes = [0, *range(2, x.ndim)]
        torch.testing.assert_close(layer(x).mean(axes), torch.zeros(3), atol=1e-6, rtol=0)
    with pytest.raises(ShapeError, match=r"expected at least 2D input \(got 1D input\)"):
        layer(torch.randn(3))
    with pytest.raises(OptionError, match="example"):
        bn.revert(layer)
    bn.unsync(layer, example=torch.randn(2, 3, 4))
    assert type(bn.revert(layer)) is nn.BatchNorm1d


def test_torchs_synchronized_layer_keeps_its_numbers_and_its_object():
    theirs = prepared(nn.SyncBatchNorm(3, eps=0.1, momentum=0.2))
    checkpoint, parameters = copy.deepcopy(theirs.state_dict()), list(theirs.parameters())
    model = nn.Sequential(nn.Conv2d(3, 3, 1), theirs)
    bn.unsync(model)
    assert model[1] is theirs
    assert (type(theirs), theirs.eps, theirs.momentum) == (bn.BatchNorm2d, 0.1, 0.2)
    assert all(a is b for a, b in zip(parameters, theirs.parameters(), strict=True))
    fresh = bn.sync(bn.BatchNorm2d(3))
    fresh.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(v, checkpoint[name]) for name, v in theirs.state_dict().items())
    back = bn.revert(model)[1]
    assert type(back) is nn.BatchNorm2d
    assert set(vars(back)) == set(vars(nn.BatchNorm2d(3)))
    nn.SyncBatchNorm(3).load_state_dict(fresh.state_dict(), strict=True)


class Own(nn.SyncBatchNorm):
    """A layer with a forward of its own."""

    def forward(self, x):
        return x


def test_a_subclass_of_torchs_synchronized_layer_is_left_with_a_warning():
    model = nn.Sequential(Own(3))
    with pytest.warns(BatchNormWarning, match="layer '0' is a Own"):
        bn.sync(model)
    assert type(model[0]) is Own


def test_a_mistake_in_the_example_changes_nothing():
    model = Any()
    with pytest.raises(RuntimeError):
        bn.sync(model, example=torch.randn(2, 7, 4, 4))
    assert kinds(model) == ["SyncBatchNorm"] * 4
    assert not model.a._forward_pre_hooks
