"""Recalibration and observation in a distributed job: each rank its own data, all ranks the statistics of all data."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm import torch as bnt
from batchnorm.moments import Moments
from processes import on_ranks

SHARES = {"uneven": ((7, 1), (32, 2, 3)), "one rank has none": ((7, 1), ()), "even": ((4,), (4,))}


def _data(sizes, seed):
    torch.manual_seed(seed)
    return [torch.randn(n, 3, 6, 6) * (seed + 1) + 100 * seed for n in sizes]


def _model(kind="torch", channels=4):
    torch.manual_seed(0)
    layers = bnt if kind == "ours" else nn
    body = nn.Conv2d(3, channels, 3), layers.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(16 * channels, 5), layers.BatchNorm1d(5))


def _recalibrate(rank, shares, kind, method, wrapped):
    model = _model(kind)
    given = DistributedDataParallel(model) if wrapped else model
    found = bn.recalibrate(given, _data(shares[rank], rank), method=method, progress=False)
    return {name: v.tolist() for name, v in model.named_buffers()}, found.samples, found.batches


def _fails(rank, kind):
    model = _model(channels=4 + rank) if kind == "other model" else _model()
    before = {name: v.clone() for name, v in model.state_dict().items()}
    data = _data((4,), rank)
    if "nan" in kind and rank == 1:
        data[0][0] = float("nan")
    if kind == "empty":
        data = []
    try:
        (bn.observe if kind == "observed nan" else bn.recalibrate)(model, data, progress=False)
    except bn.BatchNormError as error:
        same = all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
        return type(error).__name__, str(error), same
    return None


def _observe(rank, shares):
    return bn.observe(_model(), _data(shares[rank], rank), progress=False).to_dict()


JOBS = {
    f"{share}, {kind}, {method}, {'DDP' if wrapped else 'plain'}": (_recalibrate, SHARES[share], kind, method, wrapped)
    for share in SHARES
    for kind in ("torch", "ours")
    for method in ("one-pass", "sequential")
    for wrapped in (False, True)
}
FAILURES = {name: (_fails, name) for name in ("nan", "observed nan", "other model", "empty")}
OBSERVED = {f"observe {name}": (_observe, shares) for name, shares in SHARES.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("ranks"), 2, {**JOBS, **FAILURES, **OBSERVED})


@pytest.mark.parametrize("name", JOBS)
def test_all_ranks_end_with_what_one_process_finds(answers, name):
    returned, errors = answers
    assert not errors, errors
    _, shares, kind, method, _ = JOBS[name]
    (first, samples, batches), second = returned[name]
    assert (first, samples, batches) == second
    model, data = _model(kind), [x for rank in (0, 1) for x in _data(shares[rank], rank)]
    found = bn.recalibrate(model, data, method=method, progress=False)
    assert (found.samples, found.batches) == (samples, batches)
    for key, v in model.named_buffers():
        np.testing.assert_allclose(first[key], v.numpy(), rtol=2e-6, atol=1e-6, err_msg=key)
    values = np.concatenate([model[0](x).detach().double().numpy() for x in data])
    exact = Moments.of(values)
    np.testing.assert_allclose(first["1.running_mean"], exact.mean, rtol=1e-6)
    np.testing.assert_allclose(first["1.running_var"], exact.unbiased_variance, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nan", ("rank 1 failed", "must be finite")),
        ("observed nan", ("observation needs all processes, rank 1 failed", "must be finite")),
        ("other model", ("hold the same model", "hold the same model")),
        ("empty", ("at least one batch", "at least one batch")),
    ],
)
def test_a_failure_on_one_rank_is_told_on_all_and_nothing_is_written(answers, name, words):
    for (_, said, same), word in zip(answers[0][name], words, strict=True):
        assert word in said
        assert same


@pytest.mark.parametrize("name", OBSERVED)
def test_all_ranks_return_what_all_data_has_shown(answers, name):
    returned, errors = answers
    assert not errors, errors
    first, second = returned[name]
    assert first == second
    shares = OBSERVED[name][1]
    whole = bn.observe(_model(), [x for rank in (0, 1) for x in _data(shares[rank], rank)], progress=False).to_dict()
    assert (first["batches"], first["samples"]) == (whole["batches"], whole["samples"])
    for got, want in zip(first["layers"], whole["layers"], strict=True):
        for key in ("mean", "variance", "kl", "distance", "between", "values", "count", "off", "saturated"):
            np.testing.assert_allclose(got[key], want[key], rtol=1e-5, atol=1e-8, err_msg=key)
