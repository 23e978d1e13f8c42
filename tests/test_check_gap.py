"""A gap between training and evaluation is explained: the first finding names the cause."""

from itertools import pairwise

import pytest
import torch

import batchnorm as bn
from batchnorm.bench.gaps import CAUSES, digits, fit, healthy_network
from check_fixtures import images, net

pytestmark = pytest.mark.usefixtures("one_thread")


# seeds of dense networks, which are trained in a second
DENSE = (18, 19, 29, 21, 4, 5, 15, 7, 8)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", range(len(CAUSES)), ids=[cause.name for cause in CAUSES])
def test_the_first_finding_names_the_cause(number):
    cause, found = CAUSES[number], CAUSES[number].plant(DENSE[number])
    report = bn.check(found.model, data=found.data, **found.given)
    assert report[0].code == cause.code, str(report)
    assert all(word in report[0].message for word in cause.words), str(report[0])


def test_sorted_data_is_no_fault_of_the_model():
    x, y = digits()
    found = healthy_network(1, steps=200)
    order = torch.argsort(y[:1024], stable=True)
    report = bn.check(found.model, data=list(x[:1024][order].split(64)))
    assert not list(report), str(report)


def test_one_layer_of_many_is_found_alone_and_told_from_those_behind_it():
    model = net()
    model[4].running_var.mul_(25)
    (finding,) = bn.check(model, data=list(images(64).split(16)), select="BN103")
    assert finding.layer == "4"
    assert "alone" in finding.message
    assert "variance 0.039" in finding.message
    assert finding.numbers["output error"] == pytest.approx((1 - 1 / 5) ** 2, rel=0.2)


@pytest.mark.parametrize(
    ("stored", "words"), [(0.5, "the root"), (-0.5, "one over the root"), (2.0, "the square")], ids=["sd", "1/sd", "v²"]
)
def test_what_was_stored_in_the_place_of_a_variance_is_seen(stored, words):
    torch.manual_seed(0)
    x = torch.randn(512, 8) * torch.logspace(-1, 1, 8)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8)).eval()
    bn.recalibrate(model, x, progress=False)
    model[0].running_var.pow_(stored)
    finding = bn.check(model, data=x, select="BN103")[0]
    assert words in finding.message


def test_the_initial_values_are_found_where_nobody_counts():
    import keras

    model = keras.Sequential([keras.Input((6,)), keras.layers.BatchNormalization(name="bn")])
    x = 5 + 3 * torch.randn(512, 6, generator=torch.Generator().manual_seed(0)).numpy()
    bn.recalibrate(model, x, progress=False)
    layer = model.get_layer("bn")
    layer.moving_mean.assign(0.3 * layer.moving_mean)
    layer.moving_variance.assign(0.3 * layer.moving_variance + 0.7)
    finding = bn.check(model, data=x, select="BN103")[0]
    assert "too few updates" in finding.message
    assert "70%" in finding.message


def repeated(rate: float) -> torch.nn.Module:
    """Return a network with dropout between all layers, as many have it, trained in its own way."""
    torch.manual_seed(0)
    x, y = digits()
    widths = [64, 48, 48, 48]
    blocks = [
        torch.nn.Sequential(
            torch.nn.Linear(a, b, bias=False), torch.nn.BatchNorm1d(b), torch.nn.ReLU(), torch.nn.Dropout(rate)
        )
        for a, b in pairwise(widths)
    ]
    return fit(torch.nn.Sequential(torch.nn.Flatten(), *blocks, torch.nn.Linear(48, 10)), x, y, 0, steps=200)


def test_dropout_further_before_a_norm_is_a_finding_where_the_data_shows_it():
    x, _ = digits()
    strong = bn.check(repeated(0.7), data=list(x[:1024].split(128)))
    assert {(f.code, f.layer) for f in strong} >= {("BN203", "2.1"), ("BN203", "3.1")}
    assert strong[0].code == "BN203"
    assert not list(bn.check(repeated(0.1), data=list(x[:1024].split(128))))


@pytest.mark.parametrize("factor", [25.0, 0.04])
def test_a_layer_behind_dropout_that_was_changed_is_not_blamed_on_dropout(factor):
    x, _ = digits()
    model = repeated(0.1)
    model[2][1].running_var.mul_(factor)
    report = bn.check(model, data=list(x[:1024].split(128)))
    assert [(f.code, f.layer) for f in report] == [("BN103", "2.1")], str(report)
