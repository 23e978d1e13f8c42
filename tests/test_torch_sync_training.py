"""Synchronized layers in training: second derivatives, every option, wrappers of PyTorch, and what can go wrong."""

import os
import time

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import torch as bn
from batchnorm.functional import Renorm, batch_norm_train
from processes import on_ranks
from sync_cases import CHANNELS, Case, assert_within
from sync_jobs import OPTIONS, PENALTIES, answers, derivatives, model, said, state, trained


def expected_penalty(case):
    """Return the same by autograd through the definition, on the rows of all ranks."""
    layer, shards = case.layer(), [case.shard(rank) for rank in range(len(case.samples))]
    x, dy = (torch.cat([shard[k].movedim(1, -1).reshape(-1, CHANNELS) for shard in shards]) for k in (0, 1))
    mask, weight = (None if shards[0][k] is None else torch.cat([s[k].flatten() for s in shards]) for k in (2, 3))
    gamma, old = layer.weight.detach(), [] if case.options is None else [layer.running_mean, layer.running_var]
    renorm = Renorm(3.0, 5.0) if old else None
    y_of = lambda: batch_norm_train(x, gamma, None, *old, mask=mask, sample_weight=weight, renorm=renorm).y  # noqa: E731
    return derivatives(y_of, x, dy, gamma, weight)


def alone(forwards):
    """Train in one process, on whole batches."""
    network = model()
    trained(network, slice(None), forwards, torch.optim.SGD(network.parameters(), lr=0.1))
    return state(network)


@pytest.mark.parametrize("name", PENALTIES)
def test_second_and_third_derivatives_are_those_of_one_process(name):
    case = PENALTIES[name]
    found, whole = answers(3, ("penalty", name)), expected_penalty(case)
    for i, wanted in enumerate(whole):
        if wanted.shape == (CHANNELS,):
            # γ is on every rank, and each has its share
            assert_within(sum(got[i] for got in found), wanted, 1e-10, f"γ, {i}")
        else:
            got = [np.moveaxis(rank[i], 1, -1).reshape(-1, CHANNELS) for rank in found]
            if wanted.ndim == 1:
                got = [rank[i].ravel() for rank in found]
            assert_within(np.concatenate(got), wanted, 1e-10, str(i))


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("after", [False, True], ids=["sync first", "sync afterwards"])
def test_training_under_ddp_is_that_of_one_process(forwards, broadcast, after):
    first, second = answers(2, ("ddp", forwards, broadcast, after))
    for name, wanted in alone(forwards).items():
        np.testing.assert_allclose(first[name], wanted, rtol=1e-6, atol=1e-6, err_msg=name)
        assert np.array_equal(first[name], second[name])


def test_training_under_fsdp_is_that_of_one_process():
    for found in answers(2, "sharded"):
        for name, wanted in alone(1).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=1e-6, err_msg=name)


def test_compiled_training_is_training_with_the_same_collectives():
    for (got, collectives), (wanted, eager) in answers(2, "compiled"):
        # the eager layer has compared headers, once
        assert (collectives, eager) == (6, 7)
        for name, v in wanted.items():
            # three steps of float32, summed in another order
            np.testing.assert_allclose(got[name], v, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, options):
    for without, with_it in answers(2, ("recomputed", reentrant, options)):
        for a, b in zip(without, with_it, strict=True):
            assert np.array_equal(a, b)
        assert without[-1] == 2


def test_ghost_batches_may_grow_between_a_checkpointed_forward_and_its_backward():
    for without, with_it in answers(2, "recomputed after growing"):
        assert all(np.array_equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize(("name", "numbers"), [("counted", (7, 6)), ("ghosts counted", (14, 12))])
def test_a_step_costs_one_collective_forward_and_one_backward(name, numbers):
    forward, backward = [("all_gather_single", numbers[0])], [("all_reduce", numbers[1])]
    for first, second, evaluation, frozen, group_of_one in answers(2, name):
        assert first == ([("all_gather_single", 1024), *forward], backward)
        assert second == (forward, backward)
        assert evaluation == frozen == ([], [])
        assert group_of_one == []


@pytest.mark.parametrize("given", [True, False], ids=["weight 2", "no weight"])
@pytest.mark.parametrize("how", ["error", "running", "skip"])
def test_the_only_value_in_the_world(how, given):
    layer = Case((0, 1), ()).layer()
    x = torch.full((1, CHANNELS), 5.0)
    plain = bn.convert(layer, on_single=how)
    if how == "error":
        for kind, message in answers(2, ("single", how, given)):
            assert kind == "ShapeError"
            assert "Expected more than 1 value per channel" in message
        return
    (empty, empty_gradient, counted), (y, _, also_counted) = answers(2, ("single", how, given))
    assert empty.shape == empty_gradient.shape == (0, CHANNELS)
    assert counted == also_counted == 0
    assert_within(y, plain(x).detach().numpy(), 1e-6, "y")


def test_no_sample_at_all_moves_nothing():
    assert answers(2, "nothing") == [([0.0] * 3, 0, (0, 3), [0.0] * 3)] * 2


def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_on_all():
    assert answers(2, "poisoned") == [([0.0] * 3, 1, 0)] * 2


def test_a_rank_that_needs_no_gradient_serves_the_others():
    (got, plain), (none, also_plain) = answers(2, "without gradient")
    assert none is None
    assert plain == also_plain == False  # noqa: E712
    case = Case((4, 4), (), torch.float64)
    x = [case.shard(rank)[0] for rank in range(2)]
    both = torch.cat(x).requires_grad_()
    dy = torch.cat([case.shard(rank)[1] for rank in range(2)])
    (batch_norm_train(both).y * dy).sum().backward()
    assert_within(got.numpy(), both.grad[:4].numpy(), 1e-12, "dx")


def test_micro_batches_and_domains_are_counted_over_all_ranks():
    case = Case((4, 2), (), torch.float64)
    x = torch.cat([case.shard(rank)[0] for rank in range(2)])
    for found in answers(2, "micro-batches"):
        for suffix, wanted in (("", torch.cat((x, x + 1))), ("_other", x + 2)):
            assert found[f"num_batches_tracked{suffix}"] == 1
            assert_within(found[f"running_mean{suffix}"], wanted.mean(0).numpy(), 1e-12, "mean")
            assert_within(found[f"running_var{suffix}"], wanted.var(0).numpy(), 1e-12, "variance")


def test_more_ghost_batches_than_before_cost_one_collective_once():
    ranks = answers(2, "growing")
    for found in ranks:
        assert [len(seen) for seen, *_ in found] == [3, 3, 2]
        assert [seen[-1] for seen, *_ in found] == [("all_reduce", 6), ("all_reduce", 24), ("all_reduce", 24)]
    for i, samples in enumerate(((2, 2), (8, 4), (4, 0))):
        case = Case(samples, (), torch.float64)
        x = [case.shard(rank)[0].numpy() for rank in range(2)]
        for start in range(0, max(samples), 2):
            ghost = np.concatenate([v[start : start + 2] for v in x])
            y = np.concatenate([found[i][1][start : start + 2] for found in ranks])
            assert_within(y, batch_norm_train(ghost).y, 1e-12, "y")
        for found in ranks:
            assert_within(found[i][2], np.concatenate(x).mean(0), 1e-12, "mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_dtype(dtype):
    for got, wanted in zip(answers(2, ("half", dtype)), answers(2, ("half", torch.float32)), strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert_within(a, b, 6 * torch.finfo(dtype).eps, "half precision")


def test_a_layer_in_single_precision_takes_half_precision_under_autocast():
    for (got, dtype), wanted in zip(answers(2, "autocast"), answers(2, ("half", torch.float32)), strict=True):
        assert dtype == "torch.bfloat16"
        for a, b in zip(got, wanted, strict=True):
            assert_within(a, b, 6 * torch.finfo(torch.bfloat16).eps, "half precision")


def test_what_follows_the_normalization_is_that_of_the_plain_layer():
    assert answers(2, "residual") == [True, True]


def test_a_rank_may_hold_nothing_but_zero_weights():
    assert answers(2, "zero weights") == [2.0, 2.0]


@pytest.mark.parametrize(
    ("how", "parts"),
    {
        "width": ("rank 0 has layer '', BatchNorm1d(3,", "rank 1 has layer '', BatchNorm1d(4,"),
        "dtype": ("torch.float32", "torch.bfloat16"),
        "option": ("rank 0 has layer '', BatchNorm1d(3, eps=1e-05, torch.float32, {'on_single': 'skip'})", "{})"),
        "layer": ("rank 0 has layer 'layers.a'", "rank 1 has layer 'layers.b'"),
    }.items(),
)
def test_ranks_that_call_different_layers_are_told_so_on_every_rank(how, parts):
    for found, mean in answers(2, "mismatched"):
        kind, message = found[how]
        assert kind == "DistributedError"
        assert all(part in message for part in parts), message
        assert mean == [0.5] * 3


def test_groups_are_kept_apart():
    for rank, found in enumerate(answers(4, "groups")):
        pair, stride = rank // 2 * 2 + 0.5, rank % 2 + 1.0
        assert found["means"] == [pair, pair, stride, 1.5]
        assert found["copied"] == pair + 1
        assert found["kept"] == [pair, 0.0]
        assert found["repr"][3:] == ["'default'", "'default'"]
        assert found["foreign"][0] == "DistributedError"
        assert found["mesh"][0] == "OptionError"
        assert "mesh['dp'] or mesh['tp']" in found["mesh"][1]
        assert found["pickled"][0] == "DistributedError"
        assert found["world"]
        assert found["traced"][0] == "TransformError"


def left(rank, when):
    """Lose rank 1 in the middle of a training; return what rank 0 is told, and after how many seconds."""
    network = bn.sync(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    y = network(torch.randn(4, 3))
    y.sum().backward()
    if rank == 1:
        time.sleep(3 if when == "late" else 0)
        os._exit(1)
    start = time.monotonic()
    kind, message = said(network, torch.randn(4, 3))
    return kind, message, time.monotonic() - start


def backward_alone(rank):
    network = bn.sync(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    y = network(torch.randn(4, 3))
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    kind, message = said(y.sum().backward)
    return kind, message, time.monotonic() - start


@pytest.mark.parametrize(
    "job", [(left, "forward"), (left, "late"), (backward_alone,)], ids=["dies", "is late", "dies before the backward"]
)
def test_a_rank_that_is_lost_is_an_error_and_no_hang(tmp_path, job):
    returned, _ = on_ranks(tmp_path, 2, {"left": job}, seconds=2)
    kind, message, seconds = returned["left"][0]
    assert kind == "DistributedError"
    assert seconds < 5
    assert "layer '1', BatchNorm1d(3" in message
    assert "the timeout of the group is 2 s" in message
