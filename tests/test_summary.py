"""The table of a network: its numbers, and that the network is left as it was."""

import re

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError
from batchnorm.torch import BatchNorm1d, BatchNorm2d


def dense_network():
    """The network for handwritten digits by which tutorials explain the four numbers of a feature."""
    return nn.Sequential(
        nn.Flatten(),
        BatchNorm1d(784),
        nn.Linear(784, 300),
        nn.ReLU(),
        BatchNorm1d(300),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.BatchNorm1d(100),
        nn.Linear(100, 10),
    )


class Calling(nn.Module):
    """Two layers and what to do with them."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), BatchNorm1d(4)
        self.run = forward

    def forward(self, *inputs):
        return self.run(self, *inputs)


def fails_halfway(net, x):
    net.second(net.first(x))
    raise RuntimeError("no more")


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [[len(getattr(m, name)) for name in HOOKS] for m in model.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "numbers": [v.clone() for v in model.state_dict().values()],
    }


HOOKS = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called"]


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for what in ("modes", "hooks", "gradients"):
        assert after[what] == before[what], what
    for now, then in zip(after["numbers"], before["numbers"], strict=True):
        assert torch.equal(now, then)


def columns(printed):
    """Return the three columns of numbers, and the numbers of the last line, of a printed summary."""
    *lines, total = printed.splitlines()
    rows = [line.split()[-3:] for line in lines[2:-1]]
    assert lines[1] == lines[-1]
    assert set(lines[1]) == {"─"}
    return [[int(v.replace(",", "")) for v in column] for column in zip(*rows, strict=True)], [
        int(v.replace(",", "")) for v in re.findall(r"[\d,]*\d", total)
    ]


def test_half_of_the_four_numbers_of_a_feature_are_trained():
    table = bn.summary(dense_network(), torch.zeros(1, 28, 28))
    norms = [layer for layer in table.layers if layer.kind == "BatchNorm1d"]
    assert [layer.parameters for layer in norms] == [3136, 1200, 400]
    assert [layer.trainable for layer in norms] == [1568, 600, 200]
    assert [layer.statistics for layer in norms] == [1568, 600, 200]
    assert [layer.frozen for layer in norms] == [0, 0, 0]
    linear = 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert (table.parameters, table.trainable, table.statistics) == (linear + 4736, linear + 2368, 2368)


def test_each_layer_is_listed_with_its_output_shape_in_the_order_of_the_calls():
    def forward(net, x):
        return net.first(net.second(x).mean(0))

    layers = bn.summary(Calling(forward), torch.zeros(6, 4)).layers
    assert [(layer.name, layer.kind, layer.output_shape) for layer in layers] == [
        ("second", "BatchNorm1d", (None, 4)),
        ("first", "Linear", (None,)),
    ]


def test_several_inputs_come_as_a_tuple():
    def forward(net, a, b):
        return net.second(net.first(a) + b)

    layers = bn.summary(Calling(forward), (torch.zeros(3, 4), torch.ones(3, 4))).layers
    assert [layer.output_shape for layer in layers] == [(None, 4), (None, 4)]


@pytest.mark.parametrize("mode", ["training", "evaluation", "mixed"])
def test_the_model_is_left_as_it_was(mode):
    model = dense_network().train(mode != "evaluation")
    if mode == "mixed":
        model[1].eval()
        model[5].eval()
    model[2].weight.requires_grad_(False)
    model[4].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    bn.summary(model, torch.randn(5, 28, 28))
    assert_untouched(model, before)
    bn.summary(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("frozen", [True, False], ids=["mixed modes", "training"])
def test_the_model_is_left_as_it_was_also_when_it_fails(frozen):
    model = Calling(fails_halfway)
    model.second.train(not frozen)
    before = snapshot(model)
    with pytest.raises(OptionError, match="failed after layer second: no more"):
        bn.summary(model, torch.randn(5, 4))
    assert_untouched(model, before)


def test_the_mode_of_a_layer_with_two_parents_is_kept():
    layer = BatchNorm1d(4)
    model = nn.Sequential(nn.Sequential(layer).eval(), nn.Sequential(layer))
    assert [module.training for module in model.modules()] == [True, False, False, True]
    bn.summary(model, torch.zeros(2, 4))
    assert [module.training for module in model.modules()] == [True, False, False, True]


def test_the_random_numbers_of_the_caller_are_not_used_up():
    model, state = Calling(lambda net, x: net.first(x + torch.randn_like(x))), torch.random.get_rng_state()
    bn.summary(model, torch.zeros(2, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_fails_at_once_is_told_so():
    with pytest.raises(OptionError, match="it failed after layer none: mat1 and mat2"):
        bn.summary(nn.Linear(4, 2), torch.zeros(3, 5))


def test_a_layer_that_is_called_twice_is_listed_once():
    table = bn.summary(Calling(lambda net, x: net.second(net.first(net.first(x)))), torch.zeros(3, 4))
    assert [layer.name for layer in table.layers] == ["first", "second"]
    assert table.trainable == 4 * 4 + 4 + 8


def test_a_layer_under_two_names_is_listed_once():
    layer = nn.Linear(4, 4)
    table = bn.summary(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 4))
    assert [layer.name for layer in table.layers] == ["0", "1"]
    assert table.parameters == 20


def test_a_layer_that_is_never_called_says_so():
    table = bn.summary(Calling(lambda net, x: net.first(x)), torch.zeros(3, 4))
    assert [layer.output_shape for layer in table.layers] == [(None, 4), None]
    assert re.search(r"^second \(BatchNorm1d\) +not called +16 +8 +8$", str(table), re.MULTILINE)


def test_without_an_example_layers_come_in_the_order_of_their_definition():
    table = bn.summary(dense_network())
    assert [layer.kind for layer in table.layers[:3]] == ["Flatten", "BatchNorm1d", "Linear"]
    assert {layer.output_shape for layer in table.layers} == {None}


def test_frozen_parameters_and_constants_are_counted_as_such():
    model = Calling(lambda net, x: net.second(net.first(x)))
    model.first.weight.requires_grad_(False)
    model.second.bias.requires_grad_(False)
    model.first.register_buffer("scale", torch.ones(3))
    first, second = bn.summary(model, torch.zeros(2, 4)).layers
    assert (first.trainable, first.frozen, first.statistics, first.parameters) == (4, 16 + 3, 0, 23)
    assert (second.trainable, second.frozen, second.statistics, second.parameters) == (4, 4, 8, 16)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, (6, 6)),
        ({"affine": False}, (0, 6)),
        ({"track_running_stats": False}, (6, 0)),
        ({"affine": False, "track_running_stats": False}, (0, 0)),
    ],
    ids=["default", "no affine", "no tracking", "neither"],
)
def test_a_layer_has_the_numbers_that_it_was_built_with(options, numbers):
    (layer,) = bn.summary(BatchNorm2d(3, **options), torch.zeros(2, 3, 4, 4)).layers
    assert layer.name == "BatchNorm2d"
    assert (layer.trainable, layer.statistics) == numbers


def test_parameters_of_a_module_with_children_are_counted_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(5)), nn.Linear(4, 5)

        def forward(self, x):
            return self.scale * self.inner(x)

    table = bn.summary(nn.Sequential(Scaled()), torch.zeros(2, 4))
    assert [(layer.name, layer.parameters) for layer in table.layers] == [("0.inner", 25), ("0", 5)]


def test_an_output_that_is_no_tensor_has_no_shape():
    (layer,) = bn.summary(nn.LSTM(4, 3), torch.zeros(2, 4)).layers
    assert layer.output_shape is None


@pytest.mark.parametrize("frozen", [False, True])
def test_the_printed_columns_add_up_to_the_last_line(frozen):
    model = dense_network()
    if frozen:
        model[2].requires_grad_(False)
        model[4].requires_grad_(False)
    table = bn.summary(model, torch.zeros(1, 28, 28))
    (parameters, trainable, statistics), total = columns(str(table))
    expected = [sum(parameters), sum(trainable), sum(statistics)]
    assert total == [*expected, expected[0] - expected[1] - expected[2]]
    assert expected == [table.parameters, table.trainable, table.statistics]
    assert total[3] == (784 * 300 + 300 + 600 if frozen else 0)


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (3, "builtins.int"),
        ("model.pt", "builtins.str"),
        (torch.zeros(2), "torch.Tensor"),
        (nn.Linear, "builtins.type"),
    ],
    ids=["number", "path", "tensor", "class"],
)
def test_what_is_no_model_is_refused_with_its_type(thing, name):
    with pytest.raises(OptionError, match=rf"a model must be a torch.nn.Module, .*, got {re.escape(name)}"):
        bn.summary(thing)


def test_shared_weights_are_counted_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [layer.parameters for layer in bn.summary(model).layers] == [20, 4]
