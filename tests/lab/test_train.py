import copy

import numpy as np
import pytest
import torch

from batchnorm.lab.arms import ARMS, Arm
from batchnorm.lab.data import load_data
from batchnorm.lab.train import Recipe, Task, _Watch, score, train, train_network

DATA = load_data("digits")
NUMBERS = ("status", "steps", "val_log_loss", "val_accuracy", "test_log_loss", "test_accuracy", "curve", "units")


def task(arm="before", rate=0.1, seed=0):
    return Task(ARMS[arm] if isinstance(arm, str) else arm, rate, seed)


def numbers(row):
    return [row[key] for key in NUMBERS]


@pytest.mark.parametrize("model", ["mlp", "cnn", "resmlp"])
def test_the_same_task_gives_the_same_numbers(model):
    recipe = Recipe(model, 12, 64)
    first = train(task(), recipe, DATA)
    torch.manual_seed(99)
    assert numbers(train(task(), recipe, DATA)) == numbers(first)
    assert numbers(train(task(seed=1), recipe, DATA)) != numbers(first)


def test_training_leaves_generator_and_threads_as_they_were():
    torch.set_num_threads(2)
    try:
        before = torch.get_rng_state()
        row = train(task(), Recipe("mlp", 5, 64), DATA)
        assert row["threads"] == 1
        assert torch.get_num_threads() == 2
        assert torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_num_threads(1)


def test_it_learns():
    row = train(task(), Recipe("mlp", 150, 64), DATA)
    assert row["status"] == "trained"
    assert row["test_accuracy"] > 0.9
    assert row["curve"][-1][0] == 150
    assert row["curve"][-1][2:] == [row["val_log_loss"], row["val_accuracy"]]


def test_a_loss_that_leaves_the_finite_numbers_is_marked():
    row = train(task("none", rate=1e6), Recipe("mlp", 50, 64), DATA)
    assert row["status"] == "diverged"
    assert row["steps"] < 50
    assert row["test_log_loss"] is row["val_accuracy"] is None


@pytest.mark.parametrize("arm", ["before", "after"])
def test_parameters_of_a_norm_that_leave_the_finite_numbers_are_marked_without_a_word(arm):
    row = train(task(arm, rate=1e30), Recipe("mlp", 50, 64), DATA)
    assert row["status"] == "diverged"
    assert row["steps"] < 50


def test_watching_changes_nothing():
    """Percentiles are taken in training mode, which must not move a running statistic or a parameter."""
    network, _ = train_network(task(), Recipe("mlp", 10, 64), DATA)
    before = copy.deepcopy(network.state_dict())
    network.train()
    modes = [module.training for module in network.modules()]
    _Watch(network, DATA.split(0), 10).look(10, 0.5)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_percentiles_are_those_of_what_a_unit_receives():
    network, row = train_network(task("none"), Recipe("mlp", 4, 64), DATA)
    split = DATA.split(0)
    received = []
    activation = network[2][1]
    hook = activation.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].detach().double().numpy()))
    score(network, split.x_val[:256], split.y_val[:256])
    hook.remove()
    expected = np.quantile(received[0][:, 0], [0.15, 0.5, 0.85])
    np.testing.assert_allclose(row["units"][0]["percentiles"][-1], expected, rtol=1e-5)
    assert [len(unit["steps"]) for unit in row["units"]] == [4, 4, 4]


def test_score_is_the_closed_form():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], torch.zeros(len(x))], 1)

    x = np.array([[0.0], [np.log(3.0)], [-np.log(3.0)]], dtype=np.float32)
    loss, accuracy = score(Fixed(), x, np.array([0, 0, 0]))
    np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.75) + np.log(0.25)) / 3, rtol=1e-6)
    assert accuracy == 2 / 3


def test_arms_of_a_seed_see_the_same_batches():
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(10))

        def forward(self, x):
            if self.training:
                seen.append(x.clone())
            return x.flatten(1)[:, :10] * self.scale

    spy_module = type(torch)("spy_module")
    spy_module.make = lambda shape, classes, arm: Spy()
    import sys

    sys.modules["spy_module"] = spy_module
    try:
        for arm in (Arm("a"), Arm("b", norm="batch")):
            train(task(arm), Recipe("spy_module:make", 30, 64), DATA)
    finally:
        del sys.modules["spy_module"]
    half = len(seen) // 2
    batches = [x for x in seen if len(x) == 64]
    assert len(batches) == 60
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
