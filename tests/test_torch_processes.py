"""Layers in several processes: DistributedDataParallel on two ranks of this machine."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import torch as bn
from processes import on_ranks


def _model(layers, **options):
    """Return convolution, normalization and a head; equal on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), layers.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )


def _statistics(model):
    return {name: v.tolist() for name, v in model.named_buffers()}


def _train(rank, layers, options, frozen, forwards):
    """Train for three steps, each with some forwards before one backward; return what a rank is left with."""
    model = _model(bn if layers == "ours" else nn, **options)
    if frozen:
        bn.freeze(model)
    before = _statistics(model)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum((parallel(torch.randn(5, 3, 6, 6) + rank) ** 2).mean() for _ in range(forwards))
        loss.backward()
        optimizer.step()
    # an evaluation on rank 0 only, then a forward that broadcasts the buffers of rank 0
    with torch.no_grad():
        parallel(torch.randn(5, 3, 6, 6))
        distributed.barrier()
        for v in model.buffers():
            distributed.broadcast(v, 0)
    parameters = {name: p.detach().tolist() for name, p in model.named_parameters()}
    return {"before": before, "after": _statistics(model), "parameters": parameters, "type": type(model[1]).__name__}


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "ghost batches and relu": {"virtual_batch_size": 2, "activation": "relu"},
    "renorm": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}},
    "domains": {"domains": ["target"]},
}


def _accumulate(rank):
    """Collect four micro-batches under DistributedDataParallel, with one synchronization."""
    model = _model(bn)
    parallel = DistributedDataParallel(model)
    torch.manual_seed(rank)
    with bn.accumulate(model):
        for i in range(4):
            x = torch.randn(5, 3, 6, 6)
            if i < 3:
                with parallel.no_sync():
                    (parallel(x) ** 2).mean().backward()
            else:
                (parallel(x) ** 2).mean().backward()
    gradients = {name: p.grad.tolist() for name, p in model.named_parameters()}
    return {"gradients": gradients, "batches": model[1].num_batches_tracked.item()}


def _evaluate_on_the_first(rank):
    """Let rank 0 run more forwards in evaluation than rank 1, as a validation on rank 0 does."""
    model = _model(bn)
    parallel = DistributedDataParallel(model)
    if rank == 0:
        # evaluation of the module itself, as the tutorials do it
        model.eval()
        model(torch.randn(5, 3, 6, 6))
    model.train()
    (parallel(torch.randn(5, 3, 6, 6)) ** 2).mean().backward()
    return _statistics(model)["1.num_batches_tracked"]


def _recompute(rank):
    """Return the gradients of a step whose outputs are rebuilt in the backward, and of one where they are saved."""
    found = []
    for enabled in (True, False):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 4, 3))
        parallel = DistributedDataParallel(bn.recompute(model, enabled=enabled))
        torch.manual_seed(rank)
        y = parallel(torch.randn(4, 3, 20, 20))
        y.backward(torch.randn_like(y))
        found.append([p.grad.tolist() for p in model.parameters()])
    return found


def _fail_on_the_second(rank):
    """Fail on purpose on rank 1, after both have met."""
    distributed.barrier()
    if rank == 1:
        raise ValueError("on purpose")
    return "fine"


JOBS = {
    **{name: (_train, "ours", options, False, 2) for name, options in OPTIONS.items()},
    "ours once": (_train, "ours", {}, False, 1),
    "torch's once": (_train, "torch's", {}, False, 1),
    "ours twice": (_train, "ours", {}, False, 2),
    "torch's twice": (_train, "torch's", {}, False, 2),
    "frozen": (_train, "ours", {}, True, 2),
    "accumulated": (_accumulate,),
    "an evaluation on the first": (_evaluate_on_the_first,),
    "recomputed": (_recompute,),
    "a failure": (_fail_on_the_second,),
}


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory):
    """All jobs in one pair of processes: starting them costs more than the jobs."""
    return on_ranks(tmp_path_factory.mktemp("ranks"), 2, JOBS)


@pytest.fixture
def answers(both_ranks):
    """Return the answers of the ranks to one job; a failure there is one here."""

    def of(name):
        returned, errors = both_ranks
        failed = [error for (job, _), error in errors.items() if job == name]
        assert not failed, "\n".join(failed)
        return returned[name]

    return of


def test_a_failure_on_one_rank_is_seen_here(both_ranks, answers):
    returned, errors = both_ranks
    assert returned["a failure"] == ["fine", None]
    assert "on purpose" in errors["a failure", 1]
    with pytest.raises(AssertionError, match="on purpose"):
        answers("a failure")


@pytest.mark.parametrize("name", OPTIONS)
def test_two_forwards_and_one_backward_leave_the_ranks_alike(answers, name):
    first, second = answers(name)
    assert first["parameters"] == second["parameters"]
    assert first["after"] == second["after"]
    assert first["after"]["1.running_mean"] != first["before"]["1.running_mean"]
    assert first["after"]["1.num_batches_tracked"] == 7


@pytest.mark.parametrize("forwards", ["once", "twice"])
def test_parameters_and_statistics_are_those_of_torchs_layer(answers, forwards):
    for got, expected in zip(answers(f"ours {forwards}"), answers(f"torch's {forwards}"), strict=True):
        assert (got["type"], expected["type"]) == ("BatchNorm2d", "BatchNorm2d")
        for part in ("parameters", "after"):
            for name, v in got[part].items():
                # three steps of float32, by kernels that may sum in another order
                torch.testing.assert_close(torch.tensor(v), torch.tensor(expected[part][name]), msg=name)


def test_a_frozen_layer_stays_frozen(answers):
    for answer in answers("frozen"):
        assert answer["after"] == answer["before"]
        assert answer["parameters"]["1.weight"] == [1.0] * 4
        assert answer["parameters"]["1.bias"] == [0.0] * 4


def test_accumulated_micro_batches_count_once_on_every_rank(answers):
    first, second = answers("accumulated")
    assert first["batches"] == second["batches"] == 1
    assert first["gradients"] == second["gradients"]


def test_an_evaluation_on_one_rank_talks_to_no_other(answers):
    assert answers("an evaluation on the first") == [1, 1]


def test_gradients_are_the_same_where_outputs_are_rebuilt(answers):
    (rebuilt, saved), second = answers("recomputed")
    assert rebuilt == saved == second[0] == second[1]
