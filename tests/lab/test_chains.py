import copy

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.lab.arms import ARMS
from batchnorm.lab.chains import fold_chains, recalibrate_chains
from batchnorm.lab.data import load_data
from batchnorm.lab.networks import Residual, Standardize, build
from batchnorm.lab.train import Recipe, Task, train_network
from batchnorm.torch import BatchNorm1d, BatchNorm2d

DATA = load_data("digits")


def shaken(network):
    """Give every norm statistics and parameters of both signs."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.double().eval()


def difference(a, b, x):
    with torch.no_grad():
        return (a(x) - b(x)).abs().max().item()


@pytest.mark.parametrize("model", ["mlp", "resmlp", "cnn"])
@pytest.mark.parametrize("arm", ["none", "before", "after", "bias", "input-norm"])
def test_a_folded_network_is_the_same_function(model, arm):
    x = torch.rand(30, 1, 8, 8)
    network = shaken(build(model, (1, 8, 8), 10, ARMS[arm], 0, x))
    folded = copy.deepcopy(network)
    done = fold_chains(folded)
    assert difference(network, folded, x.double()) < 1e-11
    norms = sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | Standardize) for m in folded.modules())
    assert norms == len(done.kept)
    if model != "cnn":
        assert not done.kept
    assert len(done.folded) == len(done.removed)


CASES = {
    "backward": (nn.Linear(4, 3), BatchNorm1d(3)),
    "backward without bias": (nn.Linear(4, 3, bias=False), BatchNorm1d(3), nn.ReLU()),
    "forward": (BatchNorm1d(4), nn.Linear(4, 3)),
    "forward behind an activation": (nn.Linear(4, 5), nn.ReLU(), BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)),
    "two in a row": (nn.Linear(4, 5), BatchNorm1d(5), BatchNorm1d(5)),
    "nested": (nn.Sequential(nn.Linear(4, 5)), nn.Sequential(BatchNorm1d(5), nn.ReLU())),
    "in a branch": (Residual(nn.Linear(4, 4), BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)),),
    "not affine": (nn.Linear(4, 5), BatchNorm1d(5, affine=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_folds_in_a_chain(case):
    network = nn.Sequential(*copy.deepcopy(CASES[case])).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
    folded = copy.deepcopy(network)
    assert fold_chains(folded).kept == ()
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    assert difference(network, folded, torch.randn(9, 4).double()) < 1e-13


def twice():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, BatchNorm1d(4), nn.ReLU(), linear)


def tied():
    network = nn.Sequential(nn.Linear(4, 4), BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    network[3].weight = network[0].weight
    return network


def hooked():
    network = nn.Sequential(nn.Linear(4, 4), BatchNorm1d(4))
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def pooled():
    network = nn.Sequential(BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    nn.init.constant_(network[0].weight, -1.0)
    return network


DECLINED = {
    "zero padding": (lambda: nn.Sequential(BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)), "pads with zeros"),
    "no neighbour": (lambda: nn.Sequential(nn.ReLU(), BatchNorm1d(4), nn.ReLU()), "neither neighbour is linear"),
    "end of a chain": (lambda: nn.Sequential(nn.ReLU(), BatchNorm1d(4)), "no linear layer follows"),
    "negative scale before max pooling": (pooled, "passes positive scales only"),
    "linear used twice": (twice, "0 stands in several places"),
    "tied weights": (tied, "0 shares its weights with another layer"),
    "hook between": (hooked, "0 has hooks or parametrizations"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined_with_its_reason_and_left_alone(case):
    make, reason = DECLINED[case]
    network = make().eval()
    before = copy.deepcopy(network.state_dict())
    done = fold_chains(network)
    assert done.folded == ()
    assert reason in done.kept[0]
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_norms_without_running_statistics_are_not_touched():
    network = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3, track_running_stats=False))
    assert fold_chains(network) == ((), ("1 (BatchNorm1d): it has no running statistics",), ())


def test_every_norm_that_stays_is_listed():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm1d(3)

    network = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GroupNorm(1, 3), Own())
    assert [line.split(":")[0] for line in fold_chains(network).kept] == [
        "1 (LayerNorm)",
        "2 (GroupNorm)",
        "3.norm (BatchNorm1d)",
    ]


@pytest.mark.parametrize("model", ["mlp", "cnn", "resmlp"])
def test_recalibrated_inputs_have_exactly_the_stored_moments(model):
    network, _ = train_network(Task(ARMS["before"], 0.1, 0), Recipe(model, 10, 64), DATA)
    x = DATA.split(0).x_train
    modes = [module.training for module in network.modules()]
    recalibrate_chains(network, x)
    assert modes == [module.training for module in network.modules()]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    received = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: received.update({module: inputs[0]}))
    with torch.no_grad():
        network.eval()(torch.from_numpy(x))
    for norm in norms:
        values = received[norm].double().transpose(0, 1).flatten(1)
        np.testing.assert_allclose(norm.running_mean, values.mean(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.running_var, values.var(1), rtol=1e-5)
