"""Running statistics: how they move, in which domain, once for each step, and not a second time under checkpointing."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bn
from batchnorm.errors import BatchNormError, OptionError
from oracle import assert_near

KINDS = {
    "features": (bn.BatchNorm1d, (6, 3)),
    "sequences": (bn.BatchNorm1d, (4, 3, 5)),
    "images": (bn.BatchNorm2d, (4, 3, 5, 2)),
    "volumes": (bn.BatchNorm3d, (2, 3, 3, 2, 4)),
}
every_kind = pytest.mark.parametrize(("kind", "shape"), KINDS.values(), ids=KINDS)


def batches(shape, steps=5, dtype=torch.float32):
    """Return batches whose means and sizes differ from each other."""
    return [(i + 1) * torch.randn(shape[0] + i, *shape[1:], dtype=dtype) + 3 * i for i in range(steps)]


def buffers(layer):
    return [v.clone() for v in layer.buffers()]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_all_near(got, expected, **how):
    for a, b in zip(got, expected, strict=True):
        assert_near(a.detach(), b.double().detach(), **how)


def values(x):
    """Return ``(M, C)`` in float64."""
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1]).double().numpy()


# --- the rule, against a loop -------------------------------------------------------------------------------


def warm(steps):
    return 1.0 if steps == 0 else 0.5 / steps


MOMENTA = {"0.1": 0.1, "1": 1.0, "0": 0.0, "whole": 1, "cumulative": None, "schedule": warm}
RULES = {
    f"{momentum}{' debias' * debias}{' biased' * (not unbiased)}{' total' * total}": (
        MOMENTA[momentum],
        {"debias": debias, "unbiased": unbiased, "total_variance": total},
    )
    for momentum in MOMENTA
    for debias in (False, True)
    for unbiased in (False, True)
    for total in (False, True)
    if not (debias and momentum == "schedule")
}


def by_loop(xs, momentum, *, debias, unbiased, total_variance):
    """Return running mean and variance after batches, written down plainly; debias as a normalized weighted average."""
    mean, square, var, mass = np.zeros(3), np.ones(3), np.ones(3), 0.0
    forgets = debias and momentum not in (None, 0)
    for t, x in enumerate(map(values, xs)):
        w = 1 / (t + 1) if momentum is None else momentum(t) if callable(momentum) else momentum
        batch_mean, batch_var = x.mean(0), x.var(0, ddof=int(unbiased))
        if forgets:
            mean, var, square = mean * (t > 0), var * (t > 0), square * (t > 0)
        # sums of weights times numbers; divided by the mass of the weights at the end
        mean = (1 - w) * mean + w * batch_mean
        var = (1 - w) * var + w * batch_var
        square = (1 - w) * square + w * (batch_var + batch_mean**2)
        mass = (1 - w) * mass + w
    scale = 1 / mass if forgets else 1.0
    mean, var, square = mean * scale, var * scale, square * scale
    return (mean, square - mean**2) if total_variance else (mean, var)


@every_kind
@pytest.mark.parametrize(("momentum", "options"), RULES.values(), ids=RULES)
def test_running_statistics_are_those_of_a_plain_loop(kind, shape, momentum, options):
    layer = kind(3, momentum=momentum, dtype=torch.float64, **options)
    xs = batches(shape, dtype=torch.float64)
    for x in xs:
        layer(x)
    mean, var = by_loop(xs, momentum, **options)
    # the loop subtracts mean² of up to 150 from E[x²]
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-10)
    assert layer.num_batches_tracked == len(xs)


@every_kind
@pytest.mark.parametrize(("momentum", "options"), RULES.values(), ids=RULES)
def test_running_statistics_in_float32_are_rounded_and_no_more(kind, shape, momentum, options):
    layer = kind(3, momentum=momentum, **options)
    xs = batches(shape)
    for x in xs:
        layer(x)
    mean, var = by_loop(xs, momentum, **options)
    # one rounding a step
    assert_near(layer.running_mean, mean, ulps=8)
    assert_near(layer.running_var, var, ulps=8)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_options_the_rule_is_torchs(momentum):
    ours, torchs = bn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for x in batches(KINDS["images"][1]):
        ours(x)
        torchs(x)
    assert_near(ours.running_mean, torchs.running_mean.double())
    assert_near(ours.running_var, torchs.running_var.double())
    assert ours.num_batches_tracked == torchs.num_batches_tracked


def test_a_schedule_gets_the_number_of_batches_so_far():
    seen = []

    def schedule(steps):
        seen.append(steps)
        return 0.25

    layer = bn.BatchNorm1d(3, momentum=schedule)
    for x in batches((6, 3), 3):
        layer(x)
    layer.eval()(x)
    assert seen == [0, 1, 2]
    layer.train().num_batches_tracked.fill_(41)
    layer(x)
    assert seen[-1] == 41


def test_a_schedule_may_return_a_tensor():
    layer, plain = bn.BatchNorm1d(3, momentum=lambda t: torch.tensor(0.25)), bn.BatchNorm1d(3, momentum=0.25)
    for x in batches((6, 3), 2):
        layer(x)
        plain(x)
    assert_near(layer.running_var, plain.running_var.double())


@pytest.mark.parametrize("total", [False, True])
def test_the_first_debiased_step_is_the_batch_whatever_the_start_was(total):
    layer = bn.BatchNorm1d(3, debias=True, total_variance=total, dtype=torch.float64)
    layer.running_mean.fill_(1e6)
    layer.running_var.fill_(1e6)
    x = torch.randn(7, 3, dtype=torch.float64)
    layer(x)
    np.testing.assert_allclose(layer.running_mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, x.var(0), rtol=1e-12)


def test_the_first_debiased_total_variance_far_from_zero_is_that_of_the_batch():
    """A weight of one and an ulp would let the square of the mean in, and make the variance negative."""
    layer = bn.BatchNorm1d(3, debias=True, total_variance=True, dtype=torch.float64)
    x = torch.randn(9, 3, dtype=torch.float64) + 1e8
    layer(x)
    np.testing.assert_allclose(layer.running_var, x.numpy().var(0, ddof=1), rtol=1e-7)


@pytest.mark.parametrize("steps", [2, 30])
def test_debiased_statistics_are_a_weighted_average_of_the_batches(steps):
    layer = bn.BatchNorm1d(3, debias=True, momentum=0.2, dtype=torch.float64)
    layer.running_mean.fill_(-50.0)
    xs = [torch.randn(5, 3, dtype=torch.float64) + i for i in range(steps)]
    for x in xs:
        layer(x)
    weight = 0.8 ** np.arange(steps)[::-1]
    weight /= weight.sum()
    np.testing.assert_allclose(layer.running_mean, weight @ np.stack([x.mean(0) for x in xs]), rtol=1e-11)
    np.testing.assert_allclose(layer.running_var, weight @ np.stack([x.var(0) for x in xs]), rtol=1e-11)


def test_the_biased_variance_is_what_keras_keeps():
    layer = bn.BatchNorm2d(3, unbiased=False, momentum=1.0)
    x = torch.randn(2, 3, 2, 2) * 5
    layer(x)
    assert_near(layer.running_var, values(x).var(0))


@every_kind
def test_the_total_variance_of_equal_batches_is_that_of_all_data(kind, shape):
    layer = kind(3, momentum=None, total_variance=True, unbiased=False, dtype=torch.float64)
    xs = [torch.randn(shape, dtype=torch.float64) + 10 * i for i in range(6)]
    for x in xs:
        layer(x)
    everything = np.concatenate([values(x) for x in xs])
    np.testing.assert_allclose(layer.running_mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, everything.var(0), rtol=1e-12)


def test_the_total_variance_does_not_cancel_far_from_zero():
    layer = bn.BatchNorm1d(3, momentum=None, total_variance=True, unbiased=False)
    xs = [torch.randn(64, 3) + 1e4 + i for i in range(4)]
    for x in xs:
        layer(x)
    # the running mean is kept in float32: half an ulp of 1e4 is 5e-4
    np.testing.assert_allclose(layer.running_var, np.concatenate([values(x) for x in xs]).var(0), rtol=5e-3)


@pytest.mark.parametrize("options", [{"debias": True}, {"unbiased": False}, {"total_variance": True}], ids=str)
def test_options_of_the_running_statistics_leave_the_training_output_alone(options):
    layer, plain = bn.BatchNorm2d(3, **options), bn.BatchNorm2d(3)
    for x in batches(KINDS["images"][1], 2):
        assert torch.equal(layer(x), plain(x))


def test_evaluation_reads_what_training_has_left():
    layer = bn.BatchNorm1d(3, debias=True, dtype=torch.float64)
    x = torch.randn(9, 3, dtype=torch.float64)
    layer(x)
    torch.testing.assert_close(layer.eval()(x), (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt())


def test_reset_forgets_everything():
    layer = bn.BatchNorm1d(3, debias=True, domains=["target"])
    fresh = buffers(layer)
    x = torch.randn(6, 3)
    layer(x)
    with bn.domain(layer, "target"):
        layer(x)
    with pytest.warns(UserWarning, match="left out"):
        layer(x * torch.inf)
    layer.reset_running_stats()
    assert_equal(buffers(layer), fresh)
    assert layer.skipped_updates == 0


# --- activation checkpointing -------------------------------------------------------------------------------


def plainly(f, x):
    return f(x)


def nested(outer, inner):
    def run(f, x):
        return outer(lambda v: inner(f, v), x)

    return run


REENTRANT, NOT_REENTRANT = (partial(checkpoint, use_reentrant=reentrant) for reentrant in (True, False))
WAYS = {
    "reentrant": REENTRANT,
    "not reentrant": NOT_REENTRANT,
    "reentrant, no random state": partial(REENTRANT, preserve_rng_state=False),
    "not reentrant, no random state": partial(NOT_REENTRANT, preserve_rng_state=False),
    "not reentrant in itself": nested(NOT_REENTRANT, NOT_REENTRANT),
    "reentrant in itself": nested(REENTRANT, REENTRANT),
    "not reentrant in reentrant": nested(REENTRANT, NOT_REENTRANT),
    "three times": nested(NOT_REENTRANT, nested(NOT_REENTRANT, NOT_REENTRANT)),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
SOON = {"start": 0, "rmax_at": 2, "dmax_at": 2, "rmax": 1.5, "dmax": 0.5}
CHECKPOINTED = {
    "plain": {},
    "renorm": {"renorm": SOON},
    "cumulative": {"momentum": None},
    "debias": {"debias": True},
    "schedule": {"momentum": warm},
    "total variance": {"total_variance": True},
    "ghost batches": {"virtual_batch_size": 3},
    "ghost batches with renorm": {"virtual_batch_size": 3, "renorm": SOON},
    "activation": {"activation": "silu"},
    "running statistics for one value": {"on_single": "running"},
    "everything": {"virtual_batch_size": 4, "renorm": SOON, "debias": True, "total_variance": True, "unbiased": False},
}
every_checkpointed = pytest.mark.parametrize("options", CHECKPOINTED.values(), ids=CHECKPOINTED)


class Net(nn.Module):
    """Two layers behind linear ones, the second one called twice, in a part that can be checkpointed."""

    def __init__(self, way, options):
        super().__init__()
        torch.manual_seed(3)
        self.way = way
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3)
        self.first, self.second = bn.BatchNorm1d(3, **options), bn.BatchNorm1d(3, **options)

    def part(self, x):
        x = torch.tanh(self.first(self.one(x)))
        return self.second(self.two(self.second(x)))

    def forward(self, x):
        return self.way(self.part, x)


def trained(net, xs, dys):
    """Return outputs and gradients of each step, and the statistics after it."""
    seen = []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, dy in zip(xs, dys, strict=True):
        leaf = x.clone().requires_grad_()
        optimizer.zero_grad()
        y = net(leaf)
        y.backward(dy)
        seen += [y.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters()), *buffers(net)]
        optimizer.step()
    return seen


def assert_checkpointing_changes_no_bit(way, options, size):
    xs = [torch.randn(size, 4) + i for i in range(3)]
    dys = [torch.randn(size, 3) for _ in range(3)]
    assert_equal(trained(Net(way, options), xs, dys), trained(Net(plainly, options), xs, dys))


@every_way
@every_checkpointed
def test_checkpointing_changes_no_bit(way, options):
    assert_checkpointing_changes_no_bit(way, options, 7)


@pytest.mark.parametrize("way", [REENTRANT, NOT_REENTRANT], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["plain", "renorm", "cumulative", "debias", "schedule", "activation"])
def test_checkpointing_a_large_batch_changes_no_bit(way, name):
    assert_checkpointing_changes_no_bit(way, CHECKPOINTED[name], 300)


@pytest.mark.parametrize("way", [REENTRANT, NOT_REENTRANT], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["ghost batches", "ghost batches with renorm"])
def test_checkpointing_twenty_ghost_batches_changes_no_bit(way, name):
    assert_checkpointing_changes_no_bit(way, CHECKPOINTED[name], 60)


@every_way
@pytest.mark.parametrize("options", [{}, {"renorm": SOON}, {"renorm": SOON, "virtual_batch_size": 3}], ids=str)
def test_checkpointing_the_same_batch_at_every_step_changes_no_bit(way, options):
    """The batch alone does not tell which step it is."""
    x, dy = torch.randn(6, 3), torch.randn(6, 3)
    results = []
    for run in (plainly, way):
        layer = bn.BatchNorm1d(3, **options)
        for _ in range(4):
            v = x.clone().requires_grad_()
            run(layer, v).backward(dy)
            results.append([v.grad, *(p.grad.clone() for p in layer.parameters()), *buffers(layer)])
    for got, expected in zip(results[4:], results[:4], strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"renorm": SOON}], ids=["plain", "renorm"])
@pytest.mark.parametrize("way", [REENTRANT, NOT_REENTRANT], ids=["reentrant", "not reentrant"])
def test_more_forwards_than_one_may_wait_for_their_backwards(way, options):
    """A recurrent network, or pipelines: twenty checkpointed calls of one layer, then one backward."""
    xs, dys = torch.randn(20, 6, 3), torch.randn(20, 6, 3)
    results = []
    for run in (plainly, way):
        layer = bn.BatchNorm1d(3, **options)
        leaves = [x.clone().requires_grad_() for x in xs]
        ys = [run(layer, leaf) for leaf in leaves]
        torch.autograd.backward(ys, list(dys))
        results.append([*(leaf.grad for leaf in leaves), *buffers(layer)])
    assert_equal(*results)


@pytest.mark.parametrize("way", [REENTRANT, NOT_REENTRANT], ids=["reentrant", "not reentrant"])
def test_one_value_by_the_running_statistics_is_the_same_when_they_have_moved_on(way):
    results = []
    for run in (plainly, way):
        torch.manual_seed(5)
        layer = bn.BatchNorm1d(3, on_single="running")
        single, many = torch.randn(1, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        y = torch.cat([run(layer, single), run(layer, many)])
        y.backward(torch.randn(7, 3))
        results.append([y.detach(), single.grad, many.grad, layer.weight.grad, *buffers(layer)])
    assert_equal(*results)


@every_way
@pytest.mark.parametrize("options", [{}, {"renorm": SOON}, {"virtual_batch_size": 3}], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["near", "far"])
@pytest.mark.parametrize("late", [False, True], ids=["backward inside", "backward after"])
def test_checkpointing_under_accumulation_changes_nothing(way, options, offset, late):
    xs, dys = torch.randn(3, 6, 3) + offset, torch.randn(3, 6, 3)
    results = []
    for run in (plainly, way):
        layer = bn.BatchNorm1d(3, **options)
        leaves, pending = [x.clone().requires_grad_() for x in xs], []
        with bn.accumulate(layer):
            for leaf, dy in zip(leaves, dys, strict=True):
                pending.append((run(layer, leaf), dy))
                if not late:
                    pending[-1][0].backward(dy)
        for y, dy in pending if late else ():
            y.backward(dy)
        results.append([*(leaf.grad for leaf in leaves), *(p.grad for p in layer.parameters()), *buffers(layer)])
        assert layer.num_batches_tracked == 1
    expected, got = results
    # after the accumulation another kernel may do the forward again: a few roundings of x̂, which holds offset / σ of them
    assert_all_near(got[:3], expected[:3], ulps=16 * (1 + offset) if late else 0)
    assert_all_near(got[3:5], expected[3:5], ulps=16 * (1 + offset) if late else 0)
    assert_equal(got[5:], expected[5:])


@every_way
def test_a_bad_batch_is_counted_and_said_once_under_checkpointing(way):
    layer = bn.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="left out") as caught:
        way(layer, x / 0).backward(torch.randn(6, 3))
    assert len(caught) == 1
    assert layer.skipped_updates == 1
    assert layer.num_batches_tracked == 0


@every_way
def test_checkpointing_in_a_domain_counts_in_the_domain(way):
    layer = bn.BatchNorm1d(3, domains=["target"])
    twin = bn.BatchNorm1d(3)
    for _ in range(2):
        x, dy = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
        with bn.domain(layer, "target"):
            y = way(layer, x)
        # outside of the domain: the second forward must not move the layer's own statistics
        y.backward(dy)
        twin(x)
    assert_near(layer.running_var_target, twin.running_var.double())
    assert layer.num_batches_tracked_target == 2
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("way", [REENTRANT, NOT_REENTRANT], ids=["reentrant", "not reentrant"])
def test_renorm_checkpointed_in_a_domain_reads_the_domain_it_was_in(way):
    results = []
    for run in (plainly, way):
        torch.manual_seed(5)
        layer = bn.BatchNorm1d(3, domains=["target"], renorm={**SOON, "rmax_at": 0, "dmax_at": 0})
        layer.running_mean_target.fill_(0.5)
        x, dy = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
        layer(x.detach())
        with bn.domain(layer, "target"):
            y = run(layer, x)
        y.backward(dy)
        results.append([x.grad, *buffers(layer)])
    assert_equal(*results)


def test_a_forward_without_gradients_counts_as_in_torch():
    ours, torchs = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    with torch.no_grad():
        ours(x)
        torchs(x)
    assert_near(ours.running_var, torchs.running_var.double())
    assert ours.num_batches_tracked == 1


def test_two_backwards_through_one_checkpoint_count_once():
    layer = bn.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    y = NOT_REENTRANT(layer, x)
    for _ in range(2):
        y.backward(torch.randn(6, 3), retain_graph=True)
    assert layer.num_batches_tracked == 1


# --- accumulation -------------------------------------------------------------------------------------------

ACCUMULATED = {
    "plain": {},
    "cumulative": {"momentum": None},
    "debias": {"debias": True},
    "schedule": {"momentum": warm},
    "biased, total": {"unbiased": False, "total_variance": True},
    "ghost batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": SOON},
}


@every_kind
@pytest.mark.parametrize("options", ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulated_micro_batches_update_once_as_the_pooled_batch(kind, shape, options):
    layer, pooled = (kind(3, dtype=torch.float64, **options) for _ in range(2))
    for _ in range(2):
        xs = batches(shape, 3, torch.float64)
        with bn.accumulate(layer):
            before = buffers(layer)
            for x in xs:
                layer(x)
            assert_equal(buffers(layer), before)
        pooled(torch.cat(xs))
    torch.testing.assert_close(layer.running_mean, pooled.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, pooled.running_var, rtol=1e-12, atol=0)
    assert layer.num_batches_tracked == pooled.num_batches_tracked == 2


@every_kind
@pytest.mark.parametrize("channels_last", [False, True])
def test_accumulated_float32_micro_batches_lose_nothing(kind, shape, channels_last):
    xs = batches(shape, 4)
    layer = kind(3, momentum=1.0)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    with bn.accumulate(layer):
        for x in xs:
            layer(x.to(memory_format=formats.get(x.ndim, torch.contiguous_format)) if channels_last else x)
    everything = np.concatenate([values(x) for x in xs])
    assert_near(layer.running_mean, everything.mean(0))
    assert_near(layer.running_var, everything.var(0, ddof=1))


def test_each_micro_batch_is_normalized_by_itself():
    layer, plain = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    with bn.accumulate(layer):
        for x in batches((6, 3), 2):
            assert_near(layer(x).detach(), plain(x).double().detach())


def test_an_exception_leaves_the_statistics_and_ends_the_accumulation():
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    before = buffers(model)

    def fail():
        with bn.accumulate(model):
            model(torch.randn(6, 3))
            raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        fail()
    assert_equal(buffers(model), before)
    model(torch.randn(6, 3))
    assert model[0].num_batches_tracked == model[1].num_batches_tracked == 1


@pytest.mark.parametrize("inner", [lambda model: model, lambda model: model[1]], ids=["the same", "a part"])
def test_accumulation_in_accumulation_is_refused(inner):
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    with bn.accumulate(model), pytest.raises(OptionError, match="accumulates already"), bn.accumulate(inner(model)):
        pass


def test_accumulation_of_a_whole_around_its_part_is_refused_and_the_part_goes_on():
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    with bn.accumulate(model[1]):
        with pytest.raises(OptionError, match="accumulates already"), bn.accumulate(model):
            pass
        model(torch.randn(6, 3))
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 1]


def test_a_model_without_layers_of_ours_can_not_accumulate():
    with pytest.raises(OptionError, match=re.escape("convert(model) first")), bn.accumulate(nn.BatchNorm1d(3)):
        pass


@pytest.mark.parametrize("prepare", [nn.Module.eval, bn.freeze], ids=["evaluation", "frozen"])
def test_accumulation_moves_nothing_in_evaluation_and_where_frozen(prepare):
    layer = prepare(bn.BatchNorm1d(3))
    before = buffers(layer)
    with bn.accumulate(layer):
        layer(torch.randn(6, 3))
    assert_equal(buffers(layer), before)


def test_no_batch_is_no_update():
    layer = bn.BatchNorm1d(3)
    before = buffers(layer)
    with bn.accumulate(layer):
        pass
    assert_equal(buffers(layer), before)


def test_a_shared_layer_accumulates_all_its_calls():
    layer = bn.BatchNorm1d(3, momentum=1.0)
    model = nn.Sequential(layer, nn.Identity(), layer)
    x = torch.randn(6, 3)
    with bn.accumulate(model):
        y = layer(x)
        layer(y)
    assert layer.num_batches_tracked == 1
    assert_near(layer.running_mean, np.concatenate([values(x), values(y)]).mean(0))


def test_a_bad_micro_batch_is_left_out_alone():
    layer = bn.BatchNorm1d(3, momentum=1.0)
    x = torch.randn(6, 3)
    with bn.accumulate(layer):
        layer(x)
        with pytest.warns(UserWarning, match="left out"):
            layer(x * torch.nan)
    assert_near(layer.running_mean, values(x).mean(0))
    assert layer.skipped_updates == 1


def test_a_layer_that_tracks_nothing_accumulates_nothing():
    layer = bn.BatchNorm1d(3, track_running_stats=False)
    with bn.accumulate(layer):
        y = layer(torch.randn(6, 3))
    assert torch.isfinite(y).all()


# --- domains ------------------------------------------------------------------------------------------------


def test_each_domain_has_statistics_of_its_own_and_all_share_the_parameters():
    layer = bn.BatchNorm1d(3, domains=["sketch", "photo"])
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    twins = {name: nn.BatchNorm1d(3) for name in (None, "sketch", "photo")}
    for i, (name, twin) in enumerate(twins.items()):
        for x in batches((6, 3), 2):
            with bn.domain(layer, name):
                got = layer(x + i)
            assert_near(got.detach(), twin(x + i).double().detach(), ulps=16)
    for name, twin in twins.items():
        with bn.domain(layer, name):
            for got, expected in zip(layer.running()[:2], (twin.running_mean, twin.running_var), strict=True):
                assert_near(got, expected.double())
            x = torch.randn(4, 3)
            assert_near(layer.eval()(x).detach(), twin.eval()(x).double().detach())
            assert layer.running()[2] == 2


@pytest.mark.parametrize("name", [None, "target"])
def test_a_domain_in_a_domain_ends_where_it_began_on_any_exit(name):
    model = nn.Sequential(bn.BatchNorm1d(3, domains=["target", "other"]))

    def fail():
        with bn.domain(model, "other"):
            assert model[0].domain == "other"
            raise KeyError("user")

    with bn.domain(model, name):
        with pytest.raises(KeyError, match="user"):
            fail()
        assert model[0].domain == name
        with bn.domain(model, None):
            assert model[0].domain is None
        assert model[0].domain == name
    assert model[0].domain is None


def test_an_unknown_domain_is_named_with_the_known_ones():
    model = nn.Sequential(bn.BatchNorm1d(3, domains=["sketch", "photo"]))
    with pytest.raises(OptionError, match=re.escape("'typo', there are ['photo', 'sketch']")), bn.domain(model, "typo"):
        pass
    with pytest.raises(OptionError, match="there are none"), bn.domain(bn.BatchNorm1d(3), "typo"):
        pass


def test_a_domain_that_is_set_by_hand_must_exist():
    layer = bn.BatchNorm1d(3, domains=["photo"])
    with pytest.raises(BatchNormError, match="typo"):
        layer.domain = "typo"


def test_layers_without_the_domain_keep_their_own():
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3, domains=["target"]))
    with bn.domain(model, "target"):
        model(torch.randn(6, 3))
    assert [int(v) for v in (model[0].num_batches_tracked, model[1].num_batches_tracked)] == [1, 0]
    assert model[1].num_batches_tracked_target == 1


def test_domains_go_through_a_checkpoint_of_the_model():
    source, target = (nn.Sequential(bn.BatchNorm1d(3, domains=["photo"])) for _ in range(2))
    with bn.domain(source, "photo"):
        source(torch.randn(6, 3) + 5)
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    assert_equal(buffers(target), buffers(source))
    plain = nn.BatchNorm1d(3)
    assert not plain.load_state_dict(source[0].state_dict(), strict=False).missing_keys


def test_domains_are_added_to_a_converted_model_where_its_statistics_are():
    model = bn.convert(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model(torch.randn(6, 4))
    keys = list(model.state_dict())
    assert bn.add_domains(model, ["photo"]) is model
    assert [name for name in model.state_dict() if not name.endswith("_photo")] == keys
    for layer in (model[1], model[3]):
        assert_equal([layer.running_mean_photo, layer.running_var_photo], [layer.running_mean, layer.running_var])
        assert layer.running_mean_photo.data_ptr() != layer.running_mean.data_ptr()
        assert layer.options.domains == ("photo",)
    # γ, β and other options are kept
    bn.add_domains(bn.convert(model, activation="relu"), ["sketch"])
    assert model[1].options.activation == "relu"
    assert model[1].options.domains == ("photo", "sketch")


def test_domains_that_are_known_keep_their_order_and_their_statistics():
    """Eight names in the order of a hash would be right once in forty thousand runs."""
    names = [f"domain{i}" for i in range(8)]
    layer = bn.BatchNorm1d(3, domains=names)
    with bn.domain(layer, "domain3"):
        layer(torch.randn(6, 3))
    before = layer.running_mean_domain3.clone()
    bn.add_domains(layer, ["new", "domain3"])
    assert layer.options.domains == (*names, "new")
    assert torch.equal(layer.running_mean_domain3, before)


def test_domains_follow_the_layer_to_another_dtype():
    layer = bn.BatchNorm1d(3, domains=["photo"]).double()
    assert layer.running_mean_photo.dtype == torch.float64
    with bn.domain(layer, "photo"):
        assert layer(torch.randn(6, 3, dtype=torch.float64)).dtype == torch.float64


def test_accumulation_updates_each_domain_once():
    layer, twin = (bn.BatchNorm1d(3, domains=["photo"], dtype=torch.float64) for _ in range(2))
    xs = batches((6, 3), 4, torch.float64)
    with bn.accumulate(layer):
        for i, x in enumerate(xs):
            with bn.domain(layer, "photo" if i % 2 else None):
                layer(x)
    twin(torch.cat(xs[::2]))
    with bn.domain(twin, "photo"):
        twin(torch.cat(xs[1::2]))
    for got, expected in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert layer.domain is None


def test_an_accumulation_that_ends_inside_of_a_domain_leaves_it_chosen():
    layer = bn.BatchNorm1d(3, domains=["photo"])
    with bn.domain(layer, "photo"):
        with bn.accumulate(layer):
            layer(torch.randn(6, 3))
        assert layer.domain == "photo"
    assert layer.num_batches_tracked_photo == 1
