"""The fused kernels against the definition in float64, in every layout, dtype and activation; threads, forks, bad machines."""

import logging
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm.errors import BatchNormWarning, KernelError, NonFiniteError, OptionError
from batchnorm.functional import (
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    batch_norm_train,
)
from batchnorm.kernels import cpu, pool
from batchnorm.kernels.arguments import BUILD
from batchnorm.torch import BatchNorm1d, BatchNorm2d, explain, force, fused
from batchnorm.torch.fused import Step
from batchnorm.torch.options import ACTIVATIONS
from oracle import assert_near

# what the kernels tell apart: planes, small planes, rows of one block, of several, of several strips
SHAPES = {
    "planes": (4, 5, 7, 9),
    "small planes": (6, 37, 3, 2),
    "channels-last": (3, 19, 5, 7),
    "rows": (67, 33),
    "blocks": (1500, 70),
    "strips": (5, 4200),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What is not written is NaN."""
    plain = fused.empty_like
    monkeypatch.setattr(fused, "empty_like", lambda x: plain(x).fill_(torch.nan))


class Case:
    """A batch with γ, β, an upstream gradient and perhaps a residual."""

    def __init__(self, name, dtype=torch.float32, *, residual=False, mean=1.0, spread=3.0):
        self.shape = SHAPES[name]
        self.channels_last = name == "channels-last"
        self.dtype, wide = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        channels = self.shape[1]
        self.x = self.laid(torch.randn(self.shape, dtype=torch.float64) * spread + mean)
        self.dy = self.laid(torch.randn(self.shape))
        self.residual = self.laid(torch.randn(self.shape)) if residual else None
        self.gamma = torch.randn(channels, dtype=wide)
        self.beta = torch.randn(channels, dtype=wide)

    def laid(self, v):
        v = v.to(self.dtype)
        return v.contiguous(memory_format=torch.channels_last) if self.channels_last else v

    def leaves(self):
        given = (self.x, self.gamma, self.beta, self.residual)
        return [None if v is None else v.detach().requires_grad_() for v in given]

    def ours(self, activation, **step):
        x, gamma, beta, residual = leaves = self.leaves()
        y, found = fused.normalize(x, gamma, beta, residual, Step(activation, 1e-5, **step))
        assert y.stride() == x.stride()
        return y, torch.autograd.grad(y, [v for v in leaves if v is not None], self.dy), found

    def eager(self, activation, running=None):
        x, gamma, beta, residual = leaves = self.leaves()
        z = torch.nn.functional.batch_norm(x, *(running or (None, None)), gamma, beta, running is None, 0.1, 1e-5)
        z = z if residual is None else z + residual
        y = z if activation is None else ACTIVATIONS[activation](z)
        return y, torch.autograd.grad(y, [v for v in leaves if v is not None], self.dy)

    def exact(self, activation, running=None):
        """The definition on NumPy in float64; the activation alone is torch's, in float64."""
        x, gamma, beta, dy = (v.double().numpy() for v in (self.x, self.gamma, self.beta, self.dy))
        if running is None:
            z = batch_norm_train(x, gamma, beta).y
        else:
            z = batch_norm_inference(x, *(v.double().numpy() for v in running), gamma, beta)
        z = z if self.residual is None else z + self.residual.double().numpy()
        z = torch.from_numpy(z).requires_grad_()
        y = z * 1 if activation is None else ACTIVATIONS[activation](z)
        d = torch.autograd.grad(y, z, torch.from_numpy(dy))[0].numpy()
        if running is None:
            gradients = batch_norm_backward(d, x, gamma)
        else:
            gradients = batch_norm_inference_backward(d, x, *(v.double().numpy() for v in running), gamma)
        return y.detach().numpy(), [*gradients, *([] if self.residual is None else [d])]


def assert_right(case, activation, running=None, **step):
    y, gradients, found = case.ours(activation, **step)
    peer, peers = case.eager(activation, running)
    expected, all_expected = case.exact(activation, running)
    names = ("dx", "dγ", "dβ", "dresidual")
    near(y, expected, peer, "y")
    for name, got, want, other in zip(names, gradients, all_expected, peers, strict=False):
        near(got, want, other, name)
    return found


def near(got, expected, peer, what):
    # NumPy has no bfloat16: its unit in the last place is 2^16 of float32's
    ulps = 4.0 * 2**16 if got.dtype == torch.bfloat16 else 4.0
    as_array = got.detach().float() if got.dtype == torch.bfloat16 else got.detach()
    assert_near(as_array.numpy(), expected, peer=peer.detach().double().numpy(), ulps=ulps, what=what)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("name", ["rows", "planes"])
def test_every_activation_agrees_with_the_definition(name, activation):
    if name == "planes" and activation not in (None, "relu", "silu"):
        name = "blocks"
    assert_right(Case(name), activation)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_agrees_with_the_definition_with_and_without_a_residual(name, activation):
    assert_right(Case(name), activation)
    assert_right(Case(name, residual=True), activation)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["planes", "small planes", "channels-last", "blocks"])
def test_every_dtype_agrees_with_the_definition(name, dtype):
    assert_right(Case(name, DTYPES[dtype]), "relu")


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
def test_a_slope_is_told_from_the_output_where_a_residual_was_added(activation):
    assert_right(Case("blocks", residual=True, spread=1.0), activation)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_right_far_out_and_at_their_corners(activation, dtype):
    corners = [0.0, -0.0, 3.0, -3.0, 6.0, 1e-6, -1e-6, 0.3, -0.3, 20.0, -20.0, 89.0, -89.0, 200.0, -200.0, 1e30, -1e30]
    z = torch.cat((torch.tensor(corners, dtype=torch.float64), torch.linspace(-12, 12, 4001, dtype=torch.float64)))
    x = z.to(DTYPES[dtype]).reshape(-1, 1).requires_grad_()
    fixed = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y, _ = fused.normalize(x, None, None, None, Step(activation, 0.0, fixed))
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wide, narrow = (x.detach().to(kind).requires_grad_() for kind in (torch.float64, DTYPES[dtype]))
    for v in (wide, narrow):
        out = ACTIVATIONS[activation](v)
        v.grad = torch.autograd.grad(out, v, torch.ones_like(out))[0]
    # where the values are, not beside 1e30
    inner = wide.detach().abs().flatten() < 100
    for got, want, peer in (
        (y, ACTIVATIONS[activation](wide), ACTIVATIONS[activation](narrow)),
        (slope, wide.grad, narrow.grad),
    ):
        for where in (inner, ~inner):
            assert_near(
                got.detach()[where].numpy(), want.detach()[where].numpy(), peer=peer.detach()[where].numpy(), ulps=4
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation):
    fixed = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y, _ = fused.normalize(torch.full((16, 1), torch.nan), None, None, None, Step(activation, 0.0, fixed))
    assert bool(y.isnan().all())


@pytest.mark.parametrize("name", ["planes", "small planes", "channels-last", "blocks"])
def test_given_statistics_are_constants(name):
    case = Case(name, residual=True)
    mean, var = torch.randn(case.shape[1]), torch.rand(case.shape[1]) + 0.5
    fixed = mean.double(), (var.double() + 1e-5).rsqrt()
    assert_right(case, "silu", (mean, var), fixed=fixed)
    assert_right(case, "relu", (mean, var), fixed=fixed)


# -- hard inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("name", ["planes", "small planes", "channels-last", "blocks"])
def test_a_mean_far_from_zero_costs_no_digits(name, mean):
    case = Case(name, mean=mean, spread=1.0)
    found = assert_right(case, None)
    wide = case.x.double().transpose(0, 1).flatten(1)
    assert bool(((found.mean - wide.mean(1)).abs() <= 1e-7 * wide.std(1)).all())
    expected = wide.var(1, correction=0) * wide.shape[1]
    assert bool(((found.m2 - expected).abs() <= 1e-5 * expected).all())


@pytest.mark.parametrize("name", ["planes", "small planes", "channels-last", "blocks"])
def test_a_first_value_that_lies_far_off_costs_no_digits(name):
    case = Case(name, spread=1.0)
    case.x[0] = 1e5
    found = assert_right(case, None)
    wide = case.x.double().transpose(0, 1).flatten(1)
    expected = wide.var(1, correction=0) * wide.shape[1]
    # an estimate that is four deviations off is taken: the squares may be 17 times m2, of which float32 keeps 1e-7
    assert bool(((found.m2 - expected).abs() <= 2e-6 * expected).all())


@pytest.mark.parametrize("name", ["planes", "small planes", "rows"])
def test_a_constant_channel_gives_its_shift(name):
    case = Case(name)
    case.x[:, 1] = 0.1
    y, gradients, found = case.ours(None)
    assert float(found.m2[1]) <= 1e-12
    assert_near(y.detach()[:, 1].numpy(), np.broadcast_to(float(case.beta[1]), y[:, 1].shape), ulps=2048)
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("name", ["planes", "rows"])
@pytest.mark.parametrize("gamma", [0.0, -1.0, None])
def test_gamma_may_be_anything(name, gamma):
    case = Case(name)
    if gamma is not None:
        case.gamma.fill_(gamma)
        assert_right(case, "relu")
        return
    x = case.x.clone().requires_grad_()
    y, _ = fused.normalize(x, None, None, None, Step(None, 1e-5))
    (dx,) = torch.autograd.grad(y, x, case.dy)
    exact = batch_norm_backward(case.dy.double().numpy(), case.x.double().numpy())
    near(dx, exact.dx, dx.double(), "dx")


@pytest.mark.parametrize("name", ["planes", "channels-last", "rows"])
def test_running_statistics_move_by_one_step(name):
    case, w = Case(name), 0.3
    running = torch.randn(case.shape[1]), torch.rand(case.shape[1]), torch.tensor(6), w
    before = [v.double().numpy() for v in running[:2]]
    case.ours(None, running=running)
    assert running[2] == 7
    step = batch_norm_train(case.x.double().numpy(), None, None, *before, decay=1 - w)
    for got, want in zip(running[:2], (step.running_mean, step.running_var), strict=True):
        assert_near(got.numpy(), want, ulps=4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["planes", "rows"])
def test_what_is_not_finite_moves_no_statistics(name, bad):
    case = Case(name)
    case.x[0, 0] = bad
    running = torch.zeros(case.shape[1]), torch.ones(case.shape[1]), torch.tensor(6), 0.1
    *_, found = case.ours(None, running=running)
    assert not found.finite
    assert running[2] == 6
    assert float(running[0].abs().sum()) == 0
    assert float((running[1] - 1).abs().sum()) == 0


def test_a_block_of_other_sources_is_not_touched(monkeypatch):
    plain = cpu.run

    def of_others(key, how, words):
        words[BUILD] += 1
        plain(key, how, words)

    monkeypatch.setattr(cpu, "run", of_others)
    assert bool(Case("rows").ours(None)[0].isnan().all())


# -- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_derivatives_of_the_second_order_are_right(activation, training):
    layer = BatchNorm2d(3, activation=activation, dtype=torch.float64).train(training)
    layer.momentum = 0.0
    torch.nn.init.normal_(layer.weight)
    x, residual = torch.randn(2, 4, 3, 3, 2, dtype=torch.float64).unbind()
    given = x.requires_grad_(), residual.requires_grad_()
    with force("kernel"):
        assert torch.autograd.gradcheck(lambda x, r: layer(x, residual=r), given)
        assert torch.autograd.gradgradcheck(lambda x, r: layer(x, residual=r), given)
        assert torch.autograd.gradgradcheck(layer, given[:1])


def test_a_gradient_that_is_batched_is_computed_by_the_definition():
    case = Case("planes")
    x = case.x.clone().requires_grad_()
    y, _ = fused.normalize(x, case.gamma, case.beta, None, Step("relu", 1e-5))
    upstream = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for dy, got in zip(upstream, batched, strict=True):
        (want,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert_near(got.numpy(), want.double().numpy(), ulps=32)


# -- threads and processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


BIG = {"planes": (8, 16, 40, 40), "rows": (4000, 70)}


def run_big(name):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *BIG[name], generator=generator).unbind()
    x.requires_grad_()
    y, found = fused.normalize(x, None, None, None, Step("relu", 1e-5))
    return [v.detach() for v in (y, found.mean, found.m2, *torch.autograd.grad(y, x, dy))]


@pytest.mark.parametrize("name", BIG)
def test_the_number_of_threads_changes_no_bit(name, two_threads, monkeypatch):
    used, plain = [], pool.run
    monkeypatch.setattr(pool, "run", lambda *given: (used.append(given[2]), plain(*given)))
    two = run_big(name)
    assert set(used) == {2}
    torch.set_num_threads(1)
    one = run_big(name)
    assert used[-1] == 1
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", BIG)
def test_several_threads_of_python_may_call_at_once(name, two_threads):
    expected = run_big(name)
    with ThreadPoolExecutor(4) as workers:
        for found in workers.map(lambda _: run_big(name), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", BIG)
def test_what_goes_past_the_cache_is_the_same(name, monkeypatch):
    kept = run_big(name)
    monkeypatch.setattr(cpu, "LARGE", 1)
    fused._planned.cache_clear()
    try:
        past = run_big(name)
    finally:
        fused._planned.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(kept, past, strict=True))


def in_a_process(script, **environment):
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": f"{folder.parent / 'src'}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_run_after_a_fork_and_beside_torchs_own_pool():
    said = in_a_process("""
        import os
        import torch
        from torch.utils.data import DataLoader, Dataset
        from batchnorm.torch import BatchNorm1d, explain

        torch.set_num_threads(2)
        torch.manual_seed(0)
        layer, x = BatchNorm1d(70), torch.randn(4000, 70)
        names = "libgomp", "libomp", "libiomp"
        maps = lambda: [line.split()[-1] for line in open("/proc/self/maps")]
        pools = lambda: {file for file in maps() if any(name in file for name in names)}
        torch.randn(512, 512) @ torch.randn(512, 512)
        before = pools()
        expected = layer(x)
        print("one pool", before == pools())

        class Normalized(Dataset):
            def __len__(self):
                return 2
            def __getitem__(self, i):
                return layer(x).detach()

        for worker in DataLoader(Normalized(), batch_size=None, num_workers=1, multiprocessing_context="fork"):
            assert torch.equal(worker, expected)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)
            # torch's own pool would hang here
            same = (layer(x).detach().numpy() == expected.detach().numpy()).all()
            print("forked", same, "forked" in explain(layer, x).reason, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        """)
    assert "one pool True" in said
    assert "forked True True" in said


def test_a_later_process_loads_what_is_compiled():
    run_big("rows")
    said = in_a_process("""
        import logging, torch
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        from batchnorm.torch import BatchNorm1d, fused
        x = torch.randn(4000, 70, requires_grad=True)
        y, _ = fused.normalize(x, None, None, None, fused.Step("relu", 1e-5))
        y.backward(x)
        from batchnorm.kernels import cpu
        print(sum(kernel.cache_hits for kernel in cpu._alive), len(cpu._alive))
        """)
    hits, kernels = said.split()
    assert hits == kernels != "0"


# -- the choice --------------------------------------------------------------------------------------------------------


def test_a_choice_can_be_asked_for():
    layer, x = BatchNorm2d(8), torch.zeros(32, 8, 14, 14)
    assert explain(layer, x).name == "kernel"
    assert explain(layer, x.contiguous(memory_format=torch.channels_last)).name == "kernel"
    assert str(explain(layer, x[:1, :, :4, :4])).startswith("aten: fewer than")
    assert "float8" in explain(layer, x.to(torch.float8_e4m3fn)).reason
    assert "on meta" in explain(layer, x.to("meta")).reason
    assert "γ must be 8 values of float32, got 8 of float64" in explain(BatchNorm2d(8, dtype=torch.float64), x).reason
    assert "running statistics" in explain(BatchNorm2d(8, dtype=torch.bfloat16), x.bfloat16()).reason
    assert "residual" in explain(layer, x, x[:1]).reason


@pytest.mark.parametrize("name", ["kernel", "aten", "definition"])
def test_a_choice_can_be_forced(name):
    layer, x = BatchNorm2d(4, activation="relu"), torch.randn(8, 4, 6, 6, requires_grad=True)
    with force(name):
        assert explain(layer, x) == (name, "it is forced")
        y = layer(x)
    assert (type(y.grad_fn).__name__ == "_FusedBackward") == (name == "kernel")
    want = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
    assert_near(y.detach().numpy(), want.detach().double().numpy(), ulps=16)
    assert int(layer.num_batches_tracked) == 1


def test_a_forced_kernel_that_cant_run_says_why():
    layer = BatchNorm1d(4)
    with force("kernel"), pytest.raises(KernelError, match="no value"):
        explain(layer, torch.zeros(0, 4))
    with force("kernel"), pytest.raises(KernelError, match="γ must be 4 values of float32, got 4 of float64 on cpu"):
        BatchNorm1d(4, dtype=torch.float64)(torch.randn(8, 4))
    with pytest.raises(OptionError, match="kernel, aten, definition"), force("cuda"):
        pass
    # after an error nothing is forced
    assert layer(torch.randn(8, 4)).shape == (8, 4)


@pytest.mark.parametrize("shape", [(64, 8, 16, 16), (256, 512)])
def test_parameters_that_a_kernel_cannot_read_are_left_to_torch(shape):
    """It would read past their end, or from memory that is not there."""
    x, channels = torch.randn(shape), shape[1]
    make = BatchNorm2d if len(shape) == 4 else BatchNorm1d
    layer = make(channels)
    layer.weight = torch.nn.Parameter(torch.tensor([2.0]).expand(channels))
    assert "with gaps" in explain(layer, x).reason or len(shape) == 2
    y = layer(x)
    assert_near(y.detach().numpy(), 2 * make(channels)(x).detach().double().numpy(), ulps=32)
    layer.weight = torch.nn.Parameter(torch.ones(channels - 1))
    with pytest.raises(RuntimeError, match="weight should contain"):
        layer(x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        make(channels, device="meta")(x)


@pytest.mark.parametrize("name", ["running_var", "num_batches_tracked"])
def test_running_statistics_that_a_kernel_cannot_write_are_left_to_torch(name):
    layer, x = BatchNorm2d(8, activation="relu"), torch.randn(64, 8, 16, 16)
    layer._buffers[name] = {"running_var": torch.ones(16)[::2]}.get(name, torch.tensor(0, dtype=torch.int32))
    assert "the running statistics must be" in explain(layer, x).reason
    layer(x)
    assert int(layer.num_batches_tracked) == 1
    step = batch_norm_train(x.double().numpy(), None, None, np.zeros(8), np.ones(8), decay=0.9)
    assert_near(layer.running_var.contiguous().numpy(), step.running_var, ulps=16)


@pytest.mark.parametrize("shape", [(64, 40, 32, 32), (64, 8, 16, 16), (256, 512)])
def test_another_default_device_changes_nothing(shape):
    make, x = BatchNorm2d if len(shape) == 4 else BatchNorm1d, torch.randn(shape)

    def step():
        layer, leaf = make(shape[1], device="cpu"), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(x)
        return y, leaf.grad, layer.weight.grad, layer.running_var

    expected = step()
    with torch.device("meta"):
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_that_is_taken_again_leaves_other_graphs_alone():
    """Its statistics were in memory that other layers of the size have used."""
    first, second = BatchNorm1d(512), BatchNorm1d(512)
    x, far = torch.randn(256, 512, requires_grad=True), torch.randn(256, 512) + 1e4
    y = first(x)
    z = second(far)
    assert_near(z.detach().numpy(), batch_norm_train(far.double().numpy()).y, ulps=4096)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_near(x.grad.numpy(), batch_norm_backward(dy.double().numpy(), x.detach().double().numpy()).dx, ulps=64)
    assert int(first.num_batches_tracked) == int(second.num_batches_tracked) == 1


@pytest.mark.parametrize("place", ["batch", "γ"])
def test_what_is_not_finite_moves_no_statistics_behind_atens_kernels(place):
    layer, x = BatchNorm1d(300), torch.randn(128, 300)
    layer(x)
    wrong = {"batch": x, "γ": layer.weight}
    wrong[place].detach().view(-1)[7] = torch.inf
    before = [v.clone() for v in (layer.running_mean, layer.running_var)]
    with pytest.warns(BatchNormWarning) if place != "γ" else pytest.raises(NonFiniteError):
        layer(x)
    assert torch.equal(torch.stack((layer.running_mean, layer.running_var)), torch.stack(before))
    wrong[place].detach().view(-1)[7] = 1.0
    layer(x)
    assert bool(torch.stack((layer.running_mean, layer.running_var)).isfinite().all())


def test_vmap_and_forward_mode_leave_the_kernel():
    layer = BatchNorm1d(4, track_running_stats=False)
    x = torch.randn(3, 4096, 4)
    stacked = torch.vmap(layer, randomness="error")(x)
    for got, one in zip(stacked, x, strict=True):
        assert_near(got.detach().numpy(), layer(one).detach().double().numpy(), ulps=32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.randn_like(x[0]))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None


def test_a_mask_leaves_the_kernel_and_is_right():
    layer, x = BatchNorm2d(4, activation="relu"), torch.randn(16, 4, 16, 16)
    mask = torch.rand(16, 16, 16) > 0.3
    y = layer(x, mask=mask)
    want = batch_norm_train(x.double().numpy(), mask=mask.numpy()).y
    assert_near(y.detach().numpy(), np.maximum(want, 0), ulps=32)


def test_strides_that_overlap_or_leave_gaps_are_copied_first():
    layer = BatchNorm2d(4, activation="relu")
    for x in (torch.randn(16, 4, 1, 1).expand(16, 4, 16, 16), torch.randn(16, 8, 16, 32)[:, ::2, :, ::2]):
        dense = x.contiguous()
        assert torch.equal(layer(x), layer(dense))
        given = dense.clone().requires_grad_()
        (got,) = torch.autograd.grad(layer(given), given, torch.ones(1, 4, 1, 1).expand(16, 4, 16, 16))
        assert bool(got.isfinite().all())


def test_a_compiled_layer_is_one_operator_with_the_kernels_numbers():
    layer, x, residual, dy = BatchNorm2d(16, activation="silu"), *torch.randn(3, 8, 16, 16, 16).unbind()
    given = x.requires_grad_(), residual.requires_grad_(), layer.weight, layer.bias
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=look)(x, residual=residual)
    (graph,) = graphs
    assert sum("normalize" in str(node.target) for node in graph.graph.nodes) == 1
    assert not any("silu" in str(node.target) for node in graph.graph.nodes)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.reset_running_stats()
        y = run(x, residual=residual)
        results.append([y, *torch.autograd.grad(y, given, dy)])
        assert int(layer.num_batches_tracked) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_are_what_torch_expects_of_one():
    case = Case("planes", residual=True)
    given = (*(v.requires_grad_() for v in (case.x, case.gamma, case.beta, case.residual)), "silu", 1e-5)
    torch.library.opcheck(torch.ops.batchnorm.normalize, given)


# -- machines that lack something --------------------------------------------------------------------------------------


def test_without_openmp_one_thread_does_it_and_the_reason_can_be_asked_for(two_threads, monkeypatch):
    expected = run_big("rows")
    kept = pool._Pool.parallel, pool._Pool.reason
    try:
        pool.attach(Path("/nowhere/libtorch_cpu.so"))
        assert all(torch.equal(a, b) for a, b in zip(run_big("rows"), expected, strict=True))
        assert "one thread: no OpenMP runtime" in explain(BatchNorm1d(70), torch.zeros(4000, 70)).reason
    finally:
        pool._Pool.parallel, pool._Pool.reason = kept


def test_where_nothing_can_be_kept_on_disk_kernels_are_compiled_in_each_process(monkeypatch, caplog):
    plain = cpu.cfunc

    def refuse(*given, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'kernel': no locator available for file 'planes.py'")
        return plain(*given, **options)

    monkeypatch.setattr(cpu, "cfunc", refuse)
    monkeypatch.setattr(cpu, "_addresses", {})
    monkeypatch.setattr(cpu, "_notes", [])
    with caplog.at_level(logging.INFO, "batchnorm.kernels"):
        assert_right(Case("rows"), None)
    assert "compiled" in caplog.text
    reason = explain(BatchNorm1d(70), torch.zeros(4000, 70)).reason
    assert reason.count("compiled again in every process") == 1


def test_without_numba_torchs_kernels_do_it():
    said = in_a_process("""
        import importlib.util, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
        sys.modules["numba"] = None
        import torch
        from batchnorm.torch import BatchNorm1d, explain
        layer, x = BatchNorm1d(70, activation="relu"), torch.randn(4000, 70)
        want = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        print(bool((layer(x) - want).abs().max() < 1e-5), explain(layer, x))
        """)
    assert said.startswith("True aten: it needs numba")
