"""In a distributed job: what is synchronized, what is not, and one answer on all ranks."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from batchnorm import torch as bnt
from processes import on_ranks

SIZES = {"small": 4, "large": 64}


def _check(rank, kind, size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5, bias=False)
    )
    model.append(nn.BatchNorm1d(5))
    if kind == "synchronized":
        bnt.sync(model)
    if kind == "mixed":
        bnt.sync(model[2])
    wrapped = DistributedDataParallel(model) if kind == "wrapped" else model
    torch.manual_seed(rank)
    report = bn.check(wrapped, torch.randn(SIZES[size], 6), select="BN207")
    return [(finding.code, finding.layer) for finding in report], list(report.problems)


JOBS = {
    f"{kind}, {size}": (_check, kind, size)
    for kind, size in [
        ("plain", "small"),
        ("plain", "large"),
        ("synchronized", "small"),
        ("mixed", "large"),
        ("wrapped", "small"),
    ]
}
EXPECTED = {
    "plain, small": ["2", "5"],
    "plain, large": [],
    "synchronized, small": [],
    "mixed, large": ["5"],
    "wrapped, small": ["2", "5"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    returned, errors = on_ranks(tmp_path_factory.mktemp("ranks"), 2, JOBS)
    assert not errors, errors
    return returned


@pytest.mark.parametrize("job", JOBS)
def test_synchronization_is_missed_where_batches_are_small_or_layers_differ(answers, job):
    for found, problems in answers[job]:
        assert not problems
        assert sorted(layer for _, layer in found) == EXPECTED[job]
