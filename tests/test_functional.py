"""The definition, held to closed forms, finite differences, the paper's printed gradients, torch and JAX."""

import re
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import Moments
from batchnorm.errors import OptionError, ShapeError
from batchnorm.functional import (
    Renorm,
    batch_norm_backward,
    batch_norm_example_inference,
    batch_norm_inference,
    batch_norm_inference_backward,
    batch_norm_train,
    ghost_batches,
    update_running,
)
from oracle import assert_near

# float64 rounding of sums of some hundred values of order one, and nothing else
same = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
# ten times what `central_difference` errs
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-8)


class Case(NamedTuple):
    """A problem for the definition: shape of the input, shape of γ, options."""

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    options: dict

    def arrays(self):
        """Return dy, x, γ, β: an upstream gradient is random, for that of a sum is annihilated."""
        rng = np.random.default_rng(0)
        dy, x = rng.normal(size=self.shape), rng.normal(1.0, 2.0, self.shape)
        return dy, x, np.asarray(rng.normal(size=self.kept)), np.asarray(rng.normal(size=self.kept))


def some(*shape):
    return np.random.default_rng(7).random(shape) < 0.7


def frequency(*shape):
    return np.random.default_rng(8).uniform(0.5, 3.0, shape)


# so far from the batch that every r and d is at its bound, where finite differences see a constant too
FAR = {
    "running_mean": np.array([9.0, -9.0]),
    "running_var": np.array([0.01, 90.0]),
    "renorm": Renorm(1.05, 0.03),
}

CASES = {
    "dense": Case((5, 3), (3,), {}),
    "sequence": Case((3, 2, 5), (2,), {"eps": 0.1}),
    "volume": Case((2, 3, 1, 3, 2), (3,), {}),
    "per activation": Case((5, 2, 3), (2, 3), {"axes": "per-activation"}),
    "channels last": Case((3, 4, 2), (2,), {"axes": (0, 1)}),
    "negative axes out of order": Case((4, 2, 3), (2,), {"axes": (-1, 0)}),
    "the same axis twice": Case((5, 3), (3,), {"axes": (0, -2)}),
    "one axis that is not the batch": Case((2, 5), (2,), {"axes": 1}),
    "one statistic for everything": Case((3, 4), (), {"axes": (0, 1)}),
    "mask": Case((3, 2, 5), (2,), {"mask": some(3, 5)}),
    "mask of samples, per activation": Case((6, 2, 2), (2, 2), {"axes": "per-activation", "mask": some(6)}),
    "mask of places": Case((2, 2, 3, 4), (2,), {"mask": some(1, 3, 4)}),
    "mask, axes out of order": Case((4, 2, 3), (2,), {"axes": (-1, 0), "mask": some(4, 3)}),
    "sample weights": Case((5, 2, 2), (2,), {"sample_weight": frequency(5)}),
    "weights of places": Case((3, 2, 4), (2,), {"sample_weight": frequency(3, 4)}),
    "mask and weights": Case((4, 2, 3), (2,), {"mask": some(4, 3), "sample_weight": frequency(4)}),
    "uneven ghosts": Case((7, 2), (2,), {"virtual_batch_size": 3}),
    "masked, weighted ghosts": Case(
        (5, 2, 4), (2,), {"virtual_batch_size": 2, "mask": some(5, 4), "sample_weight": frequency(5, 1)}
    ),
    "ghosts, per activation": Case((6, 2, 2), (2, 2), {"virtual_batch_size": 3, "axes": "per-activation"}),
    "renorm": Case((5, 2), (2,), FAR),
    "masked ghosts with renorm": Case((6, 2, 3), (2,), FAR | {"virtual_batch_size": 3, "mask": some(6, 3)}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Printed(NamedTuple):
    """What `printed` returns; statistics and parameters in the shape of γ."""

    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def printed(dy, x, gamma=None, beta=None, axes=(0,), eps=1e-5):
    """Algorithm 1 and the six gradients as Ioffe and Szegedy printed them, in extended precision."""
    dy, x = (np.asarray(v, dtype=np.longdouble) for v in (dy, x))
    gamma = 1.0 if gamma is None else np.expand_dims(np.asarray(gamma, np.longdouble), axes)
    beta = 0.0 if beta is None else np.expand_dims(np.asarray(beta, np.longdouble), axes)
    total, m = partial(np.sum, axis=axes, keepdims=True), np.prod([x.shape[a] for a in axes])
    mean = total(x) / m
    var = total((x - mean) ** 2) / m
    x_hat = (x - mean) / np.sqrt(var + eps)
    dx_hat = dy * gamma
    dvar = total(dx_hat * (x - mean)) * (-1 / 2) * (var + eps) ** (-3 / 2)
    dmean = total(dx_hat * -1 / np.sqrt(var + eps)) + dvar * total(-2 * (x - mean)) / m
    dx = dx_hat / np.sqrt(var + eps) + dvar * 2 * (x - mean) / m + dmean / m
    small = (np.squeeze(v, axes) for v in (total(dy * x_hat), total(dy), mean, var))
    return Printed(gamma * x_hat + beta, dx, *small)


def central_difference(f, v, h=1e-5):
    """Return ∂f/∂v; it errs by h²/6 of the third derivative and by an ulp of f over h, 1e-9 in all."""
    slope = np.empty_like(v)
    for i in np.ndindex(v.shape):
        up, down = v.copy(), v.copy()
        up[i] += h
        down[i] -= h
        slope[i] = (f(up) - f(down)) / (2 * h)
    return slope


def on(convert, options):
    return {key: convert(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}


def tensors(*arrays):
    return [torch.from_numpy(v).requires_grad_() for v in arrays]


# --- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "sequence", "volume", "per activation", "channels last"])
def test_forward_and_backward_are_those_of_the_paper(name):
    case = CASES[name]
    dy, x, gamma, beta = case.arrays()
    axes = {"per activation": (0,), "channels last": (0, 1)}.get(name, (0, *range(2, x.ndim)))
    expected = printed(dy, x, gamma, beta, axes, case.options.get("eps", 1e-5))
    got = batch_norm_train(x, gamma, beta, **case.options)
    same(got.y, expected.y)
    same(got.moments.mean, expected.mean)
    same(got.moments.variance, expected.var)
    grads = batch_norm_backward(dy, x, gamma, **case.options)
    for grad, of_the_paper in zip(grads, expected[1:4], strict=True):
        same(grad, of_the_paper)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
def test_the_compact_backward_needs_no_term_for_eps(rng, eps):
    dy, x, gamma = rng.normal(size=(7, 3)), rng.normal(size=(7, 3)), rng.normal(size=3)
    same(batch_norm_backward(dy, x, gamma, eps=eps).dx, printed(dy, x, gamma, eps=eps).dx)


def test_one_value_a_channel_gives_beta_and_no_gradient():
    dy, x, gamma, beta = Case((1, 3), (3,), {}).arrays()
    assert np.array_equal(batch_norm_train(x, gamma, beta).y, beta[None])
    grads = batch_norm_backward(dy, x, gamma)
    assert np.array_equal(grads.dx, np.zeros((1, 3)))
    assert np.array_equal(grads.dgamma, np.zeros(3))
    assert np.array_equal(grads.dbeta, dy[0])


def test_two_values_a_channel_give_plus_and_minus_one_and_no_gradient(rng):
    dy, x = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    same(batch_norm_train(x, eps=0.0).y, np.sign(x - x.mean(0)))
    same(batch_norm_backward(dy, x, eps=0.0).dx, np.zeros((2, 4)), atol=1e-11)  # divided by deviations down to 0.1


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_no_normalized_value_exceeds_the_root_of_m_minus_one(seed, m):
    x = np.random.default_rng(seed).standard_cauchy((m, 3))
    # two values that agree in five digits leave eleven to their normalized ones
    assert np.abs(batch_norm_train(x, eps=0.0).y).max() <= np.sqrt(m - 1) * (1 + 1e-9)
    x[:, 0] = np.eye(m)[0]
    same(batch_norm_train(x, eps=0.0).y[0, 0], np.sqrt(m - 1))


@pytest.mark.parametrize("a", [1e-3, 0.5, 1e3])
def test_scaled_weights_are_a_scaled_eps(rng, a):
    u, w, dy = rng.normal(size=(9, 4)), rng.normal(size=(4, 3)), rng.normal(size=(9, 3))
    same(batch_norm_train(a * (u @ w), eps=1e-5).y, batch_norm_train(u @ w, eps=1e-5 / a**2).y)
    same(
        a * batch_norm_backward(dy, a * (u @ w), eps=1e-5).dx,
        batch_norm_backward(dy, u @ w, eps=1e-5 / a**2).dx,
    )


def test_a_negative_scale_of_the_input_flips_the_sign(rng):
    x = rng.normal(size=(9, 3))
    same(batch_norm_train(-4.0 * x, eps=0.0).y, -batch_norm_train(x, eps=0.0).y)


def test_the_backward_takes_two_directions_out_of_the_gradient(rng):
    """By Pythagoras: |dx|² = γ²/σ² · (|dy|² - <1, dy>²/m - <dy, x̂>²/m), for each feature."""
    m, dy, x, gamma = 12, rng.normal(size=(12, 5)), rng.normal(size=(12, 5)), rng.normal(size=5)
    x_hat = (x - x.mean(0)) / x.std(0)
    kept = (dy**2).sum(0) - dy.sum(0) ** 2 / m - (dy * x_hat).sum(0) ** 2 / m
    same((batch_norm_backward(dy, x, gamma, eps=0.0).dx ** 2).sum(0), gamma**2 / x.var(0) * kept)


def test_a_bias_before_the_norm_is_redundant(rng):
    u, w = rng.normal(size=(8, 4)), rng.normal(size=(4, 3))
    bias = torch.tensor(rng.normal(size=3), requires_grad=True)
    y = batch_norm_train(torch.from_numpy(u @ w) + bias).y
    same(y.detach(), batch_norm_train(u @ w).y)
    (db,) = torch.autograd.grad(y, bias, torch.from_numpy(rng.normal(size=(8, 3))))
    same(db, np.zeros(3))


def test_an_empty_batch_gives_nothing_and_changes_nothing(rng):
    x, running = np.zeros((0, 3)), (rng.normal(size=3), rng.random(3))
    got = batch_norm_train(x, None, None, *running)
    assert got.y.shape == (0, 3)
    assert np.array_equal((got.running_mean, got.running_var), running)
    grads = batch_norm_backward(x, x)
    assert grads.dx.shape == (0, 3)
    assert np.array_equal((grads.dgamma, grads.dbeta), np.zeros((2, 3)))


# --- derivatives --------------------------------------------------------------------------------------------


@every_case
def test_backward_agrees_with_finite_differences(case):
    dy, x, gamma, beta = case.arrays()

    def loss(x=x, gamma=gamma, beta=beta):
        return float(np.sum(dy * batch_norm_train(x, gamma, beta, **case.options).y))

    grads = batch_norm_backward(dy, x, gamma, **case.options)
    close(grads.dx, central_difference(lambda v: loss(x=v), x))
    close(grads.dgamma, central_difference(lambda v: loss(gamma=v), gamma))
    close(grads.dbeta, central_difference(lambda v: loss(beta=v), beta))


def test_renorm_far_away_is_at_its_bounds():
    """Otherwise the finite differences above would see r and d move, which the definition holds constant."""
    _, x, *_ = CASES["renorm"].arrays()
    sigma = np.sqrt(FAR["running_var"] + 1e-5)
    r, d = x.std(0) / sigma, (x.mean(0) - FAR["running_mean"]) / sigma
    assert np.all((r < 0.9) | (r > 1.1))
    assert np.all(np.abs(d) > 0.1)


@every_case
def test_autograd_through_the_definition_is_the_explicit_backward(case):
    dy, x, gamma, beta = case.arrays()
    options, inputs = on(torch.from_numpy, case.options), tensors(x, gamma, beta)
    grads = torch.autograd.grad(batch_norm_train(*inputs, **options).y, inputs, torch.from_numpy(dy))
    expected = batch_norm_backward(dy, x, gamma, **case.options)
    explicit = batch_norm_backward(torch.from_numpy(dy), *inputs[:2], **options)
    for by_autograd, by_torch, by_numpy in zip(grads, explicit, expected, strict=True):
        same(by_autograd, by_numpy)
        same(by_torch.detach(), by_numpy)


@every_case
def test_second_derivatives_are_right(case):
    _, x, gamma, beta = case.arrays()
    options = on(torch.from_numpy, case.options)
    assert torch.autograd.gradgradcheck(lambda *v: batch_norm_train(*v, **options).y, tensors(x, gamma, beta))


@every_case
def test_function_transforms_agree_with_loops(case):
    dy, x, gamma, beta = map(torch.from_numpy, case.arrays())
    options = on(torch.from_numpy, case.options)
    xs, dys = torch.stack([x, torch.randn_like(x)]), torch.stack([dy, torch.randn_like(dy)])

    def forward(x):
        return batch_norm_train(x, gamma, beta, **options).y

    def gradient(dy, x):
        return torch.func.grad(lambda v: (dy * forward(v)).sum())(x)

    same(torch.func.vmap(forward)(xs), torch.stack([forward(v) for v in xs]))
    explicit = [batch_norm_backward(g, v, gamma, **options).dx for g, v in zip(dys, xs, strict=True)]
    same(torch.func.vmap(gradient)(dys, xs), torch.stack(explicit))
    tangent = torch.randn_like(x)
    _, pushed = torch.func.jvp(forward, (x,), (tangent,))
    # <dy, J t> = <Jᵀ dy, t>
    same((dy * pushed).sum(), (explicit[0] * tangent).sum())


@every_case
def test_jax_gives_the_same_numbers_and_gradients(case):
    arrays = case.arrays()
    expected, gradients = (
        batch_norm_train(*arrays[1:], **case.options),
        batch_norm_backward(*arrays[:3], **case.options),
    )
    with jax.enable_x64(True):
        dy, *inputs = map(jax.numpy.asarray, arrays)
        options = on(jax.numpy.asarray, case.options)

        def loss(*inputs):
            got = batch_norm_train(*inputs, **options)
            return (dy * got.y).sum(), (got.y, got.moments.mean, got.moments.m2)

        grads, got = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        for ours, numpys in zip(got, (expected.y, expected.moments.mean, expected.moments.m2), strict=True):
            assert ours.dtype == "float64"
            same(ours, numpys)
        for ours, numpys in zip(grads, gradients, strict=True):
            same(ours, numpys)


def test_jax_without_float64_computes_in_float32(rng):
    x = rng.normal(size=(9, 3)).astype(np.float32)
    got = batch_norm_train(jax.numpy.asarray(x), running_mean=jax.numpy.zeros(3), running_var=jax.numpy.ones(3))
    assert {v.dtype.name for v in (got.y, got.moments.mean, got.running_var)} == {"float32"}
    assert_near(got.y, batch_norm_train(x.astype(np.float64)).y)


# --- hard inputs, against torch and the paper ---------------------------------------------------------------


def normal(*shape, loc=0.0, scale=1.0):
    return loc + scale * torch.randn(shape, dtype=torch.float64)


def with_a_constant_channel(value):
    x = normal(6, 3, 4, 4)
    x[:, 1] = value
    return x


def strided(x):
    """Return the values of ``x`` with gaps between them and the axes of the memory in another order."""
    return torch.stack([x.mT.contiguous().mT, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def plain(x):
    return x


# why it is hard: (values, layout, γ and β where they matter)
HARD = {
    "two values a channel": lambda: (normal(2, 3), plain, {}),
    "two values a channel, in one sample": lambda: (normal(1, 3, 1, 2), plain, {}),
    "odd sizes": lambda: (normal(3, 3, 7, 5), plain, {}),
    "one channel": lambda: (normal(5, 1, 3), plain, {"gamma": torch.ones(1), "beta": torch.ones(1)}),
    "1x1 maps": lambda: (normal(6, 3, 1, 1), plain, {}),
    "a volume": lambda: (normal(2, 3, 2, 3, 4), plain, {}),
    "non-contiguous": lambda: (normal(4, 3, 5, 6), strided, {}),
    "channels-last tensor": lambda: (
        normal(4, 3, 5, 6),
        partial(torch.Tensor.contiguous, memory_format=torch.channels_last),
        {},
    ),
    "a constant channel": lambda: (with_a_constant_channel(100.1), plain, {}),
    "a channel of zeros": lambda: (with_a_constant_channel(0.0), plain, {}),
    "huge mean": lambda: (normal(64, 3, 4, 4, loc=1e4), plain, {}),
    "squares that overflow float16": lambda: (normal(64, 3, loc=-3e4, scale=300.0), plain, {}),
    "tiny variance": lambda: (normal(16, 3, scale=1e-4), plain, {}),
    "gamma is zero": lambda: (normal(8, 3), plain, {"gamma": torch.zeros(3)}),
    "gamma is negative": lambda: (normal(8, 3), plain, {"gamma": torch.tensor([-2.0, -1e-3, -1.0])}),
    "no gamma": lambda: (normal(8, 3), plain, {"gamma": None}),
    "no beta": lambda: (normal(8, 3), plain, {"beta": None}),
    "neither gamma nor beta": lambda: (normal(8, 3), plain, {"gamma": None, "beta": None}),
}
every_hard_input = pytest.mark.parametrize("hard", HARD.values(), ids=HARD)


def hard_problem(hard, dtype):
    """Return dy, x, γ, β, running mean and variance, in a dtype; and the same for the oracle."""
    x, layout, given = hard()
    parameters = {"gamma": torch.randn(3), "beta": torch.randn(3)} | given
    running = [torch.randn(x.shape[1]), torch.rand(x.shape[1])]
    problem = [layout(torch.randn_like(x).to(dtype)), layout(x.to(dtype))]
    return problem + [None if v is None else v.to(dtype) for v in (*parameters.values(), *running)]


def by_torch(dy, x, gamma, beta, running_mean, running_var):
    """Return y, the running statistics and the gradients of torch's own kernels."""
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in (x, gamma, beta)]
    running = running_mean.clone(), running_var.clone()
    y = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], training=True)
    y.backward(dy)
    return [y.detach(), *running, *(None if v is None else v.grad for v in leaves)]


def by_definition(dy, x, gamma, beta, running_mean, running_var):
    got, grads = (
        batch_norm_train(x, gamma, beta, running_mean, running_var),
        batch_norm_backward(dy, x, gamma),
    )
    return [got.y, got.running_mean, got.running_var, *grads]


def by_paper(dy, x, gamma, beta, running_mean, running_var):
    axes, m = (0, *range(2, x.ndim)), x.numel() // x.shape[1]
    exact = printed(dy, x, gamma, beta, axes)
    running = (
        0.9 * running_mean.numpy().astype(np.longdouble),
        0.9 * running_var.numpy().astype(np.longdouble),
    )
    one_tenth = np.longdouble(1 - 0.9)
    running = running[0] + one_tenth * exact.mean, running[1] + one_tenth * exact.var * m / (m - 1)
    return [exact.y, *running, *exact[1:4]]


def subtracted(dy, x, gamma, beta, running_mean, running_var):
    """Return for each result a bound of the numbers that it is the difference of: their ulps it can't escape."""
    dy, x, gamma, beta, *running = (
        0.0 if v is None else np.abs(v.double().numpy())
        for v in (dy, x, torch.ones(1) if gamma is None else gamma, beta, running_mean, running_var)
    )
    axes, m = (0, *range(2, x.ndim)), x.size // x.shape[1]
    largest, upstream, spread = x.max(axes), dy.max(axes), x.std(axes)
    slope = 1 / np.sqrt(spread**2 + 1e-5)
    standardized = 1 + largest * slope
    statistics = [largest + running[0], largest * spread + running[1]]
    gradients = [gamma * slope * upstream * standardized, m * upstream * standardized, m * upstream]
    return [v.max() for v in (gamma * standardized + beta, *statistics, *gradients)]


RESULTS = ["y", "running mean", "running variance", "dx", "dγ", "dβ"]


@every_hard_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_definition_errs_at_most_twice_as_much_as_torch(hard, dtype):
    problem = hard_problem(hard, dtype)
    exact, peers, sizes = by_paper(*problem), by_torch(*problem), subtracted(*problem)
    results = zip(RESULTS, by_definition(*problem), exact, peers, sizes, strict=True)
    for what, got, expected, peer, size in results:
        # dγ and dβ come in float64: rounded, so that they are held to the units of what torch returns
        rounded = got if peer is None else got.to(peer.dtype)
        largest = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
        ulps = 4 * max(1.0, size / largest) if rounded.dtype == torch.float64 else 1
        assert_near(rounded, expected, peer=peer, ulps=ulps, what=what)


@every_hard_input
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_results_in_a_narrow_dtype_are_exact_but_for_one_rounding(hard, dtype):
    """Twice torch's error is not strict where torch is bad: at a constant channel, at a huge mean."""
    problem = hard_problem(hard, dtype)
    for what, got, expected in zip(RESULTS[:4], by_definition(*problem), by_paper(*problem), strict=False):
        assert got.dtype == dtype
        assert_near(got, expected, ulps=1, what=what)


def test_bfloat16_is_float64_rounded_once():
    dy, x, gamma = (v.bfloat16() for v in (torch.randn(8, 3), torch.randn(8, 3), torch.randn(3)))
    wide = dy.double(), x.double(), gamma.double()
    assert torch.equal(batch_norm_train(x, gamma).y, batch_norm_train(*wide[1:]).y.bfloat16())
    assert torch.equal(batch_norm_backward(dy, x, gamma).dx, batch_norm_backward(*wide).dx.bfloat16())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e3, 1e4])
def test_a_mean_far_from_zero_costs_no_accuracy(rng, dtype, ratio):
    x, dy = rng.normal(ratio, 1.0, (512, 3)).astype(dtype), rng.normal(size=(512, 3)).astype(dtype)
    exact = printed(dy, x)
    got = batch_norm_train(x)
    assert_near(got.y, exact.y, ulps=1)
    assert_near(batch_norm_backward(dy, x).dx, exact.dx, ulps=1)
    np.testing.assert_allclose(got.moments.variance, exact.var.astype(float), rtol=1e-11)


def test_the_rounding_of_the_mean_is_taken_out_of_the_variance():
    """Their mean, 10¹⁶ + 4/3, is no float64: two passes alone would give 4."""
    x = 1e16 + np.array([[0.0], [2.0], [2.0]])
    same(batch_norm_train(x).moments.m2, 8 / 3)


def test_a_constant_channel_gives_exactly_beta_in_float32():
    x, beta = np.full((30, 1), 100.1, dtype=np.float32), np.array([0.25])
    assert np.array_equal(batch_norm_train(x, beta=beta).y, np.full((30, 1), 0.25, dtype=np.float32))


def test_dtypes_of_the_results(rng):
    x, half = rng.normal(size=(4, 2)).astype(np.float32), np.ones(2, dtype=np.float16)
    got, grads = batch_norm_train(x, half, half, half, half), batch_norm_backward(x, x, half)
    assert (got.y.dtype, got.running_mean.dtype, got.running_var.dtype) == (
        np.float32,
        np.float16,
        np.float16,
    )
    assert (grads.dx.dtype, grads.dgamma.dtype, grads.dbeta.dtype) == (np.float32, np.float64, np.float64)
    assert got.moments.mean.dtype == np.float64
    assert batch_norm_inference(x, half, half).dtype == np.float32
    assert batch_norm_inference_backward(x, x, half, half).dx.dtype == np.float32


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"renorm": Renorm(1.1, 0.1)}], ids=["plain", "renorm"])
def test_a_mask_is_batch_normalization_of_the_valid_values_alone(rng, options):
    mask, running = some(4, 5), (rng.normal(size=2), rng.random(2))
    dy, x, gamma, beta = Case((4, 2, 5), (2,), {}).arrays()

    def pack(v):
        return np.moveaxis(v, 1, -1)[mask]

    got = batch_norm_train(x, gamma, beta, *running, mask=mask, **options)
    packed = batch_norm_train(pack(x), gamma, beta, *running, **options)
    same(pack(got.y), packed.y)
    same(got.running_mean, packed.running_mean)
    same(got.running_var, packed.running_var)
    grads = batch_norm_backward(dy, x, gamma, *running, mask=mask, **options)
    expected = batch_norm_backward(pack(dy), pack(x), gamma, *running, **options)
    same(pack(grads.dx), expected.dx)
    same((grads.dgamma, grads.dbeta), expected[1:])


def test_masked_places_are_zero_in_output_and_gradient():
    case = CASES["masked, weighted ghosts"]
    dy, x, gamma, beta = case.arrays()
    hidden = np.broadcast_to(~case.options["mask"][:, None], x.shape)
    assert np.array_equal(batch_norm_train(x, gamma, beta, **case.options).y[hidden], np.zeros(hidden.sum()))
    grads = batch_norm_backward(dy, x, gamma, **case.options)
    assert np.array_equal(grads.dx[hidden], np.zeros(hidden.sum()))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mask", "mask and weights", "masked, weighted ghosts", "masked ghosts with renorm"])
def test_what_is_masked_reaches_no_bit_of_the_results(name, poison):
    case = CASES[name]
    dy, x, gamma, beta = case.arrays()
    mask = np.broadcast_to(case.options["mask"][:, None], x.shape)
    clean, dirty = ([np.where(mask, v, filling) for v in (dy, x)] for filling in (0.0, poison))
    options, running = on(torch.from_numpy, case.options), {"running_mean": gamma, "running_var": gamma**2}
    results = []
    for dy, x in (clean, dirty):
        got = batch_norm_train(x, gamma, beta, **running | case.options)
        inputs = tensors(x, gamma, beta)
        y = batch_norm_train(*inputs, **options).y
        by_autograd = torch.autograd.grad(y, inputs, torch.from_numpy(dy))
        moved = [got.y, got.moments.mean, got.moments.m2, got.running_mean, got.running_var]
        results.append([*moved, *batch_norm_backward(dy, x, gamma, **case.options), *by_autograd])
    for without, with_poison in zip(*results, strict=True):
        assert np.array_equal(with_poison, without)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"mask": np.zeros((4, 5), dtype=bool)},
        {"mask": np.zeros(5, dtype=bool), "virtual_batch_size": 2},
        {"mask": np.zeros((4, 5), dtype=bool), "renorm": Renorm(3.0, 5.0)},
    ],
    ids=["plain", "ghosts", "renorm"],
)
def test_a_batch_that_is_masked_altogether_changes_nothing(rng, options, unbiased):
    x, running = np.full((4, 2, 5), np.nan), (rng.normal(size=2), rng.random(2))
    got = batch_norm_train(x, None, rng.normal(size=2), *running, unbiased=unbiased, **options)
    assert np.array_equal((got.running_mean, got.running_var), running)
    assert np.array_equal(got.y, np.zeros((4, 2, 5)))
    assert np.all(got.moments.count == 0)
    for grad in batch_norm_backward(x, x, None, *running, **options):
        assert np.array_equal(grad, np.zeros(grad.shape))
    leaf = torch.from_numpy(x).requires_grad_()
    running = map(torch.from_numpy, running)
    y = batch_norm_train(leaf, None, None, *running, **on(torch.from_numpy, options)).y
    assert torch.equal(torch.autograd.grad(y, leaf, torch.from_numpy(x))[0], torch.zeros(4, 2, 5))


def test_a_ghost_batch_that_is_masked_altogether_leaves_the_others_alone():
    dy, x, gamma, beta = Case((4, 2, 5), (2,), {}).arrays()
    mask = np.repeat([[False], [True]], 2, axis=0)
    got, others = (
        batch_norm_train(x, gamma, beta, mask=mask, virtual_batch_size=2),
        batch_norm_train(x[2:], gamma, beta),
    )
    assert np.array_equal(got.y, np.concat([np.zeros((2, 2, 5)), others.y]))
    assert np.array_equal(got.moments.m2, others.moments.m2)
    grads = batch_norm_backward(dy, x, gamma, mask=mask, virtual_batch_size=2)
    assert np.array_equal(grads.dx[:2], np.zeros((2, 2, 5)))
    same(grads.dx[2:], batch_norm_backward(dy[2:], x[2:], gamma).dx)


@pytest.mark.parametrize("name", ["mask", "mask of places", "sample weights", "weights of places", "mask and weights"])
def test_statistics_are_weighted_averages_over_what_is_valid(name):
    case = CASES[name]
    _, x, gamma, beta = case.arrays()
    weight, valid = (case.options.get(key, np.ones(1)) for key in ("sample_weight", "mask"))
    weight, valid = (
        np.broadcast_to(v.reshape(len(v), 1, *(v.shape[1:] or [1] * (x.ndim - 2))), x.shape)
        for v in (weight, valid.astype(bool))
    )
    over = {"axis": (0, *range(2, x.ndim)), "keepdims": True, "weights": weight * valid}
    mean = np.average(x, **over)
    deviation = np.sqrt(np.average((x - mean) ** 2, **over) + 1e-5)
    gamma, beta = (v.reshape(mean.shape) for v in (gamma, beta))
    got = batch_norm_train(x, **case.options)
    same(got.y, valid * (x - mean) / deviation)
    same(batch_norm_train(x, gamma.ravel(), beta.ravel(), **case.options).y, valid * (gamma * got.y + beta))
    same(got.moments.count, (weight * valid)[:, 0].sum())


# --- sample weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_a_sample_of_weight_two_is_two_samples(rng, dtype):
    dy, x, gamma, beta = Case((3, 2, 4), (2,), {}).arrays()
    weight, running = np.array([2, 1, 1], dtype=dtype), (rng.normal(size=2), rng.random(2))
    got = batch_norm_train(x, gamma, beta, *running, sample_weight=weight)
    twice = batch_norm_train(x[[0, 0, 1, 2]], gamma, beta, *running)
    same(got.y, twice.y[1:])
    same(got.running_mean, twice.running_mean)
    same(got.running_var, twice.running_var)
    assert np.all(got.moments.count == twice.moments.count)
    # the loss sees the output of the doubled sample once, and what enters it twice
    once = np.concat([np.zeros_like(dy[:1]), dy])
    grads, expected = (
        batch_norm_backward(dy, x, gamma, sample_weight=weight),
        batch_norm_backward(once, x[[0, 0, 1, 2]], gamma),
    )
    same(grads.dx, np.concat([expected.dx[:2].sum(0, keepdims=True), expected.dx[2:]]))
    same((grads.dgamma, grads.dbeta), expected[1:])


def test_the_unit_of_the_weights_does_not_matter():
    dy, x, gamma, beta = Case((5, 2, 3), (2,), {}).arrays()
    weight = frequency(5)
    results = [
        (
            batch_norm_train(x, gamma, beta, sample_weight=w).y,
            *batch_norm_backward(dy, x, gamma, sample_weight=w),
        )
        for w in (weight, 1000 * weight)
    ]
    for one, thousand in zip(*results, strict=True):
        same(one, thousand)


def test_weights_are_not_rounded_to_the_dtype_of_the_values():
    x, weight = frequency(3000, 1).astype(np.float16), frequency(3000)
    narrow, wide = (batch_norm_train(v, sample_weight=weight) for v in (x, x.astype(np.float64)))
    assert np.array_equal(narrow.moments.count, wide.moments.count)
    assert np.array_equal(narrow.moments.m2, wide.moments.m2)


def test_a_sample_of_weight_zero_is_normalized_but_not_measured():
    _, x, gamma, beta = Case((4, 2), (2,), {}).arrays()
    got, others = (
        batch_norm_train(x, gamma, beta, sample_weight=np.array([0.0, 1, 1, 1])),
        batch_norm_train(x[1:]),
    )
    same(got.moments.m2, others.moments.m2)
    same(got.y, batch_norm_inference(x, others.moments.mean, others.moments.variance, gamma, beta))


# --- ghost batches ------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(2, 70))
def test_ghost_batches_cover_the_batch_and_none_is_a_single_sample(samples, size):
    slices = ghost_batches(samples, size)
    lengths = [s.stop - s.start for s in slices]
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(samples))
    assert samples < 2 or min(lengths) >= 2
    assert all(n == size for n in lengths[:-1])
    assert lengths[-1] <= size + 1


def test_no_size_is_one_batch():
    assert ghost_batches(5, None) == [slice(0, 5)]


@pytest.mark.parametrize("size", [5, 6, 100])
def test_a_ghost_batch_of_everything_is_the_plain_batch(size):
    dy, x, gamma, beta = Case((5, 2, 3), (2,), {}).arrays()
    got, expected = (
        batch_norm_train(x, gamma, beta, virtual_batch_size=size),
        batch_norm_train(x, gamma, beta),
    )
    assert np.array_equal(got.y, expected.y)
    assert np.array_equal(got.moments.m2, expected.moments.m2)
    grads = batch_norm_backward(dy, x, gamma, virtual_batch_size=size), batch_norm_backward(dy, x, gamma)
    for ghost, whole in zip(*grads, strict=True):
        assert np.array_equal(ghost, whole)


@pytest.mark.parametrize(("samples", "parts"), [(6, [0, 3, 6]), (8, [0, 3, 6, 8]), (7, [0, 3, 7])])
def test_ghost_batches_are_batches_of_their_own(samples, parts):
    dy, x, gamma, beta = Case((samples, 2, 2), (2,), {}).arrays()
    weight = frequency(samples)
    slices = [slice(a, b) for a, b in pairwise(parts)]
    got = batch_norm_train(x, gamma, beta, sample_weight=weight, virtual_batch_size=3)
    alone = [batch_norm_train(x[s], gamma, beta, sample_weight=weight[s]).y for s in slices]
    same(got.y, np.concat(alone))
    grads = batch_norm_backward(dy, x, gamma, sample_weight=weight, virtual_batch_size=3)
    alone = [batch_norm_backward(dy[s], x[s], gamma, sample_weight=weight[s]) for s in slices]
    same(grads.dx, np.concat([part.dx for part in alone]))
    same(grads.dgamma, sum(part.dgamma for part in alone))
    same(grads.dbeta, sum(part.dbeta for part in alone))


def test_running_statistics_see_the_whole_batch_and_not_the_average_of_its_ghosts(rng):
    x, running = rng.normal(size=(6, 2)) + np.repeat([[0.0], [10.0]], 3, axis=0), (np.zeros(2), np.ones(2))
    got = batch_norm_train(x, None, None, *running, virtual_batch_size=3)
    same(got.running_mean, 0.1 * x.mean(0))
    same(got.running_var, 0.9 + 0.1 * x.var(0, ddof=1))


# --- renormalization ----------------------------------------------------------------------------------------


def test_renorm_without_room_is_plain_batch_normalization():
    dy, x, gamma, beta = Case((6, 2, 3), (2,), {}).arrays()
    running, still = (np.array([5.0, -5.0]), np.array([9.0, 0.1])), Renorm(rmax=1.0, dmax=0.0)
    got, expected = (batch_norm_train(x, gamma, beta, *running, renorm=v) for v in (still, None))
    for ours, plain_one in zip((got.y, *got[2:]), (expected.y, *expected[2:]), strict=True):
        assert np.array_equal(ours, plain_one)
    grads = (batch_norm_backward(dy, x, gamma, *running, renorm=v) for v in (still, None))
    for ours, plain_one in zip(*grads, strict=True):
        assert np.array_equal(ours, plain_one)


def test_renorm_without_bounds_is_inference():
    _, x, gamma, beta = Case((6, 2, 3), (2,), {}).arrays()
    running = np.array([5.0, -5.0]), np.array([9.0, 0.1])
    got = batch_norm_train(x, gamma, beta, *running, renorm=Renorm(np.inf, np.inf))
    same(got.y, batch_norm_inference(x, *running, gamma, beta))


def corrections(x, running_mean, running_var, bounds, eps=1e-5):
    sigma = np.sqrt(running_var + eps)
    r = np.clip(np.sqrt(x.var(0) + eps) / sigma, 1 / bounds.rmax, bounds.rmax)
    return r, np.clip((x.mean(0) - running_mean) / sigma, -bounds.dmax, bounds.dmax)


@pytest.mark.parametrize("bounds", [Renorm(np.inf, np.inf), Renorm(1.5, 0.4)], ids=["free", "half of it clipped"])
def test_the_corrections_of_renorm_are_constants_for_the_gradient(bounds):
    dy, x, gamma, beta = Case((7, 2), (2,), {}).arrays()
    running = np.array([0.5, 3.0]), np.array([3.0, 0.3])
    r, d = corrections(x, *running, bounds)

    def frozen(x):
        return gamma * ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * r + d) + beta

    inputs, statistics = tensors(x, gamma, beta), tensors(*running)
    y = batch_norm_train(*inputs, *statistics, renorm=bounds).y
    same(y.detach(), frozen(x))
    expected = central_difference(lambda v: float(np.sum(dy * frozen(v))), x)
    grads = torch.autograd.grad(y, [*inputs, *statistics], torch.from_numpy(dy), allow_unused=True)
    explicit = batch_norm_backward(dy, x, gamma, *running, renorm=bounds)
    close(explicit.dx, expected)
    for by_autograd, by_hand in zip(grads[:3], explicit, strict=True):
        same(by_autograd, by_hand)
    assert grads[3:] == (None, None)
    with jax.enable_x64(True):
        arrays = [jax.numpy.asarray(v) for v in (x, gamma, beta, *running)]
        grads = jax.grad(lambda *v: (dy * batch_norm_train(*v, renorm=bounds).y).sum(), argnums=range(5))(*arrays)
        for by_jax, by_hand in zip(grads, (*explicit, np.zeros(2), np.zeros(2)), strict=True):
            same(by_jax, by_hand)


def test_renorm_corrects_towards_the_statistics_before_the_step():
    _, x, *_ = Case((7, 2), (2,), {}).arrays()
    running, bounds = (np.array([0.5, 3.0]), np.array([3.0, 0.3])), Renorm(1.5, 0.4)
    got = batch_norm_train(x, None, None, *running, decay=0.0, renorm=bounds)
    r, d = corrections(x, *running, bounds)
    same(got.y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * r + d)
    same(got.running_mean, x.mean(0))


# --- running statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unbiased", "ddof"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_running_statistics_move_towards_those_of_the_batch(rng, decay, unbiased, ddof):
    x, mean, var = rng.normal(3.0, 2.0, (6, 2, 4)), rng.normal(size=2), rng.random(2)
    before = mean.copy(), var.copy()
    got = batch_norm_train(x, None, None, mean, var, decay=decay, unbiased=unbiased)
    same(got.running_mean, decay * mean + (1 - decay) * x.mean((0, 2)))
    same(got.running_var, decay * var + (1 - decay) * x.var((0, 2), ddof=ddof))
    assert np.array_equal((mean, var), before)


def test_the_batch_itself_is_normalized_with_the_biased_variance(rng):
    x = rng.normal(size=(3, 2))
    for unbiased in (True, False):
        got = batch_norm_train(x, None, None, np.zeros(2), np.ones(2), eps=0.0, unbiased=unbiased)
        same(got.y, (x - x.mean(0)) / x.std(0))


def test_one_value_says_nothing_about_an_unbiased_variance():
    x, mean, var = np.array([[4.0, 8.0]]), np.zeros(2), np.array([0.3, 0.7])
    got = batch_norm_train(x, None, None, mean, var, decay=0.5)
    assert np.array_equal(got.running_mean, [2.0, 4.0])
    assert np.array_equal(got.running_var, var)
    assert np.array_equal(batch_norm_train(x, None, None, mean, var, decay=0.5, unbiased=False).running_var, var / 2)


def test_channels_with_and_without_values_are_told_apart():
    batch = Moments(np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 4.0]), np.array([0.0, 0.0, 6.0]))
    mean, var = update_running(np.ones(3), np.ones(3), batch, decay=0.5)
    assert np.array_equal(mean, [1.0, 1.5, 2.5])
    assert np.array_equal(var, [1.0, 1.0, 2.0])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_the_total_variance_is_that_of_old_and_new_values_together(rng, decay, unbiased):
    """It is the moving E[x²] less the squared moving mean; an unbiased variance takes the place of the batch's own."""
    mean, var = rng.normal(size=3), rng.random(3)
    batch = Moments.of(rng.normal(5.0, 2.0, (6, 3)))
    batch_var = batch.unbiased_variance if unbiased else batch.variance
    got = update_running(mean, var, batch, decay=decay, unbiased=unbiased, total_variance=True)
    expected_mean = decay * mean + (1 - decay) * batch.mean
    squares = decay * (var + mean**2) + (1 - decay) * (batch_var + batch.mean**2)
    same(got[0], expected_mean)
    same(got[1], squares - expected_mean**2, atol=1e-11)  # of squares of about 50
    plain = update_running(mean, var, batch, decay=decay, unbiased=unbiased)
    assert np.array_equal(got[0], plain[0])
    # what is added is never negative
    assert np.all(got[1] >= plain[1])


def test_cumulative_total_variance_of_equal_batches_is_that_of_all_their_values(rng):
    xs = rng.normal(size=(7, 5, 3)) + 10 * np.arange(7)[:, None, None]
    mean, var = np.full(3, 99.0), np.full(3, 99.0)
    for t, x in enumerate(xs):
        mean, var = update_running(mean, var, Moments.of(x), decay=t / (t + 1), unbiased=False, total_variance=True)
    same(mean, xs.mean((0, 1)))
    same(var, xs.var((0, 1)))


def test_the_total_variance_does_not_cancel():
    """E[x²] - E[x]² would lose all of it here: squares of 1e16 have an ulp of 2."""
    batch = Moments.of(np.array([[1e8], [1e8 + 2]]))
    _, var = update_running(np.array([1e8]), np.array([1.0]), batch, decay=0.5, unbiased=False, total_variance=True)
    same(var, [1.25])


def test_the_total_variance_is_the_same_on_torch_and_jax(rng):
    numbers = rng.normal(size=3), rng.random(3), rng.normal(3.0, 2.0, (6, 3))
    expected = update_running(*numbers[:2], Moments.of(numbers[2]), total_variance=True)
    mean, var, x = map(torch.from_numpy, numbers)
    same(update_running(mean, var, Moments.of(x), total_variance=True), expected)
    with jax.enable_x64(True):
        mean, var, x = map(jax.numpy.asarray, numbers)
        same(update_running(mean, var, Moments.of(x), total_variance=True), expected)


def test_without_values_the_total_variance_stays():
    empty = Moments(np.zeros(3), np.full(3, 7.0), np.zeros(3))
    got = update_running(np.ones(3), np.full(3, 0.5), empty, total_variance=True)
    assert np.array_equal(got, [np.ones(3), np.full(3, 0.5)])


def test_without_running_statistics_none_are_returned(rng):
    assert batch_norm_train(rng.normal(size=(3, 2)))[2:] == (None, None)


# --- inference ----------------------------------------------------------------------------------------------

INFERENCE = {name: CASES[name] for name in ("dense", "volume", "per activation", "channels last")}
every_inference = pytest.mark.parametrize("case", INFERENCE.values(), ids=INFERENCE)


@every_inference
def test_gradients_of_inference_agree_with_finite_differences(case):
    dy, x, gamma, beta = case.arrays()
    mean, variance = beta + 1, gamma**2 + 0.1

    def loss(x=x, gamma=gamma, beta=beta):
        return float(np.sum(dy * batch_norm_inference(x, mean, variance, gamma, beta, **case.options)))

    grads = batch_norm_inference_backward(dy, x, mean, variance, gamma, **case.options)
    close(grads.dx, central_difference(lambda v: loss(x=v), x))
    close(grads.dgamma, central_difference(lambda v: loss(gamma=v), gamma))
    close(grads.dbeta, central_difference(lambda v: loss(beta=v), beta))


@every_inference
def test_inference_is_the_same_on_torch_and_jax(case):
    dy, x, gamma, beta = case.arrays()
    arrays = x, beta + 1, gamma**2 + 0.1, gamma, beta
    expected = batch_norm_inference(*arrays, **case.options)
    inputs = tensors(*arrays)
    y = batch_norm_inference(*inputs, **case.options)
    same(y.detach(), expected)
    grads = torch.autograd.grad(y, [inputs[0], *inputs[3:]], torch.from_numpy(dy))
    for by_autograd, by_hand in zip(grads, batch_norm_inference_backward(dy, *arrays[:4], **case.options), strict=True):
        same(by_autograd, by_hand)
    with jax.enable_x64(True):
        same(batch_norm_inference(*map(jax.numpy.asarray, arrays), **case.options), expected)


@every_hard_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_inference_errs_at_most_twice_as_much_as_torch(hard, dtype):
    dy, x, gamma, beta, mean, variance = hard_problem(hard, dtype)
    mean = mean + x.mean((0, *range(2, x.ndim)))
    leaves = [None if v is None else v.clone().requires_grad_() for v in (x, gamma, beta)]
    peer = torch.nn.functional.batch_norm(leaves[0], mean, variance, *leaves[1:])
    peer.backward(dy)
    wide = [None if v is None else v.numpy().astype(np.longdouble) for v in (dy, x, mean, variance, gamma, beta)]
    shape = (-1,) + (1,) * (x.ndim - 2)
    wide[2:] = [None if v is None else v.reshape(shape) for v in wide[2:]]
    slope = (1 if wide[4] is None else wide[4]) / np.sqrt(wide[3] + 1e-5)
    shift = 0 if wide[5] is None else wide[5]
    exact = slope * (wide[1] - wide[2]) + shift
    # where β nearly takes the rest away, its ulps stay
    ulps = 4 * (1 + float(np.abs(shift).max() / max(np.abs(exact).max(), 1e-30)))
    y = batch_norm_inference(x, mean, variance, gamma, beta)
    assert_near(y, exact, peer=peer.detach(), ulps=ulps, what="y")
    dx = batch_norm_inference_backward(dy, x, mean, variance, gamma).dx
    assert_near(dx, slope * wide[0], peer=leaves[0].grad, what="dx")


def test_inference_centres_before_it_scales(rng):
    """The form x·scale + shift would lose four of the seven digits here."""
    x = rng.normal(1e4, 1.0, (64, 3)).astype(np.float32)
    got = batch_norm_inference(x, np.full(3, 1e4), np.full(3, 1.0), eps=0.0)
    assert np.array_equal(got, x - np.float32(1e4))


# --- an example's own statistics ----------------------------------------------------------------------------

EXAMPLES = {name: CASES[name] for name in ("sequence", "volume")}
every_example = pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)


def by_example(x, mean, variance, gamma, beta, a, eps):
    """Return the printed equations, one example and channel after another."""
    y = np.empty_like(x)
    for i, c in np.ndindex(x.shape[:2]):
        own = x[i, c]
        mu = (1 - a) * mean[c] + a * own.mean()
        var = (1 - a) * variance[c] + a * own.var() + a * (1 - a) * (own.mean() - mean[c]) ** 2
        y[i, c] = gamma[c] * (own - mu) / np.sqrt(var + eps) + beta[c]
    return y


@every_example
@pytest.mark.parametrize("a", [0.0, 0.2, 1.0])
def test_example_inference_is_that_of_its_equations_in_every_library(case, a):
    _, x, gamma, beta = case.arrays()
    arrays = x, beta + 1, gamma**2 + 0.1, gamma, beta
    expected = by_example(*arrays, a, 0.01)
    given = {"example_weight": a, "eps": 0.01}
    same(batch_norm_example_inference(*arrays, **given), expected)
    same(batch_norm_example_inference(*map(torch.from_numpy, arrays), **given), expected)
    with jax.enable_x64(True):
        same(batch_norm_example_inference(*map(jax.numpy.asarray, arrays), **given), expected)


@every_example
def test_example_inference_has_right_derivatives(case):
    _, x, gamma, beta = case.arrays()
    inputs = tensors(x, beta + 1, gamma**2 + 0.1, gamma, beta)
    assert torch.autograd.gradcheck(lambda *v: batch_norm_example_inference(*v, example_weight=0.3), inputs)


def test_example_inference_without_a_share_is_inference(rng):
    x, mean, variance = rng.normal(size=(3, 2, 5)), rng.normal(size=2), rng.random(2)
    same(batch_norm_example_inference(x, mean, variance, example_weight=0.0), batch_norm_inference(x, mean, variance))


def test_an_example_is_measured_over_its_valid_places(rng):
    x, mean, variance, valid = rng.normal(size=(3, 2, 5)), rng.normal(size=2), rng.random(2), some(3, 5)
    valid[:, 0] = True
    valid[2] = False
    hidden = np.where(valid[:, None], x, np.nan)
    got = batch_norm_example_inference(hidden, mean, variance, example_weight=0.4, weight=valid[:, None])
    for i in range(2):
        alone = batch_norm_example_inference(x[i : i + 1, :, valid[i]], mean, variance, example_weight=0.4)
        same(got[i][:, valid[i]], alone[0])


def test_an_example_without_a_valid_place_takes_the_stored_statistics(rng):
    x, mean, variance = rng.normal(size=(1, 2, 5)), rng.normal(size=2), rng.random(2)
    got = batch_norm_example_inference(x, mean, variance, example_weight=0.4, weight=np.zeros((1, 1, 5)))
    same(got, batch_norm_inference(x, mean, variance))


def test_weights_of_places_are_frequencies_in_an_example(rng):
    x, mean, variance = rng.normal(size=(1, 2, 3)), rng.normal(size=2), rng.random(2)
    got = batch_norm_example_inference(x, mean, variance, example_weight=0.4, weight=np.array([[[2, 1, 1]]]))
    twice = x[:, :, [0, 0, 1, 2]]
    same(got, batch_norm_example_inference(twice, mean, variance, example_weight=0.4)[:, :, 1:])


def test_example_inference_in_float32_is_rounded_once(rng):
    numbers = [v.astype(np.float32) for v in (rng.normal(1e3, 1.0, (3, 2, 50)), rng.normal(1e3, 1.0, 2), rng.random(2))]
    got = batch_norm_example_inference(*numbers, example_weight=0.4)
    assert got.dtype == np.float32
    assert_near(got, batch_norm_example_inference(*(v.astype(float) for v in numbers), example_weight=0.4), ulps=1)


def test_example_inference_needs_places():
    with pytest.raises(ShapeError, match=re.escape("spatial axes (N, C, *spatial), got shape (4, 3)")):
        batch_norm_example_inference(np.ones((4, 3)), np.ones(3), np.ones(3), example_weight=0.5)


# --- what a user can do wrong -------------------------------------------------------------------------------

X, THREE, TWO = np.ones((4, 3, 5)), np.ones(3), np.ones(2)
both = {"running_mean": THREE, "running_var": THREE}

MISTAKES = {
    "axes unknown": (
        {"axes": "spacial"},
        OptionError,
        "'spatial', 'per-activation' or integers, got 'spacial'",
    ),
    "axes out of range": ({"axes": (0, 3)}, OptionError, "array of 3 dimensions, got (0, 3)"),
    "axes negative out of range": ({"axes": -4}, OptionError, "array of 3 dimensions, got (-4,)"),
    "no axes": ({"axes": ()}, OptionError, "at least one axis of an array of 3 dimensions, got ()"),
    "ghosts of one": ({"virtual_batch_size": 1}, OptionError, "at least 2 samples, got 1"),
    "ghosts of none": ({"virtual_batch_size": 0}, OptionError, "at least 2 samples, got 0"),
    "ghosts of less than none": ({"virtual_batch_size": -8}, OptionError, "at least 2 samples, got -8"),
    "ghosts across the batch": (
        {"virtual_batch_size": 2, "axes": (1, 2)},
        OptionError,
        "axis 0 must be in axes, got axes (1, 2)",
    ),
    "renorm towards nothing": (
        {"renorm": Renorm(3.0, 5.0)},
        OptionError,
        "give running_mean and running_var",
    ),
    "rmax below one": (both | {"renorm": Renorm(0.5, 5.0)}, OptionError, "got Renorm(rmax=0.5, dmax=5.0)"),
    "dmax below zero": (both | {"renorm": Renorm(3.0, -1.0)}, OptionError, "got Renorm(rmax=3.0, dmax=-1.0)"),
    "only a running mean": (
        {"running_mean": THREE},
        OptionError,
        "both be given or both be None, got running_mean",
    ),
    "only a running variance": ({"running_var": THREE}, OptionError, "both be None, got running_var"),
    "gamma of other channels": ({"gamma": TWO}, ShapeError, "shape (3,) of the axes that are kept"),
    "beta of other channels": (
        {"beta": TWO},
        ShapeError,
        "(input (4, 3, 5), statistics over axes (0, 2)), got (2,)",
    ),
    "running mean of other channels": (both | {"running_mean": TWO}, ShapeError, "got (2,)"),
    "running variance that would broadcast": (both | {"running_var": np.ones(1)}, ShapeError, "got (1,)"),
    "mask of integers": ({"mask": np.ones((4, 5), dtype=int)}, ShapeError, "mask must be bool, true where"),
    "mask with channels": (
        {"mask": np.ones((4, 3, 5), dtype=bool)},
        ShapeError,
        "(4, 5), the reduced axes (0, 2) of an input of shape (4, 3, 5), got (4, 3, 5)",
    ),
    "weights of other samples": (
        {"sample_weight": np.ones(3)},
        ShapeError,
        "sample_weight must broadcast to (4, 5)",
    ),
    "integers": (
        {"x": np.ones((4, 3), dtype=np.int64)},
        ShapeError,
        "floating point values, got dtype int64",
    ),
}


@pytest.mark.parametrize(("change", "error", "text"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_what_was_received(change, error, text):
    options = {"x": X} | change
    with pytest.raises(error, match=re.escape(text)):
        batch_norm_train(**options)
    if "beta" not in options:
        with pytest.raises(error, match=re.escape(text)):
            batch_norm_backward(dy=np.ones(options["x"].shape), **options)


@pytest.mark.parametrize("wrong", range(4), ids=["mean", "variance", "gamma", "beta"])
def test_inference_names_an_array_that_does_not_fit(wrong):
    arrays = [THREE] * 4
    arrays[wrong] = TWO
    with pytest.raises(ShapeError, match=re.escape("got (2,)")):
        batch_norm_inference(X, *arrays)
    if wrong < 3:
        with pytest.raises(ShapeError, match=re.escape("got (2,)")):
            batch_norm_inference_backward(X, X, *arrays[:3])


@pytest.mark.parametrize(
    "backward", [batch_norm_backward, partial(batch_norm_inference_backward, mean=THREE, variance=THREE)]
)
def test_an_upstream_gradient_of_another_shape_is_refused(backward):
    text = "dy must have the shape of x, (4, 3, 5), got (4, 3)"
    with pytest.raises(ShapeError, match=re.escape(text)):
        backward(dy=X[..., 0], x=X)
