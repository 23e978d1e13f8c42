"""Ghost batches, renormalization, an example's own statistics, and what follows the normalization."""

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import torch as bn
from batchnorm.errors import OptionError, ShapeError
from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_train
from batchnorm.torch.options import ACTIVATIONS
from oracle import assert_near

KINDS = {
    "features": (bn.BatchNorm1d, nn.BatchNorm1d, (8, 3)),
    "sequences": (bn.BatchNorm1d, nn.BatchNorm1d, (8, 3, 5)),
    "images": (bn.BatchNorm2d, nn.BatchNorm2d, (8, 3, 5, 2)),
    "volumes": (bn.BatchNorm3d, nn.BatchNorm3d, (8, 3, 3, 2, 2)),
}
every_kind = pytest.mark.parametrize(("kind", "torchs", "shape"), KINDS.values(), ids=KINDS)
NOW = {"start": 0, "rmax_at": 0, "dmax_at": 0}


def prepared(layer):
    """Return the layer with no number at its initial value."""
    with torch.no_grad():
        for v in [*layer.parameters(), layer.running_mean, layer.running_var]:
            v.copy_(torch.rand_like(v) + 0.5)
    return layer


def twin(layer, kind, **options):
    other = kind(3, eps=layer.eps, momentum=layer.momentum, dtype=layer.running_mean.dtype, **options)
    other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


def problem(shape, dtype=torch.float32):
    return 2 * torch.randn(shape, dtype=dtype) + 3, torch.randn(shape, dtype=dtype)


def step(layer, x, dy):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return [y.detach(), *grads, *(v.clone() for v in layer.buffers())]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_all_near(got, expected, **how):
    for a, b in zip(got, expected, strict=True):
        assert_near(a.detach(), b.double().detach() if torch.is_tensor(b) else b, **how)


def values(x):
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1]).double().numpy()


# --- ghost batches ------------------------------------------------------------------------------------------

CUTS = {
    "even": (8, 4, [4, 4]),
    "uneven": (8, 3, [3, 3, 2]),
    "a last single sample joins": (9, 4, [4, 5]),
    "twos": (7, 2, [2, 2, 3]),
}


@every_kind
@pytest.mark.parametrize(("samples", "size", "parts"), CUTS.values(), ids=CUTS)
def test_ghost_batches_are_batches_of_torchs_one_after_another(kind, torchs, shape, samples, size, parts):
    layer = prepared(kind(3, virtual_batch_size=size))
    other, peer = twin(layer, torchs).double(), twin(layer, torchs)
    x, dy = problem((samples, *shape[1:]))
    y, dx, dgamma, dbeta, mean, var, count = step(layer, x, dy)
    cut = list(zip(x.split(parts), dy.split(parts), strict=True))
    pieces, peers = [step(other, a.double(), b.double()) for a, b in cut], [step(peer, a, b) for a, b in cut]
    for i, got in enumerate((y, dx)):
        exact, torchs_own = (torch.cat([piece[i] for piece in each]).double() for each in (pieces, peers))
        assert_near(got, exact, peer=torchs_own, ulps=16)
    for i, got in ((2, dgamma), (3, dbeta)):
        exact, torchs_own = (sum(piece[i].double() for piece in each) for each in (pieces, peers))
        assert_near(got, exact, peer=torchs_own, ulps=16)
    start = prepared_like(layer, x)
    assert_all_near([mean, var], start)
    assert count == 1


def prepared_like(layer, x):
    """Return the running statistics that the whole batch gives, from those the seed gave."""
    torch.manual_seed(0)
    fresh = prepared(type(layer)(3))
    everything = values(x)
    mean, var = (v.double().numpy() for v in (fresh.running_mean, fresh.running_var))
    return 0.9 * mean + 0.1 * everything.mean(0), 0.9 * var + 0.1 * everything.var(0, ddof=1)


@every_kind
@pytest.mark.parametrize("size", [8, 9, 1000])
def test_a_ghost_batch_of_everything_is_the_plain_layer(kind, torchs, shape, size):
    layer = prepared(kind(3, virtual_batch_size=size))
    plain = twin(layer, kind)
    for _ in range(2):
        x, dy = problem(shape)
        # the plain layer's running statistics are ATen's own
        got, expected = step(layer, x, dy), step(plain, x, dy)
        assert_equal(got[:4], expected[:4])
        assert_all_near(got[4:6], expected[4:6])
        assert torch.equal(got[6], expected[6])


def test_ghost_batches_do_not_matter_in_evaluation():
    layer = prepared(bn.BatchNorm2d(3, virtual_batch_size=2)).eval()
    x, dy = problem((8, 3, 5, 2))
    assert_equal(step(layer, x, dy), step(twin(layer, nn.BatchNorm2d), x, dy))


def test_ghost_batches_differentiate_twice():
    layer = prepared(bn.BatchNorm1d(3, virtual_batch_size=3, dtype=torch.float64))
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, [x])
    assert torch.autograd.gradgradcheck(layer, [x])


def test_channels_last_ghost_batches_are_the_same():
    layer = prepared(bn.BatchNorm2d(3, virtual_batch_size=3))
    other = twin(layer, bn.BatchNorm2d, virtual_batch_size=3)
    x, dy = problem((8, 3, 5, 2))
    rows = [v.contiguous(memory_format=torch.channels_last) for v in (x, dy)]
    got, expected = step(layer, *rows), step(other, x, dy)
    assert_all_near(got[:6], expected[:6], ulps=16)


# --- renormalization ----------------------------------------------------------------------------------------


@every_kind
def test_renorm_without_room_is_the_plain_layer(kind, torchs, shape):
    layer = prepared(kind(3, renorm={**NOW, "rmax": 1.0, "dmax": 0.0}))
    other = twin(layer, torchs).double()
    for _ in range(2):
        x, dy = problem(shape)
        got, expected = step(layer, x, dy), step(other, x.double(), dy.double())
        assert_all_near(got[:6], expected[:6], ulps=16)


@every_kind
def test_renorm_without_bounds_gives_the_output_of_evaluation(kind, torchs, shape):
    layer = prepared(kind(3, renorm={**NOW, "rmax": np.inf, "dmax": np.inf}, dtype=torch.float64))
    for _ in range(3):
        x, _ = problem(shape, torch.float64)
        before = twin(layer, torchs).eval()
        torch.testing.assert_close(layer(x), before(x), rtol=1e-12, atol=1e-12)


def schedule(step, full, start, end):
    return float(np.interp(step, [start, end], [0.0, full]))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"momentum": 0.4}], ids=str)
def test_renorm_is_the_definitions_over_its_whole_schedule(kind, torchs, shape, dtype, options):
    bounds = {"rmax": 1.6, "dmax": 0.7, "start": 1, "dmax_at": 4, "rmax_at": 5}
    layer = prepared(kind(3, renorm=bounds, dtype=dtype, **options))
    ghosts = {"virtual_batch_size": options.get("virtual_batch_size")}
    for t in range(8):
        x, dy = problem(shape, dtype)
        renorm = Renorm(1 + schedule(t, 0.6, 1, 5), schedule(t, 0.7, 1, 4))
        numbers = [v.detach().double().numpy() for v in (x, layer.weight, layer.bias, *layer.running()[:2])]
        expected = batch_norm_train(*numbers, decay=1 - layer.momentum, renorm=renorm, **ghosts)
        grads = batch_norm_backward(dy.double().numpy(), *numbers[:2], *numbers[3:], renorm=renorm, **ghosts)
        y, dx, dgamma, dbeta, mean, var, count = step(layer, x, dy)
        # x̂ in float32, and three more roundings for r, d, γ and β
        assert_all_near([y, dx, dgamma, dbeta], [expected.y, *grads], ulps=32)
        assert_all_near([mean, var], [expected.running_mean, expected.running_var], ulps=8)
        assert count == t + 1


def test_renorm_corrects_towards_the_statistics_before_the_step_by_constants():
    layer = prepared(bn.BatchNorm1d(3, renorm={**NOW, "rmax": 2.0, "dmax": 1.0}, eps=1e-30, dtype=torch.float64))
    x, dy = problem((6, 3), torch.float64)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    r = (x.std(0, correction=0) / var.sqrt()).clamp(1 / 2, 2)
    d = ((x.mean(0) - mean) / var.sqrt()).clamp(-1, 1)
    leaf = x.clone().requires_grad_()
    x_hat = (leaf - leaf.mean(0)) / leaf.std(0, correction=0)
    expected = torch.autograd.grad((x_hat * r + d) * layer.weight + layer.bias, [leaf, *layer.parameters()], dy)
    for got, wanted in zip(step(layer, x, dy)[1:4], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("step", "rmax", "dmax"),
    [
        (0, 1.0, 0.0),
        (100, 1.0, 0.0),
        (300, 1 + 2 * 200 / 700, 2.5),
        (500, 1 + 2 * 400 / 700, 5.0),
        (800, 3.0, 5.0),
        (9**9, 3.0, 5.0),
    ],
)
def test_the_default_schedule_is_plain_first_and_then_relaxed_linearly(step, rmax, dmax):
    bounds = bn.RenormSchedule().bounds(step)
    assert bounds == pytest.approx((rmax, dmax))


@pytest.mark.parametrize("step", [0, 99, 100, 101, 499, 500])
def test_bounds_of_infinity_are_reached_at_once_at_their_end(step):
    bounds = bn.RenormSchedule(rmax=np.inf, dmax=np.inf, start=100, dmax_at=300, rmax_at=500).bounds(step)
    assert bounds == (np.inf if step >= 500 else 1.0, np.inf if step >= 300 else 0.0)


def test_a_schedule_that_starts_at_once_is_at_its_end():
    assert bn.RenormSchedule(rmax=2.0, dmax=1.0, **NOW).bounds(0) == (2.0, 1.0)


def test_the_default_renorm_does_nothing_at_first_and_something_after_its_warm_up():
    layer = prepared(bn.BatchNorm1d(3, renorm=True))
    plain = twin(layer, bn.BatchNorm1d)
    x = torch.randn(6, 3)
    assert_near(layer(x).detach(), plain(x).double().detach(), ulps=16)
    for other in (layer, plain):
        other.num_batches_tracked.fill_(1000)
    assert (layer(x) - plain(x)).abs().max() > 0.1


@pytest.mark.parametrize("given", [True, {}, bn.RenormSchedule()], ids=str)
def test_renorm_is_given_as_true_as_fields_or_as_a_schedule(given):
    assert bn.BatchNorm1d(3, renorm=given).options.renorm == bn.RenormSchedule()


@pytest.mark.parametrize("given", [False, None])
def test_no_renorm_is_no_renorm(given):
    assert bn.BatchNorm1d(3, renorm=given).options.renorm is None


def test_renorm_counts_the_batches_of_its_domain():
    layer = bn.BatchNorm1d(3, renorm={"start": 2, "dmax_at": 3, "rmax_at": 3}, domains=["photo"], dtype=torch.float64)
    for _ in range(9):
        layer(torch.randn(6, 3, dtype=torch.float64) + 4)
    plain = bn.BatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64) + 4
    with bn.domain(layer, "photo"):
        torch.testing.assert_close(layer(x), plain(x))


def test_renorm_in_evaluation_is_torchs_evaluation():
    layer = prepared(bn.BatchNorm2d(3, renorm=NOW)).eval()
    x, dy = problem((4, 3, 5, 2))
    assert_equal(step(layer, x, dy), step(twin(layer, nn.BatchNorm2d), x, dy))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_renorm_in_half_precision_is_finite_and_near(kind, torchs, shape, dtype):
    layer = prepared(kind(3, renorm=NOW))
    x, dy = problem(shape, dtype)
    numbers = [v.detach().double().numpy() for v in (x, layer.weight, layer.bias, *layer.running()[:2])]
    expected = batch_norm_train(*numbers, renorm=Renorm(3.0, 5.0))
    y, dx, *rest = step(layer, x, dy)
    assert y.dtype == dx.dtype == dtype
    assert all(torch.isfinite(v).all() for v in (dx, *rest))
    # 2**13 and 2**16 units of float32 are one of float16, of bfloat16
    assert_near(y.float(), expected.y, ulps=2 * {torch.float16: 2**13, torch.bfloat16: 2**16}[dtype])
    assert_all_near(rest[2:4], [expected.running_mean, expected.running_var], ulps=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"renorm": NOW}, {"virtual_batch_size": 4}, {"activation": "gelu"}], ids=str)
def test_options_work_under_autocast(dtype, options):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), prepared(bn.BatchNorm2d(3, **options)))
    x = torch.randn(8, 2, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = model(x)
    y.backward(torch.randn_like(y))
    assert all(torch.isfinite(v).all() for v in (y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()))
    assert model[1].running_mean.dtype == torch.float32


# --- an example's own statistics ----------------------------------------------------------------------------

SPATIAL = {name: kind for name, kind in KINDS.items() if name != "features"}
every_spatial = pytest.mark.parametrize(("kind", "torchs", "shape"), SPATIAL.values(), ids=SPATIAL)


@every_spatial
def test_a_share_of_nothing_is_torchs_evaluation(kind, torchs, shape):
    layer = prepared(kind(3, example_weight=0.0)).eval()
    x, dy = problem(shape)
    assert_equal(step(layer, x, dy), step(twin(layer, torchs), x, dy))


@every_spatial
def test_a_share_of_everything_is_instance_normalization(kind, torchs, shape):
    layer = prepared(kind(3, example_weight=1.0)).eval()
    x, dy = problem(shape)
    leaves = [v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias)]
    y = nn.functional.instance_norm(leaves[0], weight=leaves[1], bias=leaves[2], eps=layer.eps)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    assert_all_near(step(layer, x, dy)[:4], expected)


def by_formulas(x, mean, variance, gamma, beta, a, eps):
    """Return what functional/example.py's docstring says."""
    places = tuple(range(2, x.ndim))

    def wide(v):
        return v.reshape(1, -1, *[1] * len(places))

    own_mean, own_variance = x.mean(places, keepdims=True), x.var(places, keepdims=True)
    mu = (1 - a) * wide(mean) + a * own_mean
    var = (1 - a) * wide(variance) + a * own_variance + a * (1 - a) * (own_mean - wide(mean)) ** 2
    return wide(gamma) * (x - mu) / np.sqrt(var + eps) + wide(beta)


@every_spatial
@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_a_mixture_is_that_of_the_formulas(kind, torchs, shape, a):
    layer = prepared(kind(3, example_weight=a, eps=1e-3)).eval()
    x, _ = problem(shape)
    numbers = [v.detach().double().numpy() for v in (x, *layer.running()[:2], layer.weight, layer.bias)]
    assert_near(layer(x).detach(), by_formulas(*numbers, a, 1e-3))


def test_a_mixture_has_the_right_gradients():
    layer = prepared(bn.BatchNorm2d(3, example_weight=0.3, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), [x, *layer.parameters()])


def test_examples_do_not_see_each_other():
    layer = prepared(bn.BatchNorm1d(3, example_weight=0.4)).eval()
    x = torch.randn(4, 3, 5)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


def test_an_examples_share_does_not_matter_in_training():
    layer = prepared(bn.BatchNorm2d(3, example_weight=0.5))
    other = twin(layer, nn.BatchNorm2d).double()
    x, dy = problem((8, 3, 5, 2))
    assert_all_near(step(layer, x, dy)[:6], step(other, x.double(), dy.double())[:6], ulps=16)


def test_an_input_without_places_has_no_statistics_of_its_own():
    model = nn.Sequential(bn.BatchNorm1d(3, example_weight=0.5)).eval()
    with pytest.raises(ShapeError, match=r"layer '0'.*spatial axes.*\(4, 3\)"):
        model(torch.randn(4, 3))


# --- activation and residual --------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_activation_and_residual_are_those_of_torch_after_the_plain_layer(
    kind, torchs, shape, activation, with_residual, training
):
    layer = prepared(kind(3, activation=activation)).train(training)
    plain = twin(layer, kind)
    x, dy = problem(shape)
    residual = torch.randn(shape) if with_residual else torch.zeros(shape)
    named = {"leaky_relu": nn.functional.leaky_relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    f = named.get(activation) or (lambda v: v if activation is None else getattr(nn.functional, activation)(v))
    leaves = [[v.clone().requires_grad_() for v in (x, residual)] for _ in range(2)]
    got = layer(leaves[0][0], residual=leaves[0][1] if with_residual else None)
    expected = f(plain(leaves[1][0]) + leaves[1][1])
    assert_near(got.detach(), expected.double().detach())
    for y, module, (leaf, other) in ((got, layer, leaves[0]), (expected, plain, leaves[1])):
        y.backward(dy)
        leaf.results = [leaf.grad, *(p.grad for p in module.parameters())] + ([other.grad] if with_residual else [])
    assert_all_near(leaves[0][0].results, leaves[1][0].results, ulps=16)
    assert_all_near(list(layer.buffers())[:2], list(plain.buffers())[:2])


def test_activation_and_residual_differentiate_twice():
    layer = prepared(bn.BatchNorm1d(3, activation="tanh", dtype=torch.float64))
    x, residual = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda x, residual: layer(x, residual=residual), [x, residual])


def test_the_residual_of_another_shape_is_named():
    with pytest.raises(ShapeError, match=r"residual must have the shape of the input, \(4, 3\), got \(4, 1\)"):
        bn.BatchNorm1d(3)(torch.randn(4, 3), residual=torch.randn(4, 1))


def test_input_and_residual_are_not_written_to():
    layer = bn.BatchNorm1d(3, activation="relu")
    x, residual = torch.randn(4, 3), torch.randn(4, 3)
    copies = x.clone(), residual.clone()
    layer(x, residual=residual)
    assert_equal([x, residual], copies)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_ghost_batches_of_one_sample_are_refused(size):
    with pytest.raises(OptionError, match=f"virtual_batch_size must be at least 2 samples, got {size}"):
        bn.BatchNorm1d(3, virtual_batch_size=size)
