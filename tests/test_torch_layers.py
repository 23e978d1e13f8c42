"""One contract for every layer and every option: whatever torch's own layer does, ours does too."""

import copy
import io
import pickle
import re
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

from batchnorm import torch as bn
from batchnorm.errors import ChannelError, ShapeError, TransformError
from batchnorm.functional import batch_norm_example_inference, batch_norm_inference, batch_norm_train, update_running
from oracle import assert_near


def falling(steps):
    """Return a momentum that falls with the number of batches."""
    return 0.5 / (steps + 1)


TORCHS = {
    "default": {},
    "eps and momentum": {"eps": 0.1, "momentum": 0.3},
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no tracking": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "float64": {"dtype": torch.float64},
}
ACTIVATIONS = {
    "relu": nn.functional.relu,
    "relu6": nn.functional.relu6,
    "leaky_relu": nn.functional.leaky_relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "hardswish": nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# what is no keyword of a layer: how it is prepared after it was made
PREPARED = ("frozen", "domain")
OURS = {
    **{name: {"activation": name} for name in ACTIVATIONS},
    "ghost batches": {"virtual_batch_size": 3},
    # at full strength from the first step on
    "renorm": {"renorm": {"start": 0, "dmax_at": 0, "rmax_at": 0}},
    "single by running": {"on_single": "running"},
    "single by itself": {"on_single": "skip"},
    "biased": {"unbiased": False},
    "debiased": {"debias": True},
    "total variance": {"total_variance": True},
    "example weight": {"example_weight": 0.3},
    "domains": {"domains": ["target", "other"]},
    "a domain in use": {"domains": ["target", "other"], "domain": "target"},
    "schedule": {"momentum": falling},
    "frozen": {"frozen": True},
    "several": {"activation": "silu", "virtual_batch_size": 3, "total_variance": True, "momentum": None},
}
OPTIONS: dict[str, dict[str, Any]] = TORCHS | OURS


# a schedule is asked in Python, which needs the value of the number of batches
STATIC = {name: options for name, options in OPTIONS.items() if name != "schedule"}


class Pair(NamedTuple):
    """A layer, torch's layer of the same name, and the shape of an input of three channels."""

    ours: type[nn.Module]
    torchs: type[nn.Module]
    shape: tuple[int, ...]

    def fresh(self, options=None, **more):
        """Return a layer of ours as it is made and prepared."""
        options = {**(options or {}), **more}
        layer = self.ours(3, **{name: v for name, v in options.items() if name not in PREPARED})
        layer.domain = options.get("domain")
        return bn.freeze(layer) if options.get("frozen") else layer

    def layer(self, options=None, **more):
        """Return a layer of ours with weights and statistics, none of them at its initial value."""
        layer = self.fresh(options, **more)
        with torch.no_grad():
            for v in [*layer.parameters(), *layer.buffers()]:
                if v.is_floating_point():
                    v.copy_(torch.rand_like(v) + 0.5)
        return layer

    def both(self, **options):
        """Return one of each, with the same weights and statistics."""
        ours, torchs = self.layer(**options), self.torchs(3, **options)
        torchs.load_state_dict(ours.state_dict())
        return ours, torchs

    def batch(self, options=None, shape=None):
        """Return an input and an upstream gradient in the dtype of the options."""
        dtype = (options or {}).get("dtype", torch.float32)
        return torch.randn(shape or self.shape, dtype=dtype) * 2 + 3, torch.randn(shape or self.shape, dtype=dtype)


PAIRS = {
    "BatchNorm1d": Pair(bn.BatchNorm1d, nn.BatchNorm1d, (9, 3)),
    "BatchNorm1d of sequences": Pair(bn.BatchNorm1d, nn.BatchNorm1d, (6, 3, 5)),
    "BatchNorm2d": Pair(bn.BatchNorm2d, nn.BatchNorm2d, (6, 3, 4, 2)),
    "BatchNorm3d": Pair(bn.BatchNorm3d, nn.BatchNorm3d, (6, 3, 2, 2, 3)),
}
IMAGES = PAIRS["BatchNorm2d"]
ROWS_AND_IMAGES = {name: PAIRS[name] for name in ("BatchNorm1d", "BatchNorm2d")}


def possible(pair, options):
    """Say whether a layer can have the options: an example's own statistics need places."""
    return len(pair.shape) > 2 or "example_weight" not in options


def asked(pair, options):
    """Say whether a pair of layer and options is worth a test: each activation is, once."""
    return possible(pair, options) and (options.keys() != {"activation"} or pair is IMAGES)


def cases(options, pairs=PAIRS):
    """Return every pair with every entry of options."""
    return pytest.mark.parametrize(
        ("pair", "options"),
        [
            pytest.param(pair, given, id=f"{name}-{kind}")
            for kind, pair in pairs.items()
            for name, given in options.items()
            if asked(pair, given)
        ],
    )


every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
every_case = cases(OPTIONS)
every_option_of_torch = cases(TORCHS)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def step(layer, x, dy):
    """Return output, input gradient, parameter gradients and statistics after one step."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    parts = [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad), *layer.buffers()]
    layer.zero_grad()
    return parts


def steps(layer, batches):
    """Return copies of what some steps give, one after another."""
    return [v.clone() for x, dy in batches for v in step(layer, x, dy)]


def assert_same(ours, torchs, ulps=16):
    """Hold ours to a few units in the last place of torch's: both may sum in another order."""
    for got, expected in zip(ours, torchs, strict=True):
        assert got.dtype == expected.dtype
        if not got.dtype.is_floating_point:
            assert torch.equal(got, expected)
        elif got.element_size() > 2:
            assert_near(got.detach(), expected.detach(), ulps=ulps)
        else:
            # numpy knows no bfloat16; a sum that is rounded once, after the sums of ATen, may be some neighbours away
            assert_near(got.detach().float(), expected.detach().float(), ulps=max(4 * in_float32(got.dtype), ulps))


def in_float32(dtype):
    """Return a unit in the last place of a dtype, in those of float32."""
    return torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def primitive(x, weight=None, bias=None, eps=1e-5):
    """Batch normalization in operations whose derivatives nobody doubts."""
    axes = [i for i in range(x.ndim) if i != 1]
    weight, bias = (v if v is None else v.view(-1, *[1] * (x.ndim - 2)) for v in (weight, bias))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / ((centred * centred).mean(axes, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


# values


@every_option_of_torch
@every_mode
def test_outputs_gradients_and_statistics_are_those_of_torch(pair, options, training):
    ours, torchs = (layer.train(training) for layer in pair.both(**options))
    # the second step tells a cumulative average from a moving one
    batches = [pair.batch(options) for _ in range(2)]
    assert_same(steps(ours, batches), steps(torchs, batches))


def defined(layer, x):
    """Return what a layer must give for ``x``, by the definition in float64, and its running statistics afterwards."""
    options, suffix = layer.options, "" if layer.domain is None else f"_{layer.domain}"
    weight, bias = layer.weight.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    mean, var = (layer.get_buffer(name + suffix).double() for name in ("running_mean", "running_var"))
    count = int(layer.get_buffer("num_batches_tracked" + suffix))
    if layer.training and not layer.frozen_statistics:
        renorm = options.renorm and options.renorm.bounds(count)
        got = batch_norm_train(
            x, weight, bias, *((mean, var) if renorm else ()), eps=layer.eps,
            virtual_batch_size=options.virtual_batch_size, renorm=renorm,
        )  # fmt: skip
        momentum = 1 / (count + 1) if layer.momentum is None else layer.momentum
        momentum = momentum(count) if callable(momentum) else momentum
        momentum /= 1 - (1 - momentum) ** (count + 1) if options.debias else 1
        kept = {"unbiased": options.unbiased, "total_variance": options.total_variance}
        y, (mean, var) = got.y, update_running(mean, var, got.moments, decay=1 - momentum, **kept)
        count += 1
    elif options.example_weight:
        y = batch_norm_example_inference(
            x, mean, var, weight, bias, example_weight=options.example_weight, eps=layer.eps
        )
    else:
        y = batch_norm_inference(x, mean, var, weight, bias, eps=layer.eps)
    activation = ACTIVATIONS.get(options.activation, nn.Identity())
    return activation(y), weight, bias, {f"running_mean{suffix}": mean, f"running_var{suffix}": var}, count


@cases(OURS)
@every_mode
def test_outputs_gradients_and_statistics_of_an_option_are_those_of_the_definition(pair, options, training):
    layer = pair.layer(options).train(training)
    for _ in range(2):
        x, dy = pair.batch()
        wide = x.double().requires_grad_()
        before = {name: v.clone() for name, v in layer.named_buffers()}
        expected, weight, bias, statistics, count = defined(layer, wide)
        expected.backward(dy.double())
        got = step(layer, x, dy)
        gradients = () if options.get("frozen") else (weight.grad, bias.grad)
        for v, right in zip(got, [expected.detach(), wide.grad, *gradients], strict=False):
            assert_near(v, right, ulps=32)
        for name, v in layer.named_buffers():
            if name in statistics:
                assert_near(v, statistics[name].detach(), ulps=8, what=name)
            elif name == "num_batches_tracked" + ("" if layer.domain is None else f"_{layer.domain}"):
                assert v == count
            else:
                assert torch.equal(v, before[name]), name


@every_pair
def test_frozen_parameters_get_no_gradient(pair):
    ours, torchs = (layer.requires_grad_(False) for layer in pair.both())
    x, dy = pair.batch()
    for layer in (ours, torchs):
        step(layer, x, dy)
        assert [p.grad for p in layer.parameters()] == [None, None]


@every_pair
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(pair, name):
    ours, torchs = pair.both()
    x, dy = pair.batch()
    for layer in (ours, torchs):
        layer.get_parameter(name).requires_grad_(False)
    assert_same(step(ours, x, dy), step(torchs, x, dy))
    assert ours.get_parameter(name).grad is None


@every_pair
@every_mode
def test_an_input_without_gradient_leaves_those_of_the_parameters_as_in_torch(pair, training):
    ours, torchs = (layer.train(training) for layer in pair.both())
    x, dy = pair.batch()
    for layer in (ours, torchs):
        layer(x).backward(dy)
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in torchs.parameters()])


@every_case
def test_two_forwards_before_one_backward_give_the_gradients_of_both(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        first, second = pair.batch(options), pair.batch(options)
        alone = copy.deepcopy(layer)
        expected = [step(alone, *first)[1], step(alone, *second)[1]]
        inputs = [x.clone().requires_grad_() for x, _ in (first, second)]
        outputs = [layer(x) for x in inputs]
        torch.autograd.backward(outputs, [first[1], second[1]])
        assert all(torch.equal(x.grad, v) for x, v in zip(inputs, expected, strict=True))


@every_case
def test_without_gradients_outputs_and_statistics_are_the_same(pair, options):
    for context in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            layer = pair.layer(options).train(training)
            twin, (x, _) = copy.deepcopy(layer), pair.batch(options)
            with context():
                y = layer(x)
            assert not y.requires_grad
            assert_same([y, *layer.buffers()], [twin(x), *twin.buffers()], ulps=4)


# state


@every_case
def test_a_state_dict_has_the_keys_of_torch_and_those_of_the_domains(pair, options):
    given = {name: v for name, v in options.items() if name in ("affine", "bias", "track_running_stats")}
    names = ("running_mean", "running_var", "num_batches_tracked")
    domains = [f"{name}_{domain}" for domain in options.get("domains", ()) for name in names]
    assert list(pair.layer(options).state_dict()) == [*pair.torchs(3, **given).state_dict(), *domains]


@every_option_of_torch
def test_a_layer_is_an_instance_of_torchs_and_loads_its_checkpoints_both_ways(pair, options):
    assert isinstance(pair.layer(options), pair.torchs)
    for source, target in [pair.both(**options), pair.both(**options)[::-1]]:
        fresh = type(target)(3, **options)
        assert str(fresh.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same(fresh.state_dict().values(), source.state_dict().values())


@every_case
def test_a_checkpoint_of_its_own_is_loaded(pair, options):
    source, target = pair.layer(options), pair.layer(options)
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    assert all(torch.equal(v, source.state_dict()[name]) for name, v in target.state_dict().items())


@cases(OURS)
def test_a_checkpoint_of_torch_loads_into_a_layer_with_options(pair, options):
    _, torchs = pair.both()
    layer = pair.layer(options)
    found = layer.load_state_dict(torchs.state_dict(), strict="domains" not in options)
    assert all(name.endswith(("_target", "_other")) for name in found.missing_keys)
    assert not found.unexpected_keys
    assert all(torch.equal(layer.state_dict()[name], v) for name, v in torchs.state_dict().items())


@every_case
def test_a_checkpoint_from_before_batches_were_counted_is_loaded(pair, options):
    source, target = pair.layer(options), pair.layer(options)
    state = source.state_dict()
    if "num_batches_tracked" in state:
        del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(target.state_dict()[name], v) for name, v in state.items())


@every_pair
def test_a_checkpoint_is_loaded_as_weights_only(pair):
    ours, torchs = pair.both()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    torchs.load_state_dict(torch.load(file, weights_only=True))


@every_option_of_torch
def test_repr_is_that_of_torch(pair, options):
    assert repr(pair.ours(3, **options)) == repr(pair.torchs(3, **options))


@cases(OURS)
def test_repr_shows_the_options_that_are_switched_on(pair, options):
    shown = repr(pair.layer(options))
    assert shown.startswith(f"{pair.ours.__name__}(3, eps=1e-05, momentum=")
    for name in options.keys() - {"domain"}:
        assert f"{'frozen_statistics' if name == 'frozen' else name}=" in shown


@every_case
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_equal_and_independent(pair, options, copied):
    layer = pair.layer(options)
    layer(pair.batch(options)[0])
    twin = copied(layer)
    assert type(twin) is pair.ours
    assert repr(twin) == repr(layer)
    x, dy = pair.batch(options)
    before = {name: v.clone() for name, v in layer.state_dict().items()}
    got = step(twin, x, dy)
    assert all(torch.equal(v, before[name]) for name, v in layer.state_dict().items())
    assert all(torch.equal(v, expected) for v, expected in zip(got, step(layer, x, dy), strict=True))


# devices, dtypes, memory


@every_case
def test_the_meta_device_gives_shapes_without_numbers(pair, options):
    for training in (True, False):
        layer = pair.fresh(options, device="meta").train(training)
        y = layer(torch.empty(pair.shape, device="meta", dtype=options.get("dtype")))
        assert y.shape == pair.shape
        assert y.is_meta
        assert all(v.is_meta for v in layer.state_dict().values())


@every_case
def test_materialized_from_meta_a_layer_is_like_new(pair, options):
    layer = pair.fresh(options, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    expected = pair.fresh(options)
    assert all(torch.equal(v, expected.state_dict()[name]) for name, v in layer.state_dict().items())
    batches = [pair.batch(options)]
    assert_same(steps(layer, batches), steps(expected, batches), ulps=1)
    assert layer.skipped_updates == 0


@cases(OPTIONS, {"BatchNorm2d": IMAGES})
def test_fake_tensors_pass_through(pair, options):
    for training in (True, False):
        with FakeTensorMode():
            layer = pair.fresh(options).train(training)
            x = torch.randn(pair.shape, dtype=options.get("dtype"), requires_grad=True)
            y = layer(x)
            y.backward(torch.randn_like(y))
            assert y.shape == x.grad.shape == pair.shape


@cases({name: options for name, options in TORCHS.items() if "dtype" not in options})
def test_a_layer_moved_to_another_dtype_is_like_torchs(pair, options):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for training in (True, False):
            ours, torchs = (layer.to(dtype).train(training) for layer in pair.both(**options))
            batches = [tuple(v.to(dtype) for v in pair.batch()) for _ in range(2)]
            assert_same(steps(ours, batches), steps(torchs, batches))


@cases({name: options for name, options in OPTIONS.items() if "dtype" not in options})
@pytest.mark.parametrize("moved", [False, True], ids=["float32 parameters", "moved"])
def test_half_precision_is_close_to_single(pair, options, moved):
    for dtype in (torch.float16, torch.bfloat16):
        for training in (True, False):
            layer = pair.layer(options).train(training)
            x, dy = (v.to(dtype) for v in pair.batch())
            layer = layer.to(dtype) if moved else layer
            expected = step(copy.deepcopy(layer).float(), x.float(), dy.float())
            got = step(layer, x, dy)
            assert got[0].dtype == got[1].dtype == dtype
            # x̂, γ, β, their product, the sum and the activation are rounded once each
            for v, right in zip(got[:2], expected[:2], strict=True):
                assert_near(v.float(), right, ulps=8 * in_float32(dtype))
            if not moved:
                assert all(v.dtype != dtype for v in layer.state_dict().values())


def same_statistics(a, b):
    """Say whether two layers hold equal buffers."""
    return all(torch.equal(v, w) for v, w in zip(a.buffers(), b.buffers(), strict=True))


FORMATS = {"BatchNorm2d": torch.channels_last, "BatchNorm3d": torch.channels_last_3d}
images = {name: PAIRS[name] for name in FORMATS}


@cases(OPTIONS, images)
def test_the_memory_format_is_kept(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        memory_format = FORMATS[pair.ours.__name__]
        x, dy = pair.batch(options)
        expected = step(copy.deepcopy(layer), x, dy)
        y, dx, *rest = step(layer, x.contiguous(memory_format=memory_format), dy)
        assert y.is_contiguous(memory_format=memory_format)
        assert dx.is_contiguous(memory_format=memory_format)
        assert_same([y, dx, *rest], expected)


def spread(x):
    """Return the same values, every second in memory."""
    return torch.stack([x, x - 1], -1)[..., 0]


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": spread,
    "a row first": lambda x: torch.cat([x[:1], x])[1:],
}


@every_case
def test_an_input_that_is_not_contiguous_gives_the_same(pair, options):
    for layout in LAYOUTS.values():
        for training in (True, False):
            layer = pair.layer(options).train(training)
            x, dy = pair.batch(options)
            expected = step(copy.deepcopy(layer), x, dy)
            # three samples of a ghost batch may lie close together, which costs digits in any order of summation
            assert_same(
                step(layer, layout(x), layout(dy)), expected, ulps=128 if "virtual_batch_size" in options else 16
            )


@every_case
def test_an_expanded_input_and_an_expanded_gradient_give_the_same(pair, options):
    layer = pair.layer(options)
    x, dy = (v[:, :1].expand(pair.shape) for v in pair.batch(options))
    expected = step(copy.deepcopy(layer), x.contiguous(), dy.contiguous())
    # few values, each many times: their sums cancel, and keep the rounding of their parts
    assert_same(step(layer, x, dy), expected, ulps=64)


@every_case
def test_an_empty_batch_gives_zero_gradients_and_moves_no_statistic(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        twin = copy.deepcopy(layer)
        x, dy = (v[:0] for v in pair.batch(options))
        y, dx, *gradients = step(layer, x, dy)[: 2 + sum(p.requires_grad for p in layer.parameters())]
        assert y.shape == dx.shape == x.shape
        assert all(torch.equal(v, torch.zeros_like(v)) for v in gradients)
        assert same_statistics(layer, twin)


@every_case
def test_autocast_gives_what_torch_gives_or_what_eager_gives(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        twin, (x, _) = copy.deepcopy(layer), pair.batch(options)
        x = x if "dtype" in options else x.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        expected = twin(x)
        assert y.dtype == expected.dtype
        assert_same([y, *layer.buffers()], [expected, *twin.buffers()])


def test_autocast_gives_a_model_the_losses_that_torch_gives():
    losses = []
    for layer in IMAGES.both():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3), layer, nn.ReLU(), nn.Conv2d(3, 2, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(torch.randn(4, 3, 6, 6)) ** 2).mean()
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert_same(*losses, ulps=2 * in_float32(torch.bfloat16))


# derivatives


# renormalization holds two functions of the batch constant: a numerical derivative sees them move
SMOOTH = {name: options for name, options in OPTIONS.items() if "renorm" not in options}


def in_float64(pair, options, training, shape=None):
    """Return a pure function of input and parameters, and arguments for it."""
    layer = pair.layer({**options, "dtype": torch.float64}).train(training).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(shape or (5, 3, *[2] * (len(pair.shape) - 2)), dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        # each call starts from the same statistics
        return functional_call(copy.deepcopy(layer), dict(zip(names, parameters, strict=True)), (x,))

    return run, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))


@cases(SMOOTH, ROWS_AND_IMAGES)
def test_first_derivatives_are_the_numerical_ones(pair, options):
    for training in (True, False):
        run, arguments = in_float64(pair, options, training)
        assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


@cases(SMOOTH, ROWS_AND_IMAGES)
def test_second_derivatives_are_the_numerical_ones(pair, options):
    for training in (True, False):
        run, arguments = in_float64(pair, options, training)
        assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


@every_pair
def test_gradients_of_a_batch_of_upstream_gradients_are_those_of_each(pair):
    for training in (True, False):
        run, arguments = in_float64(pair, {}, training)
        assert torch.autograd.gradcheck(run, arguments, check_batched_grad=True)


@every_pair
def test_derivatives_are_right_in_a_second_sweep_through_the_same_graph(pair):
    run, arguments = in_float64(pair, {}, True)
    y, dy = run(*arguments), torch.randn(arguments[0].shape, dtype=torch.float64)
    first = torch.autograd.grad(y, arguments, dy, create_graph=True)
    again = torch.autograd.grad(y, arguments, dy, create_graph=True)
    plain = torch.autograd.grad(y, arguments, dy)
    assert_same(first, plain, ulps=64)
    assert_same(again, plain, ulps=64)


def third(run, arguments, directions):
    """Return all third derivatives along random directions, each of all arguments."""
    value = (run(*arguments) * directions[0][0]).sum()
    for along in directions[1:]:
        gradients = torch.autograd.grad(value, arguments, create_graph=True, allow_unused=True)
        value = sum((g * v).sum() for g, v in zip(gradients, along, strict=True) if g is not None)
    gradients = torch.autograd.grad(value, arguments, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for g, a in zip(gradients, arguments, strict=True)]


THIRD = {
    "few rows": ("BatchNorm1d", (6, 3), torch.contiguous_format),
    "many rows": ("BatchNorm1d", (301, 3), torch.contiguous_format),
    "sequences": ("BatchNorm1d of sequences", (4, 3, 5), torch.contiguous_format),
    "contiguous": ("BatchNorm2d", (4, 3, 5, 2), torch.contiguous_format),
    "channels last": ("BatchNorm2d", (4, 3, 5, 2), torch.channels_last),
    "many rows, channels last": ("BatchNorm2d", (4, 3, 8, 10), torch.channels_last),
    "channels last 3d": ("BatchNorm3d", (2, 3, 3, 2, 4), torch.channels_last_3d),
    "many rows, channels last 3d": ("BatchNorm3d", (5, 3, 4, 4, 4), torch.channels_last_3d),
}


@pytest.mark.parametrize(("kind", "shape", "memory_format"), THIRD.values(), ids=THIRD)
@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "far from zero"])
def test_third_derivatives_are_those_of_primitive_operations(kind, shape, memory_format, mean):
    run, (x, *parameters) = in_float64(PAIRS[kind], {}, True, shape)
    x = (x.detach() + mean).contiguous(memory_format=memory_format).requires_grad_()
    arguments = (x, *parameters)
    directions = [[torch.randn_like(a) for a in arguments] for _ in range(3)]
    expected = third(primitive, arguments, directions)
    for got, right in zip(third(run, arguments, directions), expected, strict=True):
        # a batch far from zero loses as many digits as its mean has, in any formulation
        assert_near(got, right, ulps=1e4 * max(1.0, mean))


def test_third_derivatives_of_torch_are_wrong_so_the_test_above_can_fail():
    _, (x, *parameters) = in_float64(IMAGES, {}, True, (4, 3, 5, 2))
    arguments = (x, *parameters)
    directions = [[torch.randn_like(a) for a in arguments] for _ in range(3)]
    torchs = partial(nn.functional.batch_norm, running_mean=None, running_var=None, training=True)
    got = third(lambda x, w, b: torchs(x, weight=w, bias=b), arguments, directions)
    with pytest.raises(AssertionError):
        assert_near(got[0], third(primitive, arguments, directions)[0], ulps=1e4)


def test_the_derivatives_of_renormalization_hold_its_corrections_constant():
    layer = IMAGES.layer(OURS["renorm"], dtype=torch.float64)
    x, dy = IMAGES.batch({"dtype": torch.float64})
    statistics = [v.clone()[:, None, None] for v in (layer.running_mean, layer.running_var)]
    x = x.requires_grad_()
    axes = (0, 2, 3)
    sigma = (statistics[1] + layer.eps).sqrt()
    r = ((x.var(axes, correction=0, keepdim=True) + layer.eps).sqrt() / sigma).clamp(1 / 3, 3).detach()
    d = ((x.mean(axes, keepdim=True) - statistics[0]) / sigma).clamp(-5, 5).detach()
    expected = (primitive(x) * r + d) * layer.weight[:, None, None] + layer.bias[:, None, None]
    first = torch.autograd.grad(expected, x, dy, create_graph=True)[0]
    second = torch.autograd.grad(first, x, dy)[0]
    y = layer(x)
    got = torch.autograd.grad(y, x, dy, create_graph=True)[0]
    assert_same([y, got, torch.autograd.grad(got, x, dy)[0]], [expected, first, second], ulps=64)


@cases(SMOOTH, ROWS_AND_IMAGES)
def test_forward_mode_derivatives_are_those_of_reverse_mode(pair, options):
    for training in (True, False):
        run, (x, *parameters) = in_float64(pair, options, training)
        tangent, dy = torch.randn_like(x), torch.randn_like(x)
        with forward_ad.dual_level():
            y = run(forward_ad.make_dual(x.detach(), tangent), *parameters)
            forward = forward_ad.unpack_dual(y).tangent
        reverse = torch.autograd.grad(run(x, *parameters), x, dy)[0]
        assert_near((forward * dy).sum().item(), (reverse * tangent).sum().item(), ulps=1e4)


@pytest.mark.parametrize(("kind", "shape", "memory_format"), THIRD.values(), ids=THIRD)
def test_nested_forward_mode_derivatives_are_those_of_primitive_operations(kind, shape, memory_format):
    layer = PAIRS[kind].layer(track_running_stats=False, dtype=torch.float64)
    x, once, twice = (torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format) for _ in range(3))
    expected = partial(primitive, weight=layer.weight, bias=layer.bias)

    def second(f):
        return jvp(lambda x: jvp(f, (x,), (once,))[1], (x,), (twice,))[1]

    assert_near(second(layer).detach(), second(expected).detach(), ulps=1e4)
    cubes = [jacrev(lambda x, f=f: (f(x) ** 3).sum())(x) for f in (layer, expected)]
    assert_same(*([v] for v in cubes), ulps=1e4)


# torch.func


def pure(layer):
    """Return a function of parameters, buffers and input that gives output and new buffers, and its arguments."""
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    buffers = {name: v.clone() for name, v in layer.named_buffers()}

    def run(parameters, buffers, x):
        buffers = {name: v.clone() for name, v in buffers.items()}
        return functional_call(layer, (parameters, buffers), (x,)), buffers

    return run, parameters, buffers


@every_case
def test_called_as_a_function_a_layer_keeps_its_own_state(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        expected, (x, _) = copy.deepcopy(layer), pair.batch(options)
        before = copy.deepcopy(layer)
        run, parameters, buffers = pure(layer)
        y, new = run(parameters, buffers, x)
        assert_same([y], [expected(x)], ulps=4)
        assert_same(new.values(), expected.buffers(), ulps=4)
        assert same_statistics(layer, before)


@every_case
@every_mode
def test_the_gradient_of_torch_func_is_that_of_backward(pair, options, training):
    layer = pair.layer(options).train(training)
    x, dy = pair.batch(options)
    run, parameters, buffers = pure(layer)

    def value(parameters, x):
        y, new = run(parameters, buffers, x)
        return (y * dy).sum(), new

    (gradients, dx), new = grad(value, argnums=(0, 1), has_aux=True)(parameters, x)
    needed = [gradients[name] for name, p in layer.named_parameters() if p.requires_grad]
    expected = step(layer, x, dy)[1:]
    assert_same([dx, *needed], expected[: 1 + len(needed)], ulps=64)
    assert_same(new.values(), layer.buffers(), ulps=8)


@cases(STATIC)
def test_vmap_gives_each_slice_what_it_gets_alone(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        run, parameters, buffers = pure(layer)
        x = torch.stack([pair.batch(options)[0] for _ in range(2)])
        stacked = {name: torch.stack([v, v]) for name, v in buffers.items()}
        y, new = vmap(run, in_dims=(None, 0 if stacked else None, 0))(parameters, stacked, x)
        for i in range(2):
            expected, statistics = run(parameters, buffers, x[i])
            assert_same([y[i]], [expected])
            assert_same([v[i] for v in new.values()], statistics.values(), ulps=8)


@cases({name: options for name, options in STATIC.items() if name != "neither"}, {"BatchNorm2d": IMAGES})
@every_mode
def test_an_ensemble_of_stacked_layers_gives_what_each_gives_alone(pair, options, training):
    models = [pair.layer(options).train(training) for _ in range(2)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x, _ = pair.batch(options)
    in_dims = tuple(0 if v else None for v in (parameters, buffers))
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)), in_dims=in_dims)(parameters, buffers)
    for i, model in enumerate(models):
        assert_same([y[i]], [model(x)])
        assert_same([v[i] for v in buffers.values()], list(model.buffers()), ulps=8)


@cases({name: options for name, options in OPTIONS.items() if not options.get("track_running_stats", True)})
def test_jacobians_are_those_of_autograd(pair, options):
    layer, (x, _) = pair.layer(options), pair.batch(options)
    expected = torch.autograd.functional.jacobian(layer, x)
    assert_same([jacrev(layer)(x)], [expected], ulps=64)
    tangent = torch.randn_like(x)
    _, forward = jvp(layer, (x,), (tangent,))
    assert_same([forward], [torch.tensordot(expected, tangent, x.ndim)], ulps=64)


@every_pair
def test_statistics_that_a_transform_was_not_given_are_asked_for(pair):
    ours, torchs = pair.both()
    x, _ = pair.batch()
    with pytest.raises(RuntimeError):
        grad(lambda x: (torchs(x) ** 3).sum())(x)
    with pytest.raises(TransformError, match="pass the buffers to functional_call"):
        grad(lambda x: (ours(x) ** 3).sum())(x)
    frozen = bn.freeze(ours)
    grad(lambda x: (frozen(x) ** 3).sum())(x)


# graphs


class Every(nn.Module):
    """One layer for each entry of options, side by side: compiling them together is quicker."""

    def __init__(self, pair, options):
        super().__init__()
        self.names = [name for name, given in options.items() if asked(pair, given) and "dtype" not in given]
        self.layers = nn.ModuleList(pair.layer(options[name]) for name in self.names)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


# A compiler sees images with every option, and rows, which have no places. Sequences and volumes differ from images by the
# number of axes alone: they come with what cuts, weighs or sums over those. In eager mode each pair has each option, above.
OVER_PLACES = ("default", "ghost batches", "renorm", "total variance", "example weight", "several")
COMPILED = {
    name: STATIC if name in ROWS_AND_IMAGES else {option: STATIC[option] for option in OVER_PLACES} for name in PAIRS
}


@pytest.mark.parametrize("kind", PAIRS)
@every_mode
def test_compiled_without_a_break_every_option_gives_what_eager_gives(kind, training):
    pair = PAIRS[kind]
    eager = Every(pair, COMPILED[kind]).train(training)
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=False)
    for _ in range(2):
        x, dy = pair.batch()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for f, v in zip((run, eager), inputs, strict=True):
            for y in f(v):
                y.backward(dy, retain_graph=True)
        assert_same([inputs[0].grad], [inputs[1].grad], ulps=64)
        for name, got, expected in zip(eager.names, compiled.layers, eager.layers, strict=True):
            print(name)  # noqa: T201 - shown where the next lines fail
            assert_same(got.buffers(), expected.buffers(), ulps=8)
            gradients = [[p.grad for p in layer.parameters() if p.requires_grad] for layer in (got, expected)]
            assert_same(*gradients, ulps=64)
            with torch.no_grad():
                assert_same(*([copy.deepcopy(layer)(x)] for layer in (got, expected)))


@every_pair
@every_mode
def test_a_compiled_graph_normalizes_by_one_operator_and_holds_no_batch_in_float64(pair, training):
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(pair.layer().train(training), fullgraph=True, backend=look)(pair.batch()[0])
    (graph,) = graphs
    values = [(node, node.meta.get("example_value")) for node in graph.graph.nodes if node.op.startswith("call")]
    assert sum(getattr(node.target, "__name__", "") == "batch_norm" for node, _ in values) == 1
    tensors = [v for _, v in values if isinstance(v, torch.Tensor)]
    assert not any(v.shape == pair.shape and v.dtype == torch.float64 for v in tensors)


# dynamo looks at .grad of a tensor inside the graph when it goes on behind a break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["schedule"])
def test_compiled_with_breaks_an_option_gives_what_eager_gives(name):
    eager = IMAGES.layer(OPTIONS[name])
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    run = torch.compile(compiled, backend="aot_eager", dynamic=False)
    for _ in range(3):
        x, dy = IMAGES.batch()
        got = step(run, x, dy)
        assert_same(got[:4], step(eager, x, dy)[:4], ulps=64)
        assert_same(compiled.buffers(), eager.buffers(), ulps=8)


@cases(OPTIONS, ROWS_AND_IMAGES)
def test_exported_in_evaluation_a_layer_is_one_operator(pair, options):
    layer, (x, _) = pair.layer(options).eval(), pair.batch(options)
    program = torch.export.export(layer, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    if "example_weight" not in options and options.get("track_running_stats", True):
        assert targets.count("aten.batch_norm.default") == 1
        assert len(targets) == (2 if "activation" in options else 1)
    assert_same([program.module()(x)], [layer(x)], ulps=4)


@cases(STATIC, ROWS_AND_IMAGES)
def test_exported_in_training_a_layer_moves_its_statistics(pair, options):
    layer, (x, _) = pair.layer(options), pair.batch(options)
    program = torch.export.export(copy.deepcopy(layer), (x,)).module()
    for _ in range(2):
        assert_same([program(x)], [layer(x)])
    moved = dict(program.named_buffers())
    for name, v in layer.named_buffers():
        assert_same([moved[name]], [v], ulps=8)


@every_option_of_torch
def test_torchscript_gets_torchs_layer(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        model, (x, _) = nn.Sequential(layer), pair.batch(options)
        scripted = torch.jit.script(copy.deepcopy(model))
        assert_same([scripted(x)], [model(x)])
        assert_same(scripted.buffers(), model.buffers(), ulps=8)
        assert type(layer) is pair.ours


# an example's own statistics are computed by the definition, whose checks of shapes a trace warns of
@cases({name: options for name, options in OPTIONS.items() if "example_weight" not in options}, ROWS_AND_IMAGES)
def test_traced_in_evaluation_a_layer_gives_the_same(pair, options):
    layer, (x, _) = pair.layer(options).eval(), pair.batch(options)
    other = pair.batch(options, shape=(7, *pair.shape[1:]))[0]
    assert_same([torch.jit.trace(layer, (x,))(other)], [layer(other)], ulps=4)


@every_case
def test_symbolic_tracing_sees_one_leaf(pair, options):
    for training in (True, False):
        model = nn.Sequential(OrderedDict(norm=pair.layer(options))).train(training)
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
        assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["norm"]
        x, _ = pair.batch(options)
        expected = copy.deepcopy(model)(x)
        assert_same([traced(x)], [expected])


def test_a_gradient_penalty_under_checkpointing_is_the_one_without():
    checkpointed = torch.utils.checkpoint.checkpoint
    for pair in PAIRS.values():
        layer, x = pair.ours(3, dtype=torch.float64), torch.randn(pair.shape, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(pair.shape, dtype=torch.float64)
        penalties = []
        for run in (layer, lambda t, layer=layer: checkpointed(layer, t, use_reentrant=False)):
            (slope,) = torch.autograd.grad((run(x).sin() * weights).sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad(slope.pow(2).sum(), [x, layer.weight]))
        assert_same(penalties[1], penalties[0], ulps=64)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wide_statistics_stay_in_single_precision(pair, dtype):
    wide, x = pair.ours(3, wide_statistics=True), torch.randn(pair.shape) * 300
    exact = copy.deepcopy(wide)
    wide.to(dtype)
    for training in (True, False):
        y = wide.train(training)(x.to(dtype))
        assert (y.dtype, wide.weight.dtype, wide.running_mean.dtype) == (dtype, dtype, torch.float32)
        expected = exact.train(training)(x.to(dtype).float())
        assert_near(
            y.detach().float(), expected.detach(), ulps=4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        )
    assert_same([wide.running_mean, wide.running_var], [exact.running_mean, exact.running_var])


def test_a_schedule_may_be_set_later():
    layer = bn.BatchNorm1d(1)
    layer.momentum = lambda batches: 1 / (batches + 1)
    for value in (1.0, 3.0):
        layer(torch.tensor([[value], [value + 2]]))
    assert layer.running_mean.item() == 3.0


# errors


def raised(layer, x):
    """Return what a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the tests compare it with torch's
        layer(x)
    return caught.value


def assert_raises_as_torch(ours, torchs, x):
    """Hold an error to torch's: its type, its words, and the layer's name besides."""
    got, expected = raised(ours, x), raised(torchs, x)
    assert isinstance(got, type(expected))
    assert str(expected) in str(got)
    assert f"{type(ours).__name__}(3)" in str(got)
    return got


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *(("BatchNorm1d", rank) for rank in (1, 4, 5)),
        *(("BatchNorm2d", rank) for rank in (1, 2, 3, 5)),
        *(("BatchNorm3d", rank) for rank in (1, 3, 4, 6)),
    ],
)
@every_mode
def test_an_input_of_another_rank_raises_as_in_torch(name, rank, training):
    ours, torchs = (layer.train(training) for layer in PAIRS[name].both())
    x = torch.zeros((4, 3, 2, 2, 2, 2)[:rank])
    assert type(assert_raises_as_torch(ours, torchs, x)) is ShapeError


@every_case
def test_another_number_of_channels_raises_as_in_torch(pair, options):
    for training in (True, False):
        layer = pair.layer(options).train(training)
        before = copy.deepcopy(layer)
        error = raised(layer, torch.zeros((4, 7, *pair.shape[2:]), dtype=options.get("dtype")))
        assert type(error) is ChannelError
        assert isinstance(error, RuntimeError)
        assert "7" in str(error)
        assert "3 channels" in str(error)
        assert same_statistics(layer, before)


@every_option_of_torch
def test_a_single_value_a_channel_raises_as_in_torch_and_changes_no_statistic(pair, options):
    ours, torchs = pair.both(**options)
    x = torch.zeros((1, 3, *[1] * (len(pair.shape) - 2)), dtype=options.get("dtype"))
    before = copy.deepcopy(ours)
    assert type(assert_raises_as_torch(ours, torchs, x)) is ShapeError
    assert same_statistics(ours, before)


@every_case
def test_a_single_value_a_channel_raises_in_training_unless_an_option_allows_it(pair, options):
    layer = pair.layer(options)
    x = torch.randn((1, 3, *[1] * (len(pair.shape) - 2)), dtype=options.get("dtype"))
    before = copy.deepcopy(layer)
    if "on_single" in options or options.get("frozen"):
        expected = torch.zeros_like(x) + layer.bias.view(1, 3, *[1] * (len(pair.shape) - 2))
        expected = expected if options.get("on_single") == "skip" else copy.deepcopy(layer).eval()(x)
        assert_same([layer(x)], [expected])
    else:
        assert type(raised(layer, x)) is ShapeError
    assert same_statistics(layer, before)


@every_pair
def test_a_single_value_a_channel_is_fine_in_evaluation(pair):
    ours, torchs = (layer.eval() for layer in pair.both())
    x = torch.randn((1, 3, *[1] * (len(pair.shape) - 2)))
    assert_same([ours(x)], [torchs(x)])


@every_pair
@pytest.mark.parametrize("wrong", [(2,), (4, 7, 2, 2, 2), (1, 3, 1, 1, 1)], ids=["rank", "channels", "a single value"])
def test_inside_a_model_an_error_names_the_layer(pair, wrong):
    inner = nn.Sequential(nn.Identity(), pair.layer())
    model = nn.Sequential(OrderedDict(features=inner))
    x = torch.zeros(wrong if len(wrong) == 1 else wrong[: len(pair.shape)])
    assert "'features.1'" in str(raised(model, x))
    # the name is that within what was called
    assert "'1'" in str(raised(inner, x))


@every_pair
@pytest.mark.parametrize("eps", [0.0, -1.0])
@every_mode
def test_an_eps_that_torch_refuses_is_refused(pair, eps, training):
    ours, torchs = (layer.train(training) for layer in (pair.ours(3, eps=eps), pair.torchs(3, eps=eps)))
    x, _ = pair.batch()
    if eps == 0 and not training:
        assert_same([ours(x)], [torchs(x)])
    else:
        expected = raised(torchs, x)
        assert isinstance(raised(ours, x), type(expected))


MIXED = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float64, torch.float16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.int32),
]


@every_pair
@pytest.mark.parametrize(("parameters", "values"), MIXED, ids=[f"{p} {v}" for p, v in MIXED])
def test_dtypes_that_torch_refuses_raise_as_in_torch_and_change_no_statistic(pair, parameters, values):
    for training in (True, False):
        ours, torchs = (layer.to(parameters).train(training) for layer in pair.both())
        before = copy.deepcopy(ours)
        x = pair.batch()[0].to(values)
        expected = raised(torchs, x)
        assert isinstance(raised(ours, x), type(expected))
        assert same_statistics(ours, before)


# hooks and what else rests on modules


@every_case
@every_mode
def test_hooks_are_called_in_order_and_may_replace_values(pair, options, training):
    layer = pair.layer(options).train(training)
    twin, (x, dy) = copy.deepcopy(layer), pair.batch(options)
    calls = []
    layer.register_forward_pre_hook(lambda _, given: calls.append("before") or (given[0] * 2,))
    layer.register_forward_hook(lambda _, given, y: calls.append("after") or y * 3)
    layer.register_full_backward_hook(lambda _, dx, dy: calls.append("backward") or (dx[0] * 5,))
    got, expected = step(layer, x, dy), step(twin, x * 2, dy * 3)
    assert calls == ["before", "after", "backward"]
    # the pre-hook's factor is differentiated outside of the layer, as the backward hook's is not
    assert_same(got[:2], [expected[0] * 3, expected[1] * 5 * 2], ulps=32)
    assert_same(got[2:], expected[2:], ulps=32)


@every_pair
def test_a_hook_on_every_module_sees_the_layer(pair):
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, y: seen.append(type(module)))
    try:
        pair.layer()(pair.batch()[0])
    finally:
        hook.remove()
    assert seen == [pair.ours]


@every_pair
def test_a_pruned_layer_is_like_torchs(pair):
    for training in (True, False):
        layers = [layer.train(training) for layer in pair.both()]
        for layer in layers:
            prune.custom_from_mask(layer, "weight", torch.tensor([1.0, 0.0, 1.0]))
        batches = [pair.batch() for _ in range(2)]
        assert_same(*(steps(layer, batches) for layer in layers))
        assert "weight_orig" in layers[0].state_dict()
        for layer in layers:
            prune.remove(layer, "weight")
        assert_same(*(steps(layer, batches) for layer in layers))


class Positive(nn.Module):
    """A parametrization that keeps values above zero."""

    def forward(self, v):
        return v.exp()

    def right_inverse(self, v):
        return v.log()


@every_pair
def test_a_parametrized_layer_is_like_torchs(pair):
    for training in (True, False):
        layers = [layer.train(training) for layer in pair.both()]
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", Positive())
        batches = [pair.batch() for _ in range(2)]
        assert_same(*(steps(layer, batches) for layer in layers))
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight")
        assert_same(*(steps(layer, batches) for layer in layers))


@every_pair
@pytest.mark.parametrize("name", ["weight", "running_mean", "running_var", "num_batches_tracked"])
def test_a_parameter_or_buffer_that_is_replaced_is_used(pair, name):
    ours, torchs = pair.both()
    ours(pair.batch()[0])
    torchs.load_state_dict(ours.state_dict())
    for layer in (ours, torchs):
        old = getattr(layer, name)
        new = old.detach().clone() + 1
        setattr(layer, name, nn.Parameter(new) if name == "weight" else new)
    batches = [pair.batch() for _ in range(2)]
    assert_same(steps(ours, batches), steps(torchs, batches))


@every_pair
@pytest.mark.parametrize(
    "changed", [{"eps": 0.5}, {"momentum": 0.7}, {"momentum": None}, {"track_running_stats": False}]
)
def test_an_attribute_that_is_changed_later_counts_as_in_torch(pair, changed):
    for training in (True, False):
        layers = [layer.train(training) for layer in pair.both()]
        for layer in layers:
            for name, v in changed.items():
                setattr(layer, name, v)
        batches = [pair.batch() for _ in range(2)]
        assert_same(*(steps(layer, batches) for layer in layers))


@every_pair
def test_the_output_may_be_changed_in_place(pair):
    layers = pair.both()
    batches = [pair.batch()]
    assert_same(*(steps(nn.Sequential(layer, nn.ReLU(inplace=True)), batches) for layer in layers))


@every_pair
def test_an_input_that_is_changed_in_place_before_the_backward_is_noticed(pair):
    for layer in pair.both():
        x, dy = pair.batch()
        x = x.requires_grad_() * 1
        y = layer(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match=re.escape("modified by an inplace operation")):
            y.backward(dy)


@every_pair
def test_statistics_may_change_between_forward_and_backward(pair):
    layer, (x, dy) = pair.layer(), pair.batch()
    expected = step(copy.deepcopy(layer), x, dy)[1]
    x = x.requires_grad_()
    y = layer(x)
    # what DistributedDataParallel's broadcast does
    with torch.no_grad():
        for v in layer.buffers():
            v.copy_(torch.ones_like(v))
    y.backward(dy)
    assert torch.equal(x.grad, expected)


@every_pair
def test_a_numpy_number_is_a_momentum(pair):
    ours, torchs = pair.both(momentum=np.float64(0.3))
    batches = [pair.batch() for _ in range(2)]
    assert_same(steps(ours, batches), steps(torchs, batches))
