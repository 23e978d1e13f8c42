"""Batches at the edge: one value, none, inf and NaN, constant channels, means far from zero."""

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import torch as bn
from batchnorm.errors import BatchNormError, BatchNormWarning
from oracle import assert_near

KINDS = {
    "features": (bn.BatchNorm1d, nn.BatchNorm1d, ()),
    "sequences": (bn.BatchNorm1d, nn.BatchNorm1d, (1,)),
    "images": (bn.BatchNorm2d, nn.BatchNorm2d, (1, 1)),
    "volumes": (bn.BatchNorm3d, nn.BatchNorm3d, (1, 1, 1)),
}
every_kind = pytest.mark.parametrize(("kind", "torchs", "spatial"), KINDS.values(), ids=KINDS)


def prepared(layer):
    """Return the layer with no number at its initial value."""
    with torch.no_grad():
        for v in [*layer.parameters(), layer.running_mean, layer.running_var]:
            v.copy_(torch.rand_like(v) + 0.5)
    layer.num_batches_tracked.fill_(7)
    return layer


def twin(layer, torchs):
    other = torchs(layer.num_features, layer.eps, layer.momentum)
    other.load_state_dict(layer.state_dict())
    return other.train(layer.training)


def buffers(layer):
    return [v.clone() for v in layer.buffers()]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def step(layer, x, **given):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, **given)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    return [y.detach(), *grads]


# --- one value a channel ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("choice", ["running", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_value_goes_through_and_moves_no_statistic(kind, torchs, spatial, choice, dtype):
    layer = prepared(kind(3, on_single=choice))
    layer = layer.double() if dtype == torch.float64 else layer
    before = buffers(layer)
    results = step(layer, torch.randn(1, 3, *spatial, dtype=dtype))
    assert all(torch.isfinite(v).all() for v in results)
    assert_equal(buffers(layer), before)
    assert layer.skipped_updates == 0


@every_kind
def test_one_value_by_the_running_statistics_is_evaluation(kind, torchs, spatial):
    layer = prepared(kind(3, on_single="running"))
    other = twin(layer, torchs).eval()
    x = torch.randn(1, 3, *spatial)
    torch.manual_seed(1)
    got = step(layer, x)
    torch.manual_seed(1)
    assert_equal(got, step(other, x))


def test_one_value_by_the_running_statistics_may_wait_for_its_backward():
    """Another forward has moved the statistics on by then."""
    layer = prepared(bn.BatchNorm1d(3, on_single="running"))
    other = copy.deepcopy(layer).eval()
    x, dy = torch.randn(1, 3), torch.randn(1, 3)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y = layer(leaves[0])
    layer(torch.randn(6, 3))
    grads = torch.autograd.grad(y, [leaves[0], layer.weight], dy)
    assert_equal(grads, torch.autograd.grad(other(leaves[1]), [leaves[1], other.weight], dy))


@every_kind
def test_one_value_by_itself_is_beta_and_gives_no_gradient_but_to_beta(kind, torchs, spatial):
    layer = prepared(kind(3, on_single="skip"))
    y, dx, dgamma, dbeta = step(layer, torch.randn(1, 3, *spatial))
    assert torch.equal(y.view(3), layer.bias.detach())
    assert not dx.any()
    assert not dgamma.any()
    assert dbeta.abs().min() > 0


@every_kind
def test_one_value_is_an_error_unless_asked_for(kind, torchs, spatial):
    model = nn.Sequential(nn.Identity(), prepared(kind(3)))
    before = buffers(model)
    with pytest.raises(BatchNormError, match=r"layer '1'.*Expected more than 1 value per channel.*on_single='running'"):
        model(torch.randn(1, 3, *spatial))
    assert_equal(buffers(model), before)


@every_kind
@pytest.mark.parametrize("choice", ["error", "running", "skip"])
def test_two_values_are_normalized_as_torch_does(kind, torchs, spatial, choice):
    layer = prepared(kind(3, on_single=choice))
    other = twin(layer, torchs).double()
    x = torch.randn(2, 3, *spatial)
    torch.manual_seed(1)
    got = step(layer, x)
    torch.manual_seed(1)
    # the same upstream gradient in both dtypes
    leaf = x.double().requires_grad_()
    y = other(leaf)
    expected = [y.detach(), *torch.autograd.grad(y, [leaf, *other.parameters()], torch.randn(x.shape).double())]
    # of two values, dx is a difference of equal numbers: what is left is of the size of eps
    sizes = [1.0, 1e4, 1.0, 1.0]
    for a, b, size in zip(got, expected, sizes, strict=True):
        assert_near(a, b, ulps=16 * size)
    for a, b in zip(buffers(layer)[:2], buffers(other)[:2], strict=True):
        assert_near(a, b)
    assert layer.num_batches_tracked == other.num_batches_tracked


@pytest.mark.parametrize("choice", ["error", "running", "skip"])
@pytest.mark.parametrize("by", ["mask", "weights", "lengths"])
def test_one_value_that_is_left_of_many_is_one_value(choice, by):
    layer = prepared(bn.BatchNorm1d(3, on_single=choice))
    before, x = buffers(layer), torch.randn(2, 3, 4)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True
    given = {
        "mask": {"mask": mask},
        "weights": {"sample_weight": mask * 2.0},
        "lengths": {"lengths": torch.tensor([1, 0])},
    }
    if choice == "error":
        with pytest.raises(BatchNormError, match="Expected more than 1 value"):
            layer(x, **given[by])
    else:
        assert all(torch.isfinite(v).all() for v in step(layer, x, **given[by]))
    assert_equal(buffers(layer), before)


@pytest.mark.parametrize("choice", ["running", "skip"])
def test_one_value_keeps_what_comes_after_the_normalization(choice):
    layer = prepared(bn.BatchNorm1d(3, on_single=choice, activation="relu"))
    plain = prepared(bn.BatchNorm1d(3, on_single=choice))
    plain.load_state_dict(layer.state_dict())
    x, residual = torch.randn(1, 3), torch.randn(1, 3)
    assert torch.equal(layer(x, residual=residual), torch.relu(plain(x) + residual))


# --- no value at all ----------------------------------------------------------------------------------------

EMPTY = {
    "no samples": (bn.BatchNorm1d, (0, 3)),
    "no sequences": (bn.BatchNorm1d, (0, 3, 4)),
    "no places in sequences": (bn.BatchNorm1d, (4, 3, 0)),
    "no images": (bn.BatchNorm2d, (0, 3, 4, 4)),
    "no places in images": (bn.BatchNorm2d, (2, 3, 0, 4)),
    "no volumes": (bn.BatchNorm3d, (0, 3, 2, 2, 2)),
    "no places in volumes": (bn.BatchNorm3d, (2, 3, 2, 2, 0)),
}
LAYERS = {
    "plain": {},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "cumulative": {"momentum": None},
    "renorm": {"renorm": True},
    "ghost batches": {"virtual_batch_size": 2},
    "activation": {"activation": "sigmoid"},
    "one value by running statistics": {"on_single": "running"},
    "debias": {"debias": True},
    "domains": {"domains": ["other"]},
    "no tracking": {"track_running_stats": False},
}


@pytest.mark.parametrize(("kind", "shape"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_keeps_its_shape_gives_zero_gradients_and_changes_nothing(kind, shape, options, training):
    layer = kind(3, **options).train(training)
    before = buffers(layer)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    assert y.dtype == x.dtype
    y.backward(torch.randn(shape))
    assert x.grad.shape == shape
    assert all(torch.equal(p.grad, torch.zeros(3)) for p in layer.parameters())
    assert_equal(buffers(layer), before)
    assert layer.skipped_updates == 0


def test_an_empty_batch_of_example_statistics_is_empty():
    assert bn.BatchNorm1d(3, example_weight=0.5).eval()(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_empty_batch_keeps_its_dtype(dtype):
    assert bn.BatchNorm1d(3)(torch.zeros(0, 3, dtype=dtype)).dtype == dtype


def test_an_empty_batch_takes_mask_weights_lengths_and_residual():
    x = torch.zeros(0, 3, 4)
    given = {"mask": torch.ones(0, 4) > 0, "sample_weight": torch.ones(0), "lengths": torch.ones(0, dtype=torch.long)}
    assert bn.BatchNorm1d(3)(x, residual=x, **given).shape == x.shape


def test_an_empty_batch_of_another_number_of_channels_is_still_an_error():
    with pytest.raises(BatchNormError, match="must have 3 channels"):
        bn.BatchNorm1d(3)(torch.zeros(0, 4))


# --- inf and NaN --------------------------------------------------------------------------------------------

LAYOUTS = {
    "features": (bn.BatchNorm1d, (1,), torch.contiguous_format),
    "sequences": (bn.BatchNorm1d, (1, 6), torch.contiguous_format),
    "images": (bn.BatchNorm2d, (1, 4, 3), torch.contiguous_format),
    "images, channels last": (bn.BatchNorm2d, (1, 4, 3), torch.channels_last),
    "volumes": (bn.BatchNorm3d, (1, 2, 3, 2), torch.contiguous_format),
    "volumes, channels last": (bn.BatchNorm3d, (1, 2, 3, 2), torch.channels_last_3d),
}
BAD = {
    "inf": (torch.inf, 1),
    "-inf": (-torch.inf, 1),
    "nan": (torch.nan, 1),
    "overflow": (1e30, 1),
    "one is": (torch.inf, 0),
}
OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "renorm": {"renorm": {"start": 0, "rmax_at": 0, "dmax_at": 0}},
    "ghost batches": {"virtual_batch_size": 4},
    "debias, total": {"debias": True, "total_variance": True},
}


@pytest.mark.parametrize(("kind", "shape", "memory_format"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("samples", [8, 300])
@pytest.mark.parametrize(("bad", "everywhere"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bad_batch_does_not_reach_the_running_statistics(kind, shape, memory_format, samples, bad, everywhere, dtype):
    layer = prepared(kind(3))
    good = torch.randn(samples, 3, *shape[1:]).to(dtype).contiguous(memory_format=memory_format)
    x = good.clone(memory_format=torch.preserve_format)
    x[0, 1] = bad
    if everywhere:
        x[1] = -bad
    assert_is_left_out(layer, x)
    count = int(layer.num_batches_tracked)
    before = buffers(layer)
    layer(good)
    assert layer.num_batches_tracked == count + 1
    assert all(torch.isfinite(v).all() for v in layer.buffers())
    assert not torch.equal(layer.running_mean, before[0])


def assert_is_left_out(layer, x, times=2):
    before = buffers(layer)
    with pytest.warns(BatchNormWarning, match="left out") as caught:
        [layer(x) for _ in range(times)]
    assert len(caught) == 1
    assert_equal(buffers(layer), before)
    assert layer.skipped_updates == times


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("samples", [8, 300])
def test_a_bad_batch_is_left_out_whatever_the_options(options, samples):
    layer = prepared(bn.BatchNorm1d(3, **options))
    x = torch.randn(samples, 3)
    x[3, 1] = torch.nan
    assert_is_left_out(layer, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_bad_value_that_is_not_masked_is_left_out_too(memory_format):
    layer, x = prepared(bn.BatchNorm2d(3)), torch.randn(4, 3, 5, 5).contiguous(memory_format=memory_format)
    x[0, 0, 0, 0] = torch.inf
    with pytest.warns(BatchNormWarning, match="left out"):
        layer(x, torch.ones(4, 5, 5) > 0)
    assert layer.num_batches_tracked == 7


def test_the_warning_names_the_layer_and_what_to_do():
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Identity(), bn.BatchNorm1d(3))})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner["stem"](x)

    with pytest.warns(BatchNormWarning, match=re.escape("layer 'inner.stem.1', BatchNorm1d(3)") + ".*skipped_updates"):
        Model()(torch.full((4, 3), torch.nan))


def test_a_batch_of_large_values_that_fit_is_no_bad_batch():
    layer = bn.BatchNorm1d(3, momentum=1.0)
    x = torch.randn(16, 3) * 1e17
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    assert_near(layer.running_var, x.double().var(0))
    assert layer.skipped_updates == 0


def test_large_values_in_float64_are_no_bad_batch():
    layer = bn.BatchNorm1d(3, momentum=1.0, dtype=torch.float64)
    layer(torch.randn(16, 3, dtype=torch.float64) * 1e30)
    assert layer.skipped_updates == 0
    assert layer.running_var.min() > 1e58


def test_a_copy_of_a_layer_counts_for_itself():
    layer = bn.BatchNorm1d(3)
    with pytest.warns(BatchNormWarning, match="left out"):
        layer(torch.full((4, 3), torch.nan))
    other = copy.deepcopy(layer)
    layer(torch.full((4, 3), torch.nan))
    assert (layer.skipped_updates, other.skipped_updates) == (2, 1)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("samples", [6, 300])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"virtual_batch_size": 3}], ids=str)
def test_a_scale_that_is_not_finite_is_an_error_that_names_the_layer(bad, samples, options):
    model = nn.Sequential(nn.Identity(), prepared(bn.BatchNorm1d(3, **options)))
    model[1].weight.data[1] = bad
    before = buffers(model)
    with pytest.raises(BatchNormError, match=r"layer '1'.*γ must be finite"):
        model(torch.randn(samples, 3))
    assert_equal(buffers(model), before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [2, 40])
def test_a_scale_that_is_not_finite_is_an_error_for_images_too(memory_format, samples):
    layer = prepared(bn.BatchNorm2d(3))
    layer.weight.data[0] = torch.nan
    before = buffers(layer)
    with pytest.raises(BatchNormError, match="γ must be finite"):
        layer(torch.randn(samples, 3, 5, 5).contiguous(memory_format=memory_format))
    assert_equal(buffers(layer), before)


# --- constant channels and far means ------------------------------------------------------------------------


def contiguous(x):
    return x.contiguous()


def rows(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim])


def strided(x):
    """Return the values with gaps between them."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def transposed(x):
    """Return the values with samples and channels in another order of memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


SHAPES = {
    "few rows": (64, 300),
    "rows": (300, 64),
    "many rows": (2000, 96),
    "sequences": (16, 48, 40),
    "images": (8, 32, 28, 28),
    "small images": (16, 64, 7, 7),
    "volumes": (2, 16, 5, 6, 7),
}
CASES = {
    f"{name}, {layout.__name__}": (shape, layout)
    for name, shape in SHAPES.items()
    for layout in (contiguous, rows, strided, transposed)
    if not (layout is rows and len(shape) < 4)
}
every_layout = pytest.mark.parametrize(("shape", "layout"), CASES.values(), ids=CASES)
# float32's unit, as `assert_near` counts what it is given in float32
UNITS = {torch.float32: 1, torch.bfloat16: 2**16, torch.float16: 2**13}
every_dtype = pytest.mark.parametrize("dtype", UNITS, ids=str)
KIND = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}


def one_step(layer, x, dy):
    # a clone would close the gaps of a strided input
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    dx, dgamma, dbeta = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)
    named = {"y": y.detach(), "dx": dx, "dγ": dgamma, "dβ": dbeta}
    return named | {"running_mean": layer.running_mean.clone(), "running_var": layer.running_var.clone()}


def hold_to_the_oracle(shape, layout, dtype, x, ulps=8):
    dy = layout(torch.randn(shape).to(dtype))
    x = layout(x.to(dtype))
    ours = KIND[x.ndim](shape[1])
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    oracle, peer = nn.BatchNorm1d(shape[1], dtype=torch.float64), nn.BatchNorm1d(shape[1])
    oracle.load_state_dict(ours.state_dict())
    peer.load_state_dict(ours.state_dict())

    def flat(v):
        return v.reshape(*v.shape[:2], -1)

    got = one_step(ours, x, dy)
    exact = one_step(oracle, flat(x.contiguous().double()), flat(dy.contiguous().double()))
    torchs = one_step(peer, flat(x.contiguous()), flat(dy.contiguous()))
    for name, v in got.items():
        # parameters and statistics are float32 in all cases
        unit = UNITS[dtype] if name in ("y", "dx") else 1
        expected = exact[name].reshape(v.shape)
        assert_near(v.float(), expected, peer=torchs[name].double().reshape(v.shape), ulps=ulps * unit, what=name)


@every_layout
@every_dtype
@pytest.mark.parametrize("far", [0.0, 1e2, 1e3, 1e4, 1e5])
def test_the_error_is_at_most_twice_that_of_torchs_contiguous_kernel(shape, layout, dtype, far):
    if dtype == torch.float16 and far == 1e5:
        far = 3e4
    # some channels lie near, so that one choice does not fit all
    offset = far * torch.linspace(-1, 1, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    hold_to_the_oracle(shape, layout, dtype, torch.randn(shape) + offset)


@every_layout
def test_a_constant_channel_gives_beta_and_small_gradients(shape, layout):
    x = torch.randn(shape)
    x[:, 0] = 100.1
    x[:, 1] = 0.0
    hold_to_the_oracle(shape, layout, torch.float32, x)


@every_layout
def test_one_outlier_far_from_all_others_is_no_harm(shape, layout):
    x = torch.randn(shape)
    x[0, 0] = 1e6
    # a row of float32 sums keeps 24 bits of the largest square, and loses the others' share below them
    hold_to_the_oracle(shape, layout, torch.float32, x, ulps=512 if layout is rows else 8)


@pytest.mark.parametrize("value", [0.0, 1.0, -100.1, 1e4])
@pytest.mark.parametrize("samples", [6, 300])
def test_a_constant_channel_is_exactly_beta(value, samples):
    layer = prepared(bn.BatchNorm1d(3))
    y, dx, dgamma, _ = step(layer, torch.full((samples, 3), value))
    # σ² is 0 up to half an ulp of the mean squared, which eps outweighs up to a mean of 1e4
    assert_near(y, layer.bias.detach().expand_as(y), ulps=4 + abs(value) * 316)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dgamma).all()


@pytest.mark.parametrize("layout", [contiguous, rows])
def test_running_statistics_far_from_zero_stay_exact_over_many_steps(layout):
    layer, mean, var = bn.BatchNorm2d(4), np.zeros(4), np.ones(4)
    for _ in range(10):
        x = torch.randn(16, 4, 6, 6) + 1e3
        layer(layout(x))
        values = x.double().movedim(1, -1).reshape(-1, 4).numpy()
        mean, var = 0.9 * mean + 0.1 * values.mean(0), 0.9 * var + 0.1 * values.var(0, ddof=1)
    assert_near(layer.running_mean, mean, ulps=8)
    assert_near(layer.running_var, var, ulps=8)
