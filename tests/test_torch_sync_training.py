"""Synchronized layers in training: second derivatives, every option, wrappers of PyTorch, and what can go wrong."""

import copy
import math
import os
import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bn
from batchnorm.errors import BatchNormError, BatchNormWarning
from batchnorm.functional import Renorm, batch_norm_train
from processes import on_ranks
from sync_cases import CHANNELS, Case, Counted, assert_within

PENALTIES = {
    "plain": Case((5, 3, 0), dtype=torch.float64),
    "mask and weight": Case((5, 3, 0), dtype=torch.float64, given="mask weight"),
    "renorm": Case((5, 3, 0), dtype=torch.float64, options={"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}),
    "rows": Case((5, 3, 1), (), dtype=torch.float64),
}


def derivatives(y_of, x, dy, gamma, weight):
    """Return gradients of a gradient penalty, and of a penalty of its gradient: second and third derivatives."""
    wanted = [v.requires_grad_() for v in (x, dy, gamma, weight) if v is not None]
    (first,) = torch.autograd.grad((y_of() * dy).sum(), x, create_graph=True)
    second = torch.autograd.grad((first**2).sum(), wanted, create_graph=True)
    third = torch.autograd.grad((second[0] ** 2).sum(), wanted)
    return [v.detach().numpy() for v in (first, *second, *third)]


def penalty(rank, case):
    layer = bn.sync(case.layer()).train()
    x, dy, mask, weight = case.shard(rank)
    return derivatives(lambda: layer(x, mask, weight), x, dy, layer.weight, weight)


def expected_penalty(case):
    """Return the same by autograd through the definition, on the rows of all ranks."""
    layer, shards = case.layer(), [case.shard(rank) for rank in range(len(case.samples))]
    x, dy = (torch.cat([shard[k].movedim(1, -1).reshape(-1, CHANNELS) for shard in shards]) for k in (0, 1))
    mask, weight = (None if shards[0][k] is None else torch.cat([s[k].flatten() for s in shards]) for k in (2, 3))
    gamma, old = layer.weight.detach(), [] if case.options is None else [layer.running_mean, layer.running_var]
    renorm = Renorm(3.0, 5.0) if old else None
    y_of = lambda: batch_norm_train(x, gamma, None, *old, mask=mask, sample_weight=weight, renorm=renorm).y  # noqa: E731
    return derivatives(y_of, x, dy, gamma, weight)


def model(**options):
    """Return convolution, normalization and a head; equal on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def batches(step, forward):
    torch.manual_seed(50 + 7 * step + forward)
    x = torch.randn(8, 3, 6, 6) * 2 + torch.arange(8.0).view(8, 1, 1, 1)
    return x, torch.randn(8, 2)


def trained(network, part, forwards, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        loss = 0.0
        for forward in range(forwards):
            x, target = (v[part] for v in batches(step, forward))
            loss = loss + ((network(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()


def state(network):
    return {name: v.detach().numpy().astype(np.float64) for name, v in network.state_dict().items()}


def parallel(rank, forwards, broadcast, after):
    """Train under DistributedDataParallel, on half of each batch."""
    inner = model() if after else bn.sync(model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = DistributedDataParallel(inner, broadcast_buffers=broadcast)
    if after:
        bn.sync(network)
    trained(network, slice(4 * rank, 4 * rank + 4), forwards, torch.optim.SGD(network.parameters(), lr=0.1))
    return state(inner)


def alone(forwards):
    """Train in one process, on whole batches."""
    network = model()
    trained(network, slice(None), forwards, torch.optim.SGD(network.parameters(), lr=0.1))
    return state(network)


def sharded(rank):
    """Train with parameters that are sharded over the ranks."""
    network = bn.sync(model())
    mesh = init_device_mesh("cpu", (2,))
    bn.sync(network, mesh)
    for part in network:
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)
    trained(network, slice(4 * rank, 4 * rank + 4), 1, torch.optim.SGD(network.parameters(), lr=0.1))
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in network.state_dict().items()}
    return {name: v.detach().numpy().astype(np.float64) for name, v in full.items()}


def compiled(rank, backend):
    """Take two steps, compiled and not."""
    found = []
    for compile_it in (True, False):
        network = bn.sync(model(virtual_batch_size=2, activation="silu"))
        run = torch.compile(network, fullgraph=True, backend=backend) if compile_it else network
        before = distributed.group.WORLD._get_sequence_number_for_group()
        trained(run, slice(4 * rank, 4 * rank + 4), 1, torch.optim.SGD(network.parameters(), lr=0.1))
        found.append((state(network), distributed.group.WORLD._get_sequence_number_for_group() - before))
    return found


def recomputed(rank, reentrant, options):
    """Return output, gradients and statistics without and with activation checkpointing; rank 1 has no sample."""
    results = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer = bn.sync(Case((5, 0), options=options).layer())
        total = 0.0
        xs = [Case((5, 0)).shard(rank)[0].add(i).requires_grad_() for i in range(2)]
        for x in xs:
            y = run(layer, x)
            total = total + (y * Case((5, 0)).shard(rank)[1]).sum()
        total.backward()
        found = [*(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()]
        results.append([v.detach().clone().numpy() for v in found])
    return results


def counted(rank, options):
    """Return the collectives of a step: the first, the second, an evaluation, a frozen layer, a group of one."""
    layer = bn.sync(bn.BatchNorm2d(CHANNELS, **options))
    found = []
    x = torch.randn(4, CHANNELS, 3, 3, requires_grad=True)
    for prepare in (lambda: None, lambda: None, layer.eval, lambda: bn.freeze(layer.train())):
        prepare()
        with Counted() as seen:
            y = layer(x)
            forward = len(seen)
            y.sum().backward()
        found.append((seen[:forward], seen[forward:]))
    group = [distributed.new_group([other]) for other in range(2)][rank]
    with Counted() as seen:
        bn.sync(nn.BatchNorm2d(CHANNELS), group)(x).sum().backward()
    return [*found, seen]


def single(rank, on_single, given):
    """Normalize the one value in the world, which rank 1 holds."""
    layer = Case((0, 1), ()).layer()
    bn.sync(bn.convert(layer, on_single=on_single))
    x = torch.full((rank, CHANNELS), 5.0, requires_grad=True)
    weights = {"sample_weight": torch.full((rank,), 2.0)} if given else {}
    if on_single == "error":
        return said(layer, x, **weights)
    y = layer(x, **weights)
    y.sum().backward()
    return y.detach().numpy(), x.grad.numpy(), layer.num_batches_tracked.item()


def nothing(rank):
    """Train on no sample at all."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS))
    x = torch.zeros(0, CHANNELS, requires_grad=True)
    layer(x).sum().backward()
    return layer.running_mean.tolist(), layer.num_batches_tracked.item(), x.grad.shape, layer.weight.grad.tolist()


def poisoned(rank):
    """See a batch that is not finite on rank 1."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        layer(torch.full((2, CHANNELS), math.nan if rank else 1.0))
    return layer.running_mean.tolist(), layer.skipped_updates, layer.num_batches_tracked.item()


def without_gradient(rank):
    """Return the gradient where only rank 0 needs one."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS, affine=False, dtype=torch.float64))
    x, dy, *_ = Case((4, 4), (), torch.float64).shard(rank)
    x.requires_grad_(rank == 0)
    y = layer(x)
    (y * dy).sum().backward()
    plain = layer(x.detach())
    return x.grad, plain.requires_grad


def micro_batches(rank):
    """Collect two micro-batches, and one of another domain."""
    layer = bn.sync(bn.add_domains(bn.BatchNorm1d(CHANNELS, momentum=None, dtype=torch.float64), ["other"]))
    x = [Case((4, 2), (), torch.float64).shard(rank)[0] + i for i in range(3)]
    with bn.accumulate(layer):
        layer(x[0])
        layer(x[1])
        with bn.domain(layer, "other"):
            layer(x[2])
    return {name: v.numpy() for name, v in layer.named_buffers()}


def growing(rank):
    """See more ghost batches after fewer, on one rank only."""
    layer = bn.sync(bn.BatchNorm1d(CHANNELS, virtual_batch_size=2, momentum=1.0, dtype=torch.float64))
    found = []
    for samples in ((2, 2), (8, 4), (4, 0)):
        with Counted() as seen:
            x = Case(samples, (), torch.float64).shard(rank)[0].requires_grad_()
            y = layer(x)
            (y**3).sum().backward()
        found.append((seen, y.detach().numpy(), layer.running_mean.numpy().copy()))
    return found


def in_half(rank, dtype):
    layer = bn.sync(Case((6, 2)).layer().to(dtype))
    x, dy, *_ = Case((6, 2)).shard(rank)
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    (y * dy.to(dtype)).sum().backward()
    return [v.detach().double().numpy() for v in (y, x.grad, layer.weight.grad, layer.running_var)]


def with_residual(rank):
    """Compare what comes after the normalization with the plain layer."""
    case = Case((4, 2), (5,), torch.float64)
    x, other, *_ = case.shard(rank)
    lengths = torch.arange(len(x)) + 1
    full, plain = bn.sync(bn.convert(case.layer(), activation="silu")), bn.sync(case.layer())
    mask = (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]
    y = plain(x, lengths=lengths)
    expected = torch.where(mask, nn.functional.silu(y + other), 0.0)
    return torch.equal(full(x, residual=other, lengths=lengths), expected)


def zero_weights(rank):
    """Train where every weight of rank 1 is zero."""
    layer = bn.sync(bn.BatchNorm1d(1, momentum=1.0))
    layer(torch.tensor([[1.0], [3.0]]) + 10 * rank, sample_weight=torch.full((2,), 1.0 - rank))
    return layer.running_mean.item()


def said(function, *arguments, **named):
    """Return the type and the message of the error that a call ends with."""
    try:
        function(*arguments, **named)
    except BatchNormError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def mismatched(rank):
    """Return what the layer says when ranks differ in width, dtype, option or layer; and that the group still works."""
    x = torch.randn(4, 3 + rank)
    wide = said(bn.sync(bn.BatchNorm1d(3 + rank)), x)
    cast = said(bn.sync(bn.BatchNorm1d(3)), torch.randn(4, 3, dtype=[torch.float32, torch.bfloat16][rank]))
    optional = said(bn.sync(bn.BatchNorm1d(3, on_single=["skip", "error"][rank])), torch.randn(4, 3))
    network = Holder("ab"[rank])
    named = said(network, torch.randn(4, 3))
    found = {"width": wide, "dtype": cast, "option": optional, "layer": named}
    layer = bn.sync(bn.BatchNorm1d(3, momentum=1.0))
    (nn.Sequential(layer) if rank else nn.Sequential(nn.Sequential(layer)))(torch.full((2, 3), float(rank)))
    return found, layer.running_mean.tolist()


class Holder(nn.Module):
    """A model that calls one of its two layers."""

    def __init__(self, name):
        super().__init__()
        self.layers, self.name = nn.ModuleDict({name: bn.sync(bn.BatchNorm1d(3)) for name in "ab"}), name

    def forward(self, x):
        return self.layers[self.name](x)


def groups(rank):
    """Synchronize halves of four ranks."""
    halves = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine, foreign = halves[rank // 2], halves[1 - rank // 2]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.full((2, 1), float(rank))
    layers = [bn.sync(bn.BatchNorm1d(1, momentum=1.0), group) for group in (mine, mesh["tp"], mesh["dp"], None)]
    for layer in layers:
        layer(x)
    means = [layer.running_mean.item() for layer in layers]
    copied = copy.deepcopy(layers[0])
    copied(x + 1)
    theirs = nn.SyncBatchNorm(1, process_group=mine, momentum=1.0)
    kept = bn.sync(nn.Sequential(theirs, nn.BatchNorm1d(1, momentum=1.0)))
    kept(x)
    given = bn.sync(nn.SyncBatchNorm(1, process_group=mine, momentum=1.0), distributed.group.WORLD)
    return {
        "means": means,
        "copied": copied.running_mean.item(),
        "kept": [layer.running_mean.item() for layer in kept],
        "repr": [repr(layer.options.process_group) for layer in (*layers, given)],
        "foreign": said(bn.sync, nn.BatchNorm1d(1), foreign),
        "mesh": said(bn.sync, nn.BatchNorm1d(1), mesh),
        "pickled": said(pickle.dumps, layers[0]),
        "world": pickle.loads(pickle.dumps(layers[3])).options == layers[3].options,
        "traced": said(torch.func.vmap(bn.sync(bn.BatchNorm1d(1))), x[None]),
    }


OPTIONS = {"plain": None, "renorm": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}}}
JOBS = {
    2: {
        **{("ddp", f, b, a): (parallel, f, b, a) for f in (1, 2) for b in (True, False) for a in (True, False)},
        "sharded": (sharded,),
        "compiled": (compiled, "aot_eager"),
        **{("recomputed", r, o): (recomputed, r, OPTIONS[o]) for r in (True, False) for o in OPTIONS},
        "counted": (counted, {}),
        "ghosts counted": (counted, {"virtual_batch_size": 2}),
        **{
            ("single", how, given): (single, how, given)
            for how in ("error", "running", "skip")
            for given in (True, False)
        },
        "nothing": (nothing,),
        "poisoned": (poisoned,),
        "without gradient": (without_gradient,),
        "micro-batches": (micro_batches,),
        "growing": (growing,),
        **{("half", dtype): (in_half, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)},
        "residual": (with_residual,),
        "zero weights": (zero_weights,),
        "mismatched": (mismatched,),
    },
    3: {("penalty", name): (penalty, case) for name, case in PENALTIES.items()},
    4: {"groups": (groups,)},
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    started = {}

    def of(ranks):
        if ranks not in started:
            started[ranks] = on_ranks(tmp_path_factory.mktemp("sync"), ranks, JOBS[ranks])
        return started[ranks]

    return of


@pytest.fixture
def answers(worlds):
    """Return the answers of the ranks to one job; a failure there is one here."""

    def of(ranks, name):
        returned, errors = worlds(ranks)
        failed = [error for (job, _), error in errors.items() if job == name]
        assert not failed, "\n".join(failed)
        return returned[name]

    return of


@pytest.mark.parametrize("name", PENALTIES)
def test_second_and_third_derivatives_are_those_of_one_process(answers, name):
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
def test_training_under_ddp_is_that_of_one_process(answers, forwards, broadcast, after):
    first, second = answers(2, ("ddp", forwards, broadcast, after))
    for name, wanted in alone(forwards).items():
        np.testing.assert_allclose(first[name], wanted, rtol=1e-6, atol=1e-6, err_msg=name)
        assert np.array_equal(first[name], second[name])


def test_training_under_fsdp_is_that_of_one_process(answers):
    for found in answers(2, "sharded"):
        for name, wanted in alone(1).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=1e-6, err_msg=name)


def test_compiled_training_is_training_with_the_same_collectives(answers):
    for (got, collectives), (wanted, eager) in answers(2, "compiled"):
        # the eager layer has compared headers, once
        assert (collectives, eager) == (6, 7)
        for name, v in wanted.items():
            np.testing.assert_allclose(got[name], v, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(answers, reentrant, options):
    for without, with_it in answers(2, ("recomputed", reentrant, options)):
        for a, b in zip(without, with_it, strict=True):
            assert np.array_equal(a, b)
        assert without[-1] == 2


@pytest.mark.parametrize(("name", "numbers"), [("counted", (7, 6)), ("ghosts counted", (14, 12))])
def test_a_step_costs_one_collective_forward_and_one_backward(answers, name, numbers):
    forward, backward = [("all_gather_single", numbers[0])], [("all_reduce", numbers[1])]
    for first, second, evaluation, frozen, group_of_one in answers(2, name):
        assert first == ([("all_gather_single", 1024), *forward], backward)
        assert second == (forward, backward)
        assert evaluation == frozen == ([], [])
        assert group_of_one == []


@pytest.mark.parametrize("given", [True, False], ids=["weight 2", "no weight"])
@pytest.mark.parametrize("how", ["error", "running", "skip"])
def test_the_only_value_in_the_world(answers, how, given):
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


def test_no_sample_at_all_moves_nothing(answers):
    assert answers(2, "nothing") == [([0.0] * 3, 0, (0, 3), [0.0] * 3)] * 2


def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_on_all(answers):
    assert answers(2, "poisoned") == [([0.0] * 3, 1, 0)] * 2


def test_a_rank_that_needs_no_gradient_serves_the_others(answers):
    (got, plain), (none, also_plain) = answers(2, "without gradient")
    assert none is None
    assert plain == also_plain == False  # noqa: E712
    case = Case((4, 4), (), torch.float64)
    x = [case.shard(rank)[0] for rank in range(2)]
    both = torch.cat(x).requires_grad_()
    dy = torch.cat([case.shard(rank)[1] for rank in range(2)])
    (batch_norm_train(both).y * dy).sum().backward()
    assert_within(got.numpy(), both.grad[:4].numpy(), 1e-12, "dx")


def test_micro_batches_and_domains_are_counted_over_all_ranks(answers):
    case = Case((4, 2), (), torch.float64)
    x = torch.cat([case.shard(rank)[0] for rank in range(2)])
    for found in answers(2, "micro-batches"):
        for suffix, wanted in (("", torch.cat((x, x + 1))), ("_other", x + 2)):
            assert found[f"num_batches_tracked{suffix}"] == 1
            assert_within(found[f"running_mean{suffix}"], wanted.mean(0).numpy(), 1e-12, "mean")
            assert_within(found[f"running_var{suffix}"], wanted.var(0).numpy(), 1e-12, "variance")


def test_more_ghost_batches_than_before_cost_one_collective_once(answers):
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
def test_half_precision_is_as_exact_as_its_dtype(answers, dtype):
    for got, wanted in zip(answers(2, ("half", dtype)), answers(2, ("half", torch.float32)), strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert_within(a, b, 6 * torch.finfo(dtype).eps, "half precision")


def test_what_follows_the_normalization_is_that_of_the_plain_layer(answers):
    assert answers(2, "residual") == [True, True]


def test_a_rank_may_hold_nothing_but_zero_weights(answers):
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
def test_ranks_that_call_different_layers_are_told_so_on_every_rank(answers, how, parts):
    for found, mean in answers(2, "mismatched"):
        kind, message = found[how]
        assert kind == "DistributedError"
        assert all(part in message for part in parts), message
        assert mean == [0.5] * 3


def test_groups_are_kept_apart(answers):
    for rank, found in enumerate(answers(4, "groups")):
        pair, stride = rank // 2 * 2 + 0.5, rank % 2 + 1.0
        assert found["means"] == [pair, pair, stride, 1.5]
        assert found["copied"] == pair + 1
        assert found["kept"] == [pair, 1.5]
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
        time.sleep(6 if when == "late" else 0)
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
    returned, _ = on_ranks(tmp_path, 2, {"left": job}, seconds=3)
    kind, message, seconds = returned["left"][0]
    assert kind == "DistributedError"
    assert seconds < 5
    assert "layer '1', BatchNorm1d(3" in message
    assert "the timeout of the group is 3 s" in message
