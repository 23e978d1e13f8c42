"""Models in one piece after an operation: convert, revert, freeze, parameter groups, and options that can't be."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from batchnorm import torch as bn
from batchnorm.errors import BatchNormWarning, OptionError
from oracle import assert_near

PAIRS = {
    "1d": (bn.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    "2d": (bn.BatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (bn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 4)),
}
every_pair = pytest.mark.parametrize(("ours", "torchs", "shape"), PAIRS.values(), ids=PAIRS)


class Block(nn.Module):
    """A part of a model with layers of its own, one of them given from outside."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), norm

    def forward(self, x):
        return self.norm(self.linear(x))


def network():
    """Return a nested model in which two parents share a layer, trained for a step."""
    torch.manual_seed(3)
    shared = nn.BatchNorm1d(3, momentum=0.3)
    deep = nn.ModuleDict(
        {"a": Block(shared), "b": nn.Sequential(Block(nn.BatchNorm1d(3, affine=False)), Block(shared))}
    )
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, eps=0.1), deep["a"], deep["b"])
    model(torch.randn(6, 4) + 2)
    return model


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def prepared(layer):
    with torch.no_grad():
        for v in [*layer.parameters(), layer.running_mean, layer.running_var]:
            v.copy_(torch.rand_like(v) + 0.5)
    return layer


def step(layer, x, dy):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_equal(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def snapshot(model):
    """Return everything about the modules that an operation which fails must leave."""
    state = {name: v.clone() for name, v in model.state_dict().items()}
    return repr(model), [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()], state


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[:3] == before[:3]
    assert list(now[3]) == list(before[3])
    assert_equal(now[3].values(), before[3].values())


# --- convert ------------------------------------------------------------------------------------------------


def test_converted_layers_are_the_same_objects_and_compute_the_same():
    model, original = network(), network()
    modules = list(model.modules())
    parameters = [id(p) for p in model.parameters()]
    keys, values = list(model.state_dict()), [v.clone() for v in model.state_dict().values()]
    assert bn.convert(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(type(module) is bn.BatchNorm1d for module in norms(model))
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    assert_equal(model.state_dict().values(), values)
    x, dy = torch.randn(6, 4), torch.randn(6, 3)
    got, expected = step(model, x, dy), step(original.double(), x.double(), dy.double())
    # output and gradient of the input, after four linear maps and norms: some tens of roundings
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert_near(a, b, ulps=64)
    assert repr(model) == repr(original)


def test_a_module_with_two_parents_stays_shared():
    model = bn.convert(network(), activation="relu")
    assert model[2].norm is model[3][1].norm
    assert len(norms(model)) == 3


def network_of_two_parents():
    shared = nn.BatchNorm1d(3)
    return nn.ModuleList([Block(shared), Block(shared)])


def test_a_shared_layer_is_one_layer_after_convert_and_revert():
    model = network_of_two_parents()
    for operation in (bn.convert, bn.revert):
        operation(model)
        assert model[0].norm is model[1].norm
    assert type(model[0].norm) is nn.BatchNorm1d


@every_pair
def test_a_model_that_is_a_layer_is_converted_itself(ours, torchs, shape):
    layer = torchs(3)
    assert bn.convert(layer) is layer
    assert type(layer) is ours
    assert layer.skipped_updates == 0


def test_hooks_go_on_firing():
    layer, seen = nn.BatchNorm1d(3), []
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    bn.convert(layer)
    layer(torch.randn(6, 3, requires_grad=True)).backward(torch.randn(6, 3))
    assert seen == ["before", "after", "backward"]


def test_training_flags_dtypes_and_devices_are_those_of_each_module():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, device="meta"))
    model[1].eval()
    bn.convert(model)
    assert [layer.training for layer in model] == [True, False, True]
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.float64, torch.float32]
    assert [layer.running_mean.device.type for layer in model] == ["cpu", "cpu", "meta"]


def test_an_optimizer_that_holds_the_parameters_still_trains_them():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bn.convert(model)
    before = [p.clone() for p in model[1].parameters()]
    model(torch.randn(6, 4)).backward(torch.randn(6, 3))
    optimizer.step()
    assert all((a - b).abs().min() > 0 for a, b in zip(model[1].parameters(), before, strict=True))


def test_options_go_to_all_layers_and_are_kept_by_a_second_convert():
    model = bn.convert(network(), activation="relu", virtual_batch_size=3)
    bn.convert(model, on_single="skip")
    for layer in norms(model):
        assert layer.options.changed() == {"activation": "relu", "virtual_batch_size": 3, "on_single": "skip"}
    bn.convert(model, activation=None)
    assert all("activation" not in layer.options.changed() for layer in norms(model))


def test_options_of_a_converted_layer_do_something():
    layer = bn.convert(nn.BatchNorm1d(3), activation="relu")
    assert layer(torch.randn(6, 3)).min() >= 0


def test_convert_of_what_is_converted_changes_nothing():
    model = bn.convert(network(), activation="relu")
    before = snapshot(model)
    bn.convert(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation": "rleu"}, "rleu"),
        ({"renorm": True}, "layer '1', BatchNorm1d"),
        ({"momentums": 1}, "unknown option"),
    ],
    ids=["no layer can", "one layer can't", "unknown"],
)
@pytest.mark.parametrize("converted", [False, True])
def test_an_option_that_a_layer_can_not_have_changes_no_layer(options, text, converted):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm2d(3))
    if converted:
        bn.convert(model, on_single="skip")
    before = snapshot(model)
    with pytest.raises(OptionError, match=re.escape(text)):
        bn.convert(model, **options)
    assert_unchanged(model, before)


class OwnForward(nn.BatchNorm1d):
    """Somebody's layer, that does something else."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("layer", "name"),
    [(OwnForward(3), "OwnForward"), (nn.SyncBatchNorm(3), "SyncBatchNorm"), (nn.LazyBatchNorm1d(), "LazyBatchNorm1d")],
    ids=["own forward", "synchronized", "lazy"],
)
def test_a_layer_with_a_forward_of_its_own_is_left_with_a_warning(layer, name):
    kind, model = type(layer), nn.Sequential(nn.Identity(), layer)
    with pytest.warns(BatchNormWarning, match=rf"layer '1' is a {name}.*left as it is"):
        bn.convert(model)
    assert type(model[1]) is kind


def test_other_norms_are_not_touched():
    model = nn.Sequential(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.LayerNorm(3), nn.GroupNorm(1, 3)
    )
    kinds = [type(module) for module in model]
    bn.convert(model)
    assert [type(module) for module in model] == kinds


def test_a_converted_layer_pickles_and_copies():
    layer = bn.convert(prepared(nn.BatchNorm1d(3)), activation="relu", domains=["photo"])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert_equal(other.state_dict().values(), layer.state_dict().values())
        x = torch.randn(6, 3)
        assert torch.equal(copy.deepcopy(layer)(x), other(x))


# --- revert -------------------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"virtual_batch_size": 2},
        {"renorm": True},
        {"on_single": "skip"},
        {"unbiased": False},
        {"debias": True},
        {"total_variance": True},
    ],
    ids=str,
)
def test_a_reverted_layer_is_torchs_in_every_detail(ours, torchs, shape, options):
    layer = prepared(ours(3, **options))
    for _ in range(2):
        layer(torch.randn(shape))
    with pytest.warns(BatchNormWarning, match="left out"):
        layer(torch.full(shape, torch.nan))
    state = {name: v.clone() for name, v in layer.state_dict().items()}
    assert bn.revert(layer) is layer
    fresh = torchs(3)
    assert type(layer) is torchs
    assert repr(layer) == repr(fresh)
    assert set(layer.__dict__) == set(fresh.__dict__)
    assert list(layer._buffers) == list(fresh._buffers)
    fresh.load_state_dict(state)
    x, dy = torch.randn(shape), torch.randn(shape)
    assert_equal([*step(layer, x, dy), *layer.buffers()], [*step(fresh, x, dy), *fresh.buffers()])


def test_there_and_back_is_the_model_that_was():
    model = network()
    before = snapshot(model)
    bn.revert(bn.convert(model))
    assert_unchanged(model, before)


def test_a_reverted_layer_can_be_pickled_where_ours_is_not_installed():
    text = pickle.dumps(bn.revert(bn.convert(nn.BatchNorm1d(3), on_single="skip")))
    assert b"batchnorm.torch" not in text.replace(b"torch.nn.modules.batchnorm", b"")


REFUSED = {
    "activation": (lambda: bn.BatchNorm1d(3, activation="relu"), "activation='relu'"),
    "example_weight": (lambda: bn.BatchNorm1d(3, example_weight=0.5), "example_weight=0.5"),
    "domains": (lambda: bn.BatchNorm1d(3, domains=["photo"]), "domains=('photo',)"),
    "frozen": (lambda: bn.freeze(bn.BatchNorm1d(3)), "frozen"),
    "schedule": (lambda: bn.BatchNorm1d(3, momentum=lambda t: 0.1), "schedule of momenta"),
}


@pytest.mark.parametrize(("make", "text"), REFUSED.values(), ids=REFUSED)
def test_what_torchs_layer_can_not_do_is_not_reverted_and_nothing_is(make, text):
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(make()))
    before = snapshot(model)
    with pytest.raises(OptionError, match=re.escape("layer '1.0'") + ".*" + re.escape(text)):
        bn.revert(model)
    assert_unchanged(model, before)


def test_frozen_parameters_alone_stay_so_through_revert():
    layer = bn.revert(bn.freeze(bn.BatchNorm1d(3), statistics=False))
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    assert set(layer.__dict__) == set(nn.BatchNorm1d(3).__dict__)


# --- freeze -------------------------------------------------------------------------------------------------


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_state_loaded(layer):
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    return layer


SURVIVED = {
    "train": lambda layer: layer.train(),
    "eval and train": lambda layer: layer.eval().train(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": saved_and_loaded,
    "load_state_dict": with_state_loaded,
    "double and back": lambda layer: layer.double().float(),
    "convert": bn.convert,
    "freeze": bn.freeze,
    "an option": lambda layer: bn.convert(layer, on_single="skip"),
}


@every_pair
@pytest.mark.parametrize("survived", SURVIVED.values(), ids=SURVIVED)
@pytest.mark.parametrize("converted", [False, True])
def test_a_frozen_layer_trains_as_torch_evaluates_whatever_happens(ours, torchs, shape, survived, converted):
    other = prepared(torchs(3)).eval()
    layer = copy.deepcopy(other).train()
    layer = survived(bn.freeze(bn.convert(layer) if converted else layer))
    other.requires_grad_(False)
    before = [v.clone() for v in layer.buffers()]
    for _ in range(2):
        x, dy = torch.randn(shape), torch.randn(shape)
        assert_equal(step(layer, x, dy), step(other, x, dy))
    assert layer.training
    assert_equal(layer.buffers(), before)
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    assert "frozen_statistics=True" in repr(layer)


def test_frozen_statistics_alone_leave_the_parameters_to_learn():
    layer = bn.freeze(prepared(bn.BatchNorm1d(3)), affine=False)
    other = bn.revert(bn.unfreeze(copy.deepcopy(layer))).eval()
    x, dy = torch.randn(6, 3), torch.randn(6, 3)
    got = step(layer, x, dy)
    assert len(got) == 4
    assert_equal(got, step(other, x, dy))


def test_frozen_parameters_alone_leave_the_statistics_to_move():
    layer, other = bn.freeze(bn.BatchNorm1d(3), statistics=False), nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    layer(x)
    other(x)
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    assert_near(layer.running_var, other.running_var.double())
    assert layer.num_batches_tracked == 1


def test_unfreeze_gives_back_what_each_parameter_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    # twice, so that the second one does not take the first one's for the user's
    bn.freeze(bn.freeze(model))
    assert not any(p.requires_grad for p in model.parameters())
    assert bn.unfreeze(model) is model
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_an_unfrozen_layer_is_as_if_it_had_never_been_frozen():
    layer, other = (prepared_from(0) for _ in range(2))
    bn.unfreeze(bn.freeze(layer))
    x, dy = torch.randn(6, 3), torch.randn(6, 3)
    assert_equal([*step(layer, x, dy), *layer.buffers()], [*step(other, x, dy), *other.buffers()])
    assert repr(layer) == repr(other)


def prepared_from(seed):
    torch.manual_seed(seed)
    return prepared(bn.BatchNorm1d(3))


def test_a_part_frozen_after_another_keeps_both():
    layer = bn.freeze(bn.freeze(bn.BatchNorm1d(3), affine=False), statistics=False)
    assert layer.frozen_statistics
    assert not layer.weight.requires_grad


def test_other_layers_are_not_frozen():
    model = bn.freeze(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert all(p.requires_grad for p in model[0].parameters())


def test_unfreeze_of_what_was_never_frozen_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = snapshot(model)
    bn.unfreeze(model)
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert_equal(after[3].values(), before[3].values())
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_without_statistics_is_frozen_in_its_parameters_only():
    layer = bn.freeze(bn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(6, 3)
    assert_near(layer(x).detach(), bn.BatchNorm1d(3, dtype=torch.float64)(x.double()).detach())
    assert not layer.weight.requires_grad


def test_a_frozen_layer_takes_a_single_value_and_an_activation():
    layer = bn.freeze(prepared(bn.BatchNorm1d(3, activation="relu")))
    x = torch.randn(1, 3)
    assert torch.equal(layer(x), layer.eval()(x))
    assert layer(x).min() >= 0


# --- parameter groups ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A model with all kinds of parameters, some of them in two places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Conv1d(4, 4, 3), bn.BatchNorm1d(4), nn.Linear(4, 5))
        self.body[2].weight = self.embedding.weight
        self.again = self.body[1]
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.recurrent = nn.GRU(4, 4)
        self.bilinear = nn.Bilinear(2, 2, 2)


def test_every_parameter_is_in_one_group_once():
    model = Shared()
    decayed, plain = bn.param_groups(model, 0.1)
    found = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(found) == sorted({id(p) for p in model.parameters()})
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [
        "embedding.weight",
        "body.0.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "bilinear.weight",
    ]
    assert [names[id(p)] for p in plain["params"]] == [
        "scale",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "body.2.bias",
        "recurrent.bias_ih_l0",
        "recurrent.bias_hh_l0",
        "bilinear.bias",
    ]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_a_step_decays_weights_and_neither_scale_nor_shift(norm):
    model = nn.Sequential(nn.Linear(4, 3), prepared(norm(3)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(bn.param_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name == "0.weight" else 1.0))


# --- options that can't be ----------------------------------------------------------------------------------

WRONG = {
    "unknown option": (
        {"activate": "relu"},
        ["unknown option activate", "the options are activation, virtual_batch_size"],
    ),
    "unknown activation": ({"activation": "rleu"}, ["activation must be None or one of relu, relu6", "got 'rleu'"]),
    "activation that is a function": ({"activation": torch.relu}, ["activation must be None or one of"]),
    "ghost batches of one": ({"virtual_batch_size": 1}, ["virtual_batch_size must be at least 2 samples, got 1"]),
    "ghost batches of text": ({"virtual_batch_size": "8"}, ["virtual_batch_size", "'8'"]),
    "ghost batches of halves": ({"virtual_batch_size": 2.5}, ["virtual_batch_size", "2.5"]),
    "on_single": ({"on_single": "skipp"}, ["on_single must be 'error', 'running' or 'skip', got 'skipp'"]),
    "negative share": ({"example_weight": -0.1}, ["example_weight must be between 0 and 1, got -0.1"]),
    "share above one": ({"example_weight": 1.1}, ["example_weight must be between 0 and 1, got 1.1"]),
    "share NaN": ({"example_weight": float("nan")}, ["example_weight must be between 0 and 1, got nan"]),
    "domain with a dot": ({"domains": ["a.b"]}, ["domains must be different names like 'target'", "a.b"]),
    "the same domain twice": ({"domains": ["a", "a"]}, ["domains must be different names", "('a', 'a')"]),
    "domain that is a number": ({"domains": [3]}, ["domains must be different names", "3"]),
    "domains that are one text": ({"domains": "cat"}, ["domains", "'cat'"]),
    "debias and a schedule": ({"debias": True, "momentum": lambda t: 0.1}, ["debias needs a constant momentum"]),
    "renorm, unknown key": (
        {"renorm": {"rmaxx": 2}},
        ["renorm must be True, None or a dict with keys from rmax", "rmaxx"],
    ),
    "renorm of a number": ({"renorm": 3.0}, ["renorm must be True, None or a dict", "3.0"]),
    "rmax below one": ({"renorm": {"rmax": 0.5}}, ["rmax of at least 1", "'rmax': 0.5"]),
    "rmax NaN": ({"renorm": {"rmax": float("nan")}}, ["rmax of at least 1", "nan"]),
    "negative dmax": ({"renorm": {"dmax": -1.0}}, ["dmax of at least 0", "'dmax': -1.0"]),
    "start behind the end": ({"renorm": {"start": 600}}, ["0 ≤ start ≤ dmax_at", "'start': 600"]),
    "negative start": ({"renorm": {"start": -1}}, ["0 ≤ start", "'start': -1"]),
    **{
        f"no tracking, {name}": (
            {"track_running_stats": False, name: value},
            [name, "it excludes track_running_stats=False"],
        )
        for name, value in {
            "renorm": True,
            "on_single": "running",
            "unbiased": False,
            "debias": True,
            "total_variance": True,
            "example_weight": 0.5,
            "domains": ["target"],
        }.items()
    },
}


@pytest.mark.parametrize(("options", "texts"), WRONG.values(), ids=WRONG)
def test_an_option_that_can_not_be_is_named_with_its_value(options, texts):
    with pytest.raises(OptionError) as caught:
        bn.BatchNorm1d(3, **options)
    assert all(text in str(caught.value) for text in texts), str(caught.value)


@pytest.mark.parametrize("name", ["1a", "", "a b"])
def test_a_domain_must_be_a_name_for_a_buffer(name):
    with pytest.raises(OptionError, match="domains must be different names"):
        bn.add_domains(nn.BatchNorm1d(3), [name])


def test_options_are_shown_by_repr_in_order_and_only_where_given():
    layer = bn.BatchNorm1d(3, on_single="skip", activation="relu", debias=False)
    assert repr(layer).endswith("track_running_stats=True, activation='relu', on_single='skip')")


def test_a_share_of_one_and_all_activations_are_fine():
    assert bn.BatchNorm1d(3, example_weight=1).options.example_weight == 1
    assert bn.BatchNorm1d(3, track_running_stats=False, on_single="skip", activation="gelu", virtual_batch_size=2)
