"""Masks, lengths and sample weights: what they hide does not exist, for outputs, gradients and statistics alike."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bn
from batchnorm.errors import BatchNormError
from batchnorm.functional import Renorm, batch_norm_backward, batch_norm_example_inference, batch_norm_train
from oracle import assert_near


class Case(NamedTuple):
    """A kind of layer of three channels, the shape of its input, of its mask, and the layout in memory."""

    kind: type[nn.Module]
    shape: tuple[int, ...]
    mask_shape: tuple[int, ...]
    layout: torch.memory_format = torch.contiguous_format

    def problem(self, dtype=torch.float32):
        """Return x, dy and a mask that hides some places and leaves more than one."""
        x, dy = (torch.randn(self.shape, dtype=dtype).to(memory_format=self.layout) for _ in range(2))
        mask = torch.rand(self.mask_shape) < 0.6
        mask.view(-1)[:3] = torch.tensor([True, False, True])
        return 2 * x + 3, dy, mask


CASES = {
    "features": Case(bn.BatchNorm1d, (9, 3), (9,)),
    "sequences": Case(bn.BatchNorm1d, (4, 3, 6), (4, 6)),
    "sequences, one mask for all": Case(bn.BatchNorm1d, (4, 3, 6), (1, 6)),
    "images": Case(bn.BatchNorm2d, (4, 3, 5, 4), (4, 5, 4)),
    "images, whole samples": Case(bn.BatchNorm2d, (4, 3, 5, 4), (4, 1, 1)),
    "images, one mask for all": Case(bn.BatchNorm2d, (4, 3, 5, 4), (5, 4)),
    "images, columns": Case(bn.BatchNorm2d, (4, 3, 5, 4), (4, 1, 4)),
    "images, channels last": Case(bn.BatchNorm2d, (4, 3, 5, 4), (4, 5, 4), torch.channels_last),
    "volumes": Case(bn.BatchNorm3d, (3, 3, 2, 3, 2), (3, 2, 3, 2)),
    "volumes, channels last": Case(bn.BatchNorm3d, (3, 3, 2, 3, 2), (3, 2, 3, 2), torch.channels_last_3d),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SEQUENCES, IMAGES = CASES["sequences"], CASES["images"]


def layer_of(kind, **options):
    """Return a layer none of whose numbers is at its initial value."""
    layer = kind(3, **options)
    with torch.no_grad():
        for v in [*layer.parameters(), layer.running_mean, layer.running_var]:
            v.copy_(torch.rand_like(v) + 0.5)
    return layer


def full(mask, x):
    """Broadcast a mask to ``(N, *spatial)``."""
    return mask.expand(x.shape[0], *x.shape[2:])


def packed(v, mask):
    """Return the valid values as ``(M, C)``."""
    return v.movedim(1, -1)[full(mask, v)]


def hidden(v, mask):
    return v.movedim(1, -1)[~full(mask, v)]


def step(layer, x, dy, **given):
    """Return output, gradients of input and parameters, and statistics after one step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, **given)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return [y.detach(), *grads, *(v.clone() for v in layer.buffers())]


def torchs_step(layer, x, dy):
    """Return what `step` does, by torch's own layer on ``(M, C)`` in float64."""
    torchs = nn.BatchNorm1d(3, layer.eps, layer.momentum, dtype=torch.float64).train(layer.training)
    torchs.load_state_dict({name: layer.state_dict()[name] for name in torchs.state_dict()})
    return step(torchs, x.double(), dy.double())


def poisoned(x, mask, poison):
    return torch.where(mask_over(mask, x), x, poison)


def mask_over(mask, x):
    return full(mask, x).unsqueeze(1).expand_as(x)


def assert_equal(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_all_near(got, expected, **how):
    for a, b in zip(got, expected, strict=True):
        if a.dtype.is_floating_point:
            assert_near(a.detach(), b.detach(), **how)
        else:
            assert torch.equal(a, b)


# --- the valid values alone ---------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_mask_is_torchs_batch_normalization_of_the_valid_values(case, dtype, momentum):
    layer = layer_of(case.kind, momentum=momentum, dtype=dtype)
    # the second step tells a cumulative average from a moving one
    for _ in range(2):
        x, dy, mask = case.problem(dtype)
        expected = torchs_step(layer, packed(x, mask), packed(dy, mask))
        y, dx, *rest = step(layer, x, dy, mask=mask)
        # float64 is held to another float64 computation, which errs as well
        assert_all_near([packed(y, mask), packed(dx, mask), *rest], expected, ulps=4 if dtype == torch.float32 else 32)
        assert y.dtype == dx.dtype == dtype


@every_case
def test_masked_places_have_output_and_gradient_zero(case):
    x, dy, mask = case.problem()
    y, dx, *_ = step(layer_of(case.kind), x, dy, mask=mask)
    assert not hidden(y, mask).any()
    assert not hidden(dx, mask).any()


@every_case
def test_the_output_keeps_the_layout_of_the_input(case):
    x, dy, mask = case.problem()
    y, dx, *_ = step(layer_of(case.kind), x, dy, mask=mask)
    assert y.stride() == x.stride()
    assert dx.stride() == x.stride()


@every_case
def test_a_mask_that_is_true_everywhere_is_no_mask(case):
    layer = layer_of(case.kind)
    x, dy, mask = case.problem()
    expected = torchs_step(layer, *(v.movedim(1, -1).reshape(-1, 3) for v in (x, dy)))
    y, dx, *rest = step(layer, x, dy, mask=torch.ones_like(mask))
    assert_all_near([v.movedim(1, -1).reshape(-1, 3) for v in (y, dx)] + rest, expected)


@pytest.mark.parametrize(
    "case",
    [
        CASES["features"],
        SEQUENCES,
        Case(bn.BatchNorm2d, (3, 3, 2, 2), (3, 2, 2)),
        Case(bn.BatchNorm2d, (3, 3, 2, 2), (3, 1, 2), torch.channels_last),
        Case(bn.BatchNorm3d, (2, 3, 2, 2, 1), (2, 2, 2, 1)),
    ],
    ids=["features", "sequences", "images", "images, channels last", "volumes"],
)
def test_derivatives_of_first_and_second_order_are_right(case):
    layer = layer_of(case.kind, dtype=torch.float64)
    x, _, mask = case.problem(torch.float64)
    weight = torch.rand(case.shape[0], dtype=torch.float64) + 0.5
    inputs = [v.detach().clone().requires_grad_() for v in (x, layer.weight, layer.bias)]

    def forward(x, gamma, beta, **given):
        return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, (x,), given)

    for given in ({"mask": mask}, {"mask": mask, "sample_weight": weight}):
        assert torch.autograd.gradcheck(lambda *v, given=given: forward(*v, **given), inputs)
        # a random projection of all second derivatives: each of them alone would take ten seconds
        assert torch.autograd.gradgradcheck(lambda *v, given=given: forward(*v, **given), inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_layers_without_parameters_take_masks(options):
    layer = SEQUENCES.kind(3, **options)
    x, dy, mask = SEQUENCES.problem()
    y, dx, *_ = step(layer, x, dy, mask=mask)
    expected = step(nn.BatchNorm1d(3, dtype=torch.float64, **options), *(packed(v.double(), mask) for v in (x, dy)))
    assert_all_near([packed(y, mask), packed(dx, mask)], expected[:2])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_a_gradient_that_is_not_wanted_is_not_given(frozen):
    layer = layer_of(SEQUENCES.kind)
    x, dy, mask = SEQUENCES.problem()
    leaves = {"x": x.requires_grad_(), "weight": layer.weight, "bias": layer.bias}
    expected = dict(zip(leaves, torch.autograd.grad(layer(x, mask), leaves.values(), dy), strict=True))
    leaves[frozen].requires_grad_(False)
    layer(x, mask).backward(dy)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_float64_rounded_once(dtype):
    x, dy, mask = SEQUENCES.problem(dtype)
    layer = layer_of(SEQUENCES.kind)
    wide = batch_norm_train(*(v.detach().double() for v in (x, layer.weight, layer.bias)), mask=mask)
    y, dx, *_ = step(layer, x, dy, mask=mask)
    assert torch.equal(y, wide.y.to(dtype))
    grads = batch_norm_backward(dy.double(), x.double(), layer.weight.detach().double(), mask=mask)
    assert torch.equal(dx, grads.dx.to(dtype))


# --- padding ------------------------------------------------------------------------------------------------

POISON = [np.nan, np.inf, -np.inf]
MODES = {
    "training": {},
    "training with activation": {"activation": "silu"},
    "ghost batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": {"start": 0, "rmax_at": 0, "dmax_at": 0}},
    "evaluation": {"training": False},
    "evaluation with activation": {"training": False, "activation": "sigmoid"},
    "evaluation by example": {"training": False, "example_weight": 0.4},
    "frozen": {"frozen": True},
}


def layer_in(mode, kind):
    options = dict(mode)
    training, frozen = options.pop("training", True), options.pop("frozen", False)
    layer = layer_of(kind, **options).train(training)
    return bn.freeze(layer, affine=False) if frozen else layer


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("case", [SEQUENCES, IMAGES, CASES["images, channels last"]], ids=["1d", "2d", "channels last"])
def test_what_is_in_the_padding_reaches_no_bit_of_the_results(case, poison, mode):
    x, dy, mask = case.problem()
    torch.manual_seed(1)
    expected = step(layer_in(mode, case.kind), poisoned(x, mask, 0.0), poisoned(dy, mask, 0.0), mask=mask)
    torch.manual_seed(1)
    got = step(layer_in(mode, case.kind), poisoned(x, mask, poison), dy, mask=mask)
    assert all(torch.isfinite(v).all() for v in got)
    assert_equal(got, expected)


@pytest.mark.parametrize("poison", POISON)
def test_an_upstream_gradient_at_masked_places_reaches_nothing(poison):
    x, dy, mask = SEQUENCES.problem()
    layers = [layer_of(SEQUENCES.kind) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    expected = step(layers[0], x, poisoned(dy, mask, 0.0), mask=mask)
    assert_equal(step(layers[1], x, poisoned(dy, mask, poison), mask=mask), expected)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_padding_of_a_residual_is_harmless_too(activation, training):
    x, dy, mask = SEQUENCES.problem()
    layer = layer_of(SEQUENCES.kind, activation=activation).train(training)
    residual = poisoned(torch.randn_like(x), mask, torch.nan).requires_grad_()
    y = layer(x.requires_grad_(), mask, residual=residual)
    grads = torch.autograd.grad(y, [x, residual, *layer.parameters()], dy)
    assert all(torch.isfinite(v).all() for v in (y, *grads))
    assert not hidden(grads[1], mask).any()


@every_case
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"momentum": None}, {"debias": True}], ids=str)
def test_a_batch_that_is_masked_altogether_gives_zeros_and_changes_nothing(case, options):
    layer = layer_of(case.kind, **options)
    before = [v.clone() for v in layer.buffers()]
    x, dy, mask = case.problem()
    results = step(layer, x * torch.nan, dy, mask=torch.zeros_like(mask))
    assert all(not v.any() for v in results[:4])
    assert_equal(results[4:], before)
    assert layer.skipped_updates == 0


# --- weights ------------------------------------------------------------------------------------------------


@every_case
def test_a_sample_of_weight_two_is_two_samples(case):
    layers = [layer_of(case.kind) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, dy, _ = case.problem()
    weight = torch.ones(len(x))
    weight[0] = 2
    twice = torch.cat([x[:1], x])
    # the copies share the upstream gradient of their sample
    upstream = torch.cat([dy[:1] / 2, dy[:1] / 2, dy[1:]])
    y, dx, *rest = step(layers[0], x, dy, sample_weight=weight)
    y2, dx2, *rest2 = step(layers[1].double(), twice.double(), upstream.double())
    dx2 = torch.cat([dx2[:1] + dx2[1:2], dx2[2:]])
    assert_all_near([y, dx, *rest], [y2[1:], dx2, *rest2])


@every_case
@pytest.mark.parametrize("of_places", [False, True], ids=["of samples", "of places"])
def test_weights_are_frequencies_of_the_definition(case, of_places):
    layer = layer_of(case.kind)
    x, dy, mask = case.problem()
    weight = torch.rand(x[:, 0].shape if of_places else (len(x),)) * 3 + 0.1
    y, dx, dgamma, dbeta, mean, var, _ = step(layer_twin(layer), x, dy, mask=mask, sample_weight=weight)
    numbers = [
        v.detach().double().numpy() for v in (x, layer.weight, layer.bias, layer.running_mean, layer.running_var)
    ]
    given = {"mask": mask.numpy(), "sample_weight": weight.numpy()}
    expected = batch_norm_train(*numbers, **given)
    grads = batch_norm_backward(dy.double().numpy(), *numbers[:2], **given)
    for a, b in zip((y, mean, var, dx, dgamma, dbeta), (expected.y, *expected[2:], *grads), strict=True):
        assert_near(a, b)


def layer_twin(layer):
    twin = type(layer)(3, **layer.options.changed())
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize("scale", [1e-3, 8.0, 1e6])
def test_the_unit_of_the_weights_does_not_matter_to_outputs_and_gradients(scale):
    layer, (x, dy, mask) = layer_of(IMAGES.kind), IMAGES.problem()
    weight = torch.rand(len(x)) + 0.1
    expected = step(layer_twin(layer), x, dy, mask=mask, sample_weight=weight.double())
    got = step(layer_twin(layer), x, dy, mask=mask, sample_weight=scale * weight.double())
    assert_all_near(got[:4], expected[:4], ulps=1)


def test_whole_numbers_are_weights():
    layer, (x, dy, _) = layer_of(SEQUENCES.kind), SEQUENCES.problem()
    weight = torch.tensor([1, 2, 0, 3])
    expected = step(layer_twin(layer), x, dy, sample_weight=weight.float())
    assert_equal(step(layer_twin(layer), x, dy, sample_weight=weight), expected)


def test_a_sample_of_weight_zero_is_normalized_but_not_measured():
    layer, (x, _, _) = layer_of(SEQUENCES.kind), SEQUENCES.problem()
    others = layer_twin(layer)
    y = layer(x, sample_weight=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert_near(y[1:].detach(), others.double()(x[1:].double()).detach())
    assert y[0].abs().min() > 0
    assert_near(layer.running_var, others.running_var)


@pytest.mark.parametrize("with_mask", [False, True])
def test_weights_that_need_a_gradient_get_the_right_one(with_mask):
    layer, (x, _, mask) = layer_of(SEQUENCES.kind, dtype=torch.float64), SEQUENCES.problem(torch.float64)
    weight = (torch.rand(len(x), dtype=torch.float64) + 0.5).requires_grad_()
    given = {"mask": mask} if with_mask else {}
    assert torch.autograd.gradcheck(lambda w: layer(x, sample_weight=w, **given), [weight])
    assert torch.autograd.gradgradcheck(lambda w: layer(x, sample_weight=w, **given), [weight])


def test_with_weights_that_need_a_gradient_the_others_stay_the_same():
    layer, (x, dy, mask) = layer_of(SEQUENCES.kind), SEQUENCES.problem()
    weight = torch.rand(len(x)) + 0.5
    expected = step(layer_twin(layer), x, dy, mask=mask, sample_weight=weight)
    got = step(layer_twin(layer), x, dy, mask=mask, sample_weight=weight.clone().requires_grad_())
    assert_all_near(got, expected, ulps=1)


# --- lengths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SEQUENCES, IMAGES, CASES["volumes"]], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_lengths_are_a_mask_of_the_first_places_of_the_last_axis(case, dtype):
    x, dy, _ = case.problem()
    lengths = torch.arange(len(x)) % (x.shape[-1] + 1)
    mask = (torch.arange(x.shape[-1]) < lengths[:, None]).view(len(x), *[1] * (x.ndim - 3), -1)
    layer = layer_of(case.kind)
    expected = step(layer_twin(layer), x, dy, mask=mask)
    assert_equal(step(layer_twin(layer), x, dy, lengths=lengths.to(dtype)), expected)


@pytest.mark.parametrize("case", [SEQUENCES, IMAGES], ids=["1d", "2d"])
def test_a_mask_and_lengths_hide_what_either_hides(case):
    x, dy, mask = case.problem()
    lengths = torch.tensor([4, 0, 3, 2])
    short = (torch.arange(x.shape[-1]) < lengths[:, None]).view(4, *[1] * (x.ndim - 3), -1)
    layer = layer_of(case.kind)
    expected = step(layer_twin(layer), x, dy, mask=mask & short)
    assert_equal(step(layer_twin(layer), x, dy, mask=mask, lengths=lengths), expected)


def test_lengths_of_zero_everywhere_change_nothing():
    layer, (x, dy, _) = layer_of(SEQUENCES.kind), SEQUENCES.problem()
    before = [v.clone() for v in layer.buffers()]
    results = step(layer, x, dy, lengths=torch.zeros(4, dtype=torch.long))
    assert all(not v.any() for v in results[:4])
    assert_equal(results[4:], before)


# --- together with the options of a layer -------------------------------------------------------------------


@pytest.mark.parametrize("case", [SEQUENCES, IMAGES], ids=["1d", "2d"])
@pytest.mark.parametrize("weighted", [False, True], ids=["mask", "mask and weights"])
@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({"virtual_batch_size": 2}, None),
        ({"virtual_batch_size": 3}, None),
        ({"renorm": {"rmax": 1.3, "dmax": 0.2, "start": 0, "rmax_at": 0, "dmax_at": 0}}, Renorm(1.3, 0.2)),
        (
            {"virtual_batch_size": 2, "renorm": {"rmax": 1.3, "dmax": 0.2, "start": 0, "rmax_at": 0, "dmax_at": 0}},
            Renorm(1.3, 0.2),
        ),
    ],
    ids=["ghosts", "one ghost larger", "renorm", "ghosts with renorm"],
)
def test_ghost_batches_and_renorm_are_those_of_the_definition(case, weighted, options, bounds):
    layer = layer_of(case.kind, **options)
    # the second step reads what the first has left
    for _ in range(2):
        x, dy, mask = case.problem()
        numbers = [v.detach().double().numpy() for v in (x, layer.weight, layer.bias, *layer.running()[:2])]
        given = {"mask": mask.numpy(), "virtual_batch_size": options.get("virtual_batch_size"), "renorm": bounds}
        extra = {"sample_weight": torch.rand(len(x)) * 3 + 0.2} if weighted else {}
        given |= {name: v.numpy() for name, v in extra.items()}
        expected = batch_norm_train(*numbers, **given)
        grads = batch_norm_backward(dy.double().numpy(), *numbers[:2], *numbers[3:], **given)
        y, dx, dgamma, dbeta, mean, var, _ = step(layer, x, dy, mask=mask, **extra)
        for a, b in zip((y, mean, var, dx, dgamma, dbeta), (expected.y, *expected[2:], *grads), strict=True):
            assert_near(a, b)


@pytest.mark.parametrize("activation", sorted(bn.options.ACTIVATIONS))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_activation_and_residual_follow_and_masked_places_stay_zero(activation, training):
    layer = layer_of(IMAGES.kind, activation=activation).train(training)
    plain = bn.BatchNorm2d(3).train(training)
    plain.load_state_dict(layer.state_dict())
    x, dy, mask = IMAGES.problem()
    leaves = [[v.clone().requires_grad_() for v in (x, torch.zeros_like(x) + 0.3)] for _ in range(2)]
    y = layer(leaves[0][0], mask, residual=leaves[0][1])
    expected = bn.options.ACTIVATIONS[activation](plain(leaves[1][0], mask) + leaves[1][1])
    expected = expected * mask[:, None]
    assert torch.equal(y, expected)
    assert not hidden(y, mask).any()
    got, wanted = (torch.autograd.grad(v, each, dy) for v, each in ((y, leaves[0]), (expected, leaves[1])))
    assert_equal(got, wanted)


@every_case
@pytest.mark.parametrize("frozen", [False, True], ids=["evaluation", "frozen in training"])
def test_evaluation_normalizes_the_valid_values_as_torch_does(case, frozen):
    layer = layer_of(case.kind)
    layer = bn.freeze(layer, affine=False) if frozen else layer.eval()
    x, dy, mask = case.problem()
    torchs = nn.BatchNorm1d(3).eval().double()
    torchs.load_state_dict(layer.state_dict())
    expected = step(torchs, packed(x, mask).double(), packed(dy, mask).double())
    y, dx, *rest = step(layer, x, dy, mask=mask)
    # dβ is a float32 sum of ATen's, that may cancel
    assert_all_near([packed(y, mask), packed(dx, mask), *rest], expected, ulps=16)
    assert not hidden(y, mask).any()
    assert not hidden(dx, mask).any()


def test_weights_do_nothing_in_evaluation():
    layer, (x, dy, _) = layer_of(SEQUENCES.kind).eval(), SEQUENCES.problem()
    assert_equal(step(layer, x, dy, sample_weight=torch.rand(4) + 0.5), step(layer, x, dy))


def test_an_examples_own_statistics_are_those_of_its_valid_values():
    layer = layer_of(SEQUENCES.kind, example_weight=0.3).eval()
    x, _, mask = SEQUENCES.problem()
    mask[3] = False
    y = layer(x, mask)
    for got, sample, valid in zip(y[:3], x[:3], mask[:3], strict=True):
        numbers = (v.detach().double() for v in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
        expected = batch_norm_example_inference(sample[None, :, valid].double(), *numbers, example_weight=0.3)
        assert_near(got[:, valid].detach(), expected[0])
    assert not y[3].any()


def test_domains_keep_the_statistics_of_their_valid_values():
    layer = layer_of(SEQUENCES.kind, domains=["target"])
    x, dy, mask = SEQUENCES.problem()
    own = [layer.running_mean.clone(), layer.running_var.clone(), layer.num_batches_tracked.clone()]
    torchs = nn.BatchNorm1d(3)
    torchs.load_state_dict({**layer.state_dict(), **dict(zip(without_suffix(), layer.running(), strict=True))}, False)
    with bn.domain(layer, "target"):
        torchs.running_mean.copy_(layer.running()[0])
        torchs.running_var.copy_(layer.running()[1])
        step(layer, x, dy, mask=mask)
        got = [v.clone() for v in layer.running()]
    torchs.double()(packed(x, mask).double())
    assert_all_near(got[:2], [torchs.running_mean, torchs.running_var])
    assert got[2] == 1
    assert_equal(layer.running(), own)


def without_suffix():
    return ["running_mean", "running_var", "num_batches_tracked"]


def test_accumulated_masked_batches_update_once_as_all_valid_values_together():
    layer = layer_of(SEQUENCES.kind)
    problems = [SEQUENCES.problem() for _ in range(3)]
    weight = torch.tensor([1.0, 2.0, 1.0, 3.0])
    everything = layer_twin(layer)
    everything(
        torch.cat([x for x, _, _ in problems]),
        torch.cat([mask for *_, mask in problems]),
        torch.cat([weight] * 3),
    )
    with bn.accumulate(layer):
        for x, _, mask in problems:
            layer(x, mask, weight)
        layer(x * torch.nan, torch.zeros_like(mask))
    assert_all_near(layer.running()[:2], everything.running()[:2])
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_checkpointed_masked_forward_is_the_same_bit_for_bit(reentrant, mode):
    problems = [SEQUENCES.problem() for _ in range(3)]
    torch.manual_seed(1)
    expected_layer = layer_in(mode, SEQUENCES.kind)
    torch.manual_seed(1)
    layer = layer_in(mode, SEQUENCES.kind)
    weight = torch.rand(4) + 0.5

    def checkpointed(x, **given):
        return checkpoint(lambda x: layer(x, **given), x, use_reentrant=reentrant)

    for x, dy, mask in problems:
        expected = step(expected_layer, x, dy, mask=mask, sample_weight=weight)
        leaf = x.clone().requires_grad_()
        y = checkpointed(leaf, mask=mask, sample_weight=weight)
        layer.zero_grad()
        y.backward(dy)
        got = [y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]
        assert_equal(got, expected)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 8}, {"renorm": True}, {"activation": "relu"}], ids=str)
def test_a_masked_forward_keeps_no_wide_copy_of_the_input_for_the_backward(options):
    layer = bn.BatchNorm2d(16, **options)
    x = torch.randn(32, 16, 8, 8, requires_grad=True)
    mask, weight = torch.rand(32, 8, 8) < 0.7, torch.rand(32) + 0.5
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, mask, weight)
    assert x.untyped_storage().data_ptr() in saved
    assert all(v.numel() < x.numel() for v in saved.values() if v.dtype == torch.float64)
    floats = sum(v.untyped_storage().nbytes() for v in saved.values() if v.dtype == torch.float32)
    # the input, and the input of the activation where there is one
    assert floats <= (2 if "activation" in options else 1) * x.untyped_storage().nbytes() + 4096


# --- what can't be ------------------------------------------------------------------------------------------

TWO_PLACES = torch.ones(4, 2, dtype=torch.bool)
MISTAKES = {
    "mask of floats": (SEQUENCES, {"mask": torch.ones(4, 6)}, ["mask must be bool", "float32"]),
    "mask of another shape": (SEQUENCES, {"mask": TWO_PLACES}, ["mask must broadcast to (4, 6)", "(4, 2)"]),
    "mask with channels": (SEQUENCES, {"mask": torch.ones(4, 3, 6, dtype=torch.bool)}, ["mask must", "(4, 3, 6)"]),
    "mask of samples on images": (IMAGES, {"mask": torch.ones(4) > 0}, ["(4, 3, 5, 4)", "mask.view(-1, 1, 1)", "(4,)"]),
    "mask of floats, lengths": (
        SEQUENCES,
        {"mask": torch.ones(4, 6), "lengths": torch.tensor([3, 4, 5, 6])},
        ["mask must be bool", "float32"],
    ),
    "mask of another shape, lengths": (
        SEQUENCES,
        {"mask": TWO_PLACES, "lengths": torch.tensor([3, 4, 5, 6])},
        ["mask must", "(4, 2)"],
    ),
    "mask of samples, lengths": (
        Case(bn.BatchNorm1d, (4, 3, 4), (4, 4)),
        {"mask": torch.ones(4) > 0, "lengths": torch.tensor([1, 2, 3, 4])},
        ["mask must", "mask.view(-1, 1)", "(4,)"],
    ),
    "negative weight": (SEQUENCES, {"sample_weight": torch.tensor([1.0, -2.0, 1.0, 1.0])}, ["not negative", "-2.0"]),
    "weight NaN": (SEQUENCES, {"sample_weight": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, ["finite", "nan"]),
    "weight infinite": (SEQUENCES, {"sample_weight": torch.tensor([1.0, torch.inf, 1.0, 1.0])}, ["finite", "inf"]),
    "weights all zero": (SEQUENCES, {"sample_weight": torch.zeros(4)}, ["positive somewhere", "zeros"]),
    "weights of another shape": (SEQUENCES, {"sample_weight": torch.ones(5)}, ["sample_weight must", "(5,"]),
    "weights of places that are not there": (
        SEQUENCES,
        {"sample_weight": torch.ones(4, 7)},
        ["sample_weight", "(4, 7)"],
    ),
    "length beyond the sequence": (SEQUENCES, {"lengths": torch.tensor([7, 1, 1, 1])}, ["between 0 and 6", "7"]),
    "negative length": (SEQUENCES, {"lengths": torch.tensor([1, -1, 1, 1])}, ["between 0 and 6", "-1"]),
    "lengths of floats": (SEQUENCES, {"lengths": torch.ones(4)}, ["lengths must be integers", "float32"]),
    "lengths of bools": (SEQUENCES, {"lengths": torch.ones(4) > 0}, ["lengths must be integers", "bool"]),
    "too few lengths": (SEQUENCES, {"lengths": torch.tensor([1, 2])}, ["lengths", "4 samples", "(2,)"]),
    "lengths of features": (CASES["features"], {"lengths": torch.ones(9, dtype=torch.long)}, ["last axis", "(9, 3)"]),
    "residual of another shape": (
        SEQUENCES,
        {"residual": torch.zeros(4, 3, 5)},
        ["residual", "(4, 3, 6)", "(4, 3, 5)"],
    ),
}


class Model(nn.Module):
    """A layer with a dotted name."""

    def __init__(self, layer):
        super().__init__()
        self.stem = nn.ModuleList([nn.Identity(), layer])

    def forward(self, x, **given):
        return self.stem[1](x, **given)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("case", "given", "texts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_layer_and_values_and_changes_nothing(case, given, texts, training):
    model = Model(layer_of(case.kind)).train(training)
    before = [v.clone() for v in model.buffers()]
    with pytest.raises(BatchNormError, match=re.escape("'stem.1'")) as caught:
        model(torch.randn(case.shape), **given)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    assert_equal(list(model.buffers()), before)


def test_weights_that_are_zero_wherever_the_mask_is_true_are_named():
    mask = torch.tensor([True, False, False, False]).view(4, 1)
    with pytest.raises(BatchNormError, match="positive somewhere"):
        layer_of(SEQUENCES.kind)(torch.randn(SEQUENCES.shape), mask, torch.tensor([0.0, 1.0, 1.0, 1.0]))
