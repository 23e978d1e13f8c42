"""Statistics of whole data sets in torch models: exact, and nothing else changes."""

import copy
import dataclasses
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import batchnorm as bn
from batchnorm import torch as bnt
from batchnorm.errors import BatchNormError, DataError, OptionError
from batchnorm.moments import Moments
from batchnorm.torch.sums import moments_of

EXACT = 1e-6


class Twice(nn.Module):
    """A layer that is called twice, dropout before normalization, dense and convolutional layers."""

    def __init__(self, kind=nn):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.shared = kind.BatchNorm2d(6)
        self.drop = nn.Dropout(0.9)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.last = kind.BatchNorm1d(5)

    def forward(self, x):
        x = self.drop(F.relu(self.shared(self.conv(x))))
        x = F.relu(self.shared(self.again(x)))
        return self.last(self.head(x.mean((2, 3))))


def network(kind=nn, seed=0):
    torch.manual_seed(seed)
    model = Twice(kind)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def images(sizes=(7, 1, 32), mean=0.0, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(n, 3, 8, 8) + mean for n in sizes]


def inputs_of(model, data, *, by_batch):
    """Return the float64 inputs of each norm, ``(C, values)``: evaluation, the norms by batch if asked for."""
    model, seen, hooks = copy.deepcopy(model).eval(), {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # copied at once, by a hook that knows nothing of the library
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach().double().clone())
                )
            )
            module.train(by_batch)
            module.momentum = 0.0
    with torch.no_grad():
        for x in data:
            if by_batch and len(x) == 1:
                model.last.eval()
            model(x)
            if by_batch:
                model.last.train()
    return {name: torch.cat([x.movedim(1, 0).flatten(1) for x in parts], 1).numpy() for name, parts in seen.items()}


def assert_exact(model, inputs, bound=EXACT, ddof=1):
    for name, values in inputs.items():
        layer = model.get_submodule(name)
        spread = values.std(1)
        mean = np.abs(layer.running_mean.double().numpy() - values.mean(1)) / np.maximum(np.abs(values.mean(1)), spread)
        var = np.abs(layer.running_var.double().numpy() / values.var(1, ddof=ddof) - 1)
        assert mean.max() <= bound, (name, mean.max())
        assert var.max() <= bound, (name, var.max())


# -- exactness ---------------------------------------------------------------------------------------------------------


def seen_by(model):
    """Note what reaches each norm from now on, by hooks that know nothing of the library."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach().double().clone())
            )
    return seen


def joined(seen):
    return {name: torch.cat([x.movedim(1, 0).flatten(1) for x in parts], 1).numpy() for name, parts in seen.items()}


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(7, 1, 32), (40,), (2, 3, 4, 5, 6)])
def test_one_pass_is_the_population_of_what_the_layers_saw(kind, mean, sizes):
    model, data = network(kind), images(sizes, mean)
    seen = seen_by(model)
    found = bn.recalibrate(model, data, progress=False)
    assert_exact(model, joined(seen))
    assert {m.layer for m in found.moved} == {"shared", "last"}
    assert found.left == ()
    assert (found.batches, found.samples, found.passes) == (len(sizes), sum(sizes), 1)


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
def test_in_one_pass_layers_normalize_as_in_training_and_everything_else_as_in_evaluation(kind):
    model, data = network(kind), images()
    expected = inputs_of(model, data, by_batch=True)
    bn.recalibrate(model, data, progress=False)
    assert_exact(model, expected)


@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_sequential_holds_what_evaluation_sees(kind, mean):
    model, data = network(kind), images(mean=mean)
    found = bn.recalibrate(model, data, method="sequential", progress=False)
    assert found.settled
    assert_exact(model, inputs_of(model, data, by_batch=False), bound=1e-5)


def test_a_single_value_is_normalized_by_what_is_stored():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    model[0].running_mean.copy_(torch.tensor([5.0, -5.0]))
    seen = seen_by(model)
    x = torch.randn(8, 2)
    bn.recalibrate(model, [x[:1], x[1:]], progress=False)
    torch.testing.assert_close(seen["1"][0].float(), (x[:1] - torch.tensor([5.0, -5.0])) / (1 + 1e-5) ** 0.5)


class Batchwise(nn.Module):
    """It uses the batch in evaluation too, as its author wants it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, None, None, True)


@pytest.mark.parametrize("method", ["one-pass", "sequential"])
def test_a_function_that_always_takes_the_batch_goes_on_doing_so(method):
    model, outputs = Batchwise().eval(), []
    model.register_forward_hook(lambda module, args, y: outputs.append(y))
    data = [torch.randn(8, 2) + 3, torch.randn(8, 2) - 3]
    bn.recalibrate(model, data, method=method, progress=False)
    assert all(y.mean(0).abs().max() < 1e-5 for y in outputs)
    np.testing.assert_allclose(model.norm.running_mean, torch.cat(data).mean(0), atol=1e-6)


def deep(layers):
    torch.manual_seed(0)
    parts = [(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for i in range(layers)]
    return nn.Sequential(*(module for part in parts for module in part))


def test_k_passes_make_k_layers_exact():
    model, data = deep(6), images()
    found = bn.recalibrate(model, data, method="sequential", progress=False)
    assert found.settled
    assert found.passes <= 8
    assert_exact(model, inputs_of(model, data, by_batch=False), bound=1e-5)


def test_data_that_differs_from_pass_to_pass_does_not_settle():
    class Noise:
        def __iter__(self):
            return iter([torch.randn(8, 3, 8, 8)])

    torch.manual_seed(0)
    found = bn.recalibrate(deep(3), Noise(), method="sequential", progress=False)
    assert not found.settled
    assert 4 <= found.passes <= 12


def test_sequential_does_not_depend_on_how_the_data_is_cut():
    whole, cut = network(), network()
    data = torch.cat(images())
    bn.recalibrate(whole, [data], method="sequential", progress=False)
    bn.recalibrate(cut, list(data.split([7, 1, 32])), method="sequential", progress=False)
    for name, buffer in whole.named_buffers():
        if "running" in name:
            torch.testing.assert_close(cut.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)


def test_class_sorted_data_far_from_zero_is_exact():
    torch.manual_seed(0)
    data = [1e4 + shift + torch.randn(33, 4) for shift in (-3.0, 0.0, 5.0, 100.0)]
    model = nn.Sequential(nn.BatchNorm1d(4))
    bn.recalibrate(model, data, progress=False)
    values = torch.cat(data).double().numpy()
    np.testing.assert_allclose(model[0].running_mean, values.mean(0), rtol=1e-7)
    np.testing.assert_allclose(model[0].running_var, values.var(0, ddof=1), rtol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(64, 5), (1, 3), (9, 5, 11), (6, 4, 7, 9), (2, 3, 120, 110), (5000, 3), (3, 4, 5, 6, 7), (2, 600, 1, 1)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_sums_are_exact_in_every_layout(dtype, shape, layout):
    torch.manual_seed(0)
    for mean in (0.0, 3.0, 1e3 if dtype.itemsize == 2 else 1e5):
        x = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "strided":
            x = torch.cat([x, x], -1)[..., : shape[-1]]
        exact = Moments.of(x.double().numpy())
        for centre in (None, np.full(shape[1], mean + 2.5)):
            got = moments_of(x, centre)
            assert got.count == exact.count
            np.testing.assert_allclose(
                got.mean, exact.mean, rtol=1e-9, atol=1e-7 * (exact.variance.max() ** 0.5 + 1e-30)
            )
            np.testing.assert_allclose(got.m2, exact.m2, rtol=4e-7, atol=1e-12)


def test_an_outlier_in_the_first_batch_costs_nothing():
    torch.manual_seed(0)
    x = torch.randn(4096, 2)
    x[0] = 1e6
    exact = Moments.of(x.double().numpy())
    np.testing.assert_allclose(moments_of(x).m2, exact.m2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mask", "lengths", "sample_weight"])
def test_masks_and_weights_count(kind):
    torch.manual_seed(0)
    layer, x = bnt.BatchNorm1d(3).eval(), torch.randn(4, 3, 6)
    lengths = torch.tensor([6, 1, 0, 4])
    valid = torch.arange(6) < lengths[:, None]
    weight = torch.tensor([1.0, 2.0, 0.0, 3.0])
    given = {"mask": valid, "lengths": lengths, "sample_weight": weight}[kind]
    packed = (
        x.movedim(1, -1)[valid]
        if kind != "sample_weight"
        else torch.repeat_interleave(x, weight.long(), 0).movedim(1, -1)
    )
    values = packed.reshape(-1, 3).double().numpy()
    found = bn.recalibrate(layer, [{"x": x, kind: given}], progress=False)
    np.testing.assert_allclose(layer.running_mean, values.mean(0), rtol=EXACT, atol=1e-7)
    np.testing.assert_allclose(layer.running_var, values.var(0, ddof=1), rtol=EXACT)
    assert found.moved[0].values == len(values)


def test_the_biased_variance_is_kept_where_the_layer_keeps_it():
    torch.manual_seed(0)
    layer, x = bnt.BatchNorm1d(3, unbiased=False).eval(), torch.randn(5, 3)
    bn.recalibrate(layer, [x], progress=False)
    np.testing.assert_allclose(layer.running_var, x.double().numpy().var(0), rtol=EXACT)


def test_a_domain_gets_its_own_statistics():
    layer = bnt.BatchNorm1d(1, domains=["target"]).eval()
    with bnt.domain(layer, "target"):
        bn.recalibrate(layer, [torch.tensor([[1.0], [3.0]])], progress=False)
    assert (layer.running_mean.item(), layer.running_mean_target.item()) == (0.0, 2.0)


# -- side effects ------------------------------------------------------------------------------------------------------


def state(model):
    """Return everything that must be as before: tensors, modes, hooks, attributes of layers, random generators."""
    return (
        {name: v.clone() for name, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "momentum", None)) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [id(buffer) for buffer in model.buffers()],
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
    )


def assert_same(before, after, *, but=()):
    for name, v in before[0].items():
        assert torch.equal(v, after[0][name]) or name in but, name
    assert before[1:5] == after[1:5]
    assert torch.equal(before[5], after[5])
    assert before[6:] == after[6:]


@pytest.mark.parametrize("method", ["one-pass", "sequential"])
@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
def test_nothing_but_statistics_changes(kind, method):
    model = network(kind)
    model.again.eval()
    model.train()
    model.drop.eval()
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(torch.cat(images())), batch_size=8, shuffle=True)
    before = state(model)
    bn.recalibrate(model, loader, method=method, progress=False)
    statistics = {name for name in before[0] if "running" in name or "tracked" in name}
    assert_same(before, state(model), but=statistics)
    assert all(not torch.equal(before[0][name], model.state_dict()[name]) for name in statistics)


def _raising(after):
    yield from images()[:after]
    raise RuntimeError("the disk is gone")


def _nan():
    x = images()[0]
    x[3, 1, 2, 2] = float("nan")
    return [images()[0], x]


BAD_DATA = {
    "empty list": (list, "empty"),
    "used up": (lambda: iter([]), "at least one batch"),
    "raises at once": (lambda: _raising(0), "the disk is gone"),
    "raises later": (lambda: _raising(2), "failed after 2 of them: RuntimeError: the disk is gone"),
    "another size": (lambda: [images()[0], torch.randn(4, 5, 8, 8)], "must take the batches"),
    "words": (lambda: ["one", "two"], "must take the batches"),
    "nan": (_nan, "layer 'shared' must be finite"),
    "inf": (lambda: [images()[0] / 0], "must be finite"),
}


@pytest.mark.parametrize("method", ["one-pass", "sequential"])
@pytest.mark.parametrize("kind", [nn, bnt], ids=["torch", "ours"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_leaves_everything_as_it_was(kind, name, method):
    make, words = BAD_DATA[name]
    model = network(kind).train()
    model.drop.eval()
    data, before = make(), state(model)
    if method == "sequential" and iter(data) is data:
        words = "can be read only once"
    with pytest.raises(BatchNormError, match=words):
        bn.recalibrate(model, data, method=method, progress=False)
    assert_same(before, state(model))


def test_ctrl_c_leaves_everything_as_it_was():
    def data():
        yield images()[0]
        raise KeyboardInterrupt

    model = network(bnt).train()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        bn.recalibrate(model, data(), progress=False)
    assert_same(before, state(model))


BAD_OPTIONS = {
    "method": ({"method": "twice"}, "'one-pass' or 'sequential', got 'twice'"),
    "batches": ({"batches": 0}, "batches must be None or a whole number"),
    "a fraction": ({"samples": 2.5}, "samples must be None or a whole number"),
    "a bool": ({"batches": True}, "batches must be None"),
    "prior": ({"prior": -1}, "from 0 to infinity, got -1"),
    "prior nan": ({"prior": float("nan")}, "from 0 to infinity"),
    "forward": ({"forward": 3}, "must be a function"),
    "tolerance": ({"tolerance": 0}, "tolerance must be None or between"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_can_not_be_are_refused(name):
    options, words = BAD_OPTIONS[name]
    with pytest.raises(OptionError, match=words):
        bn.recalibrate(network(), images(), progress=False, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "none was found"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "keeps no running statistics"),
        (lambda: bnt.freeze(nn.Sequential(nn.BatchNorm1d(3))), "it is frozen"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), "must know its size"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, device="meta")), "meta device"),
        (lambda: 3, "must be a torch.nn.Module"),
    ],
)
def test_a_model_without_statistics_to_move_is_refused(make, words):
    with pytest.raises(OptionError, match=words):
        bn.recalibrate(make(), [torch.randn(4, 3)], progress=False)


@pytest.mark.parametrize("data", [3, "digits", {"x": torch.randn(4, 3)}, torch.randn(4)])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(OptionError, match="data must be"):
        bn.recalibrate(nn.BatchNorm1d(3), data, progress=False)


def test_half_precision_that_can_not_hold_the_variance_is_refused_before_anything_is_written():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).half().eval()
    before = state(model)
    data = torch.tensor([[-1000.0, 1.0], [1000.0, 2.0]]).half()
    with pytest.raises(OptionError, match=r"torch.float16, which can't hold"):
        bn.recalibrate(model, [data], progress=False)
    assert_same(before, state(model))


# -- which layers move -------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Frozen as torchvision does it: all numbers are buffers."""

    def __init__(self, n):
        super().__init__()
        for name, v in (("weight", torch.ones(n)), ("bias", torch.zeros(n)), ("running_mean", torch.zeros(n))):
            self.register_buffer(name, v)
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


def test_frozen_and_unreached_layers_stay_and_are_named():
    model = nn.ModuleDict(
        {
            "moving": nn.BatchNorm1d(2),
            "frozen": bnt.freeze(bnt.BatchNorm1d(2)),
            "evaluating": nn.BatchNorm1d(2),
            "constant": Constant(2),
            "batch": nn.BatchNorm1d(2, track_running_stats=False),
            "unused": nn.BatchNorm1d(2),
            "instance": nn.InstanceNorm1d(2, track_running_stats=True),
        }
    )
    model.train()
    model["evaluating"].eval()
    torch.manual_seed(0)
    data = [torch.randn(8, 2) + 3]
    before = state(model)
    used = ("moving", "frozen", "evaluating", "constant", "batch")

    def forward(model, x):
        for name in used:
            x = model[name](x)
        model["instance"](x[:, :, None].expand(-1, -1, 4))

    found = bn.recalibrate(model, data, forward=forward, progress=False)
    assert [m.layer for m in found.moved] == ["moving"]
    reasons = {left.layer: left.reason for left in found.left}
    assert reasons.keys() == {"frozen", "evaluating", "constant", "batch", "unused"}
    assert "unfreeze" in reasons["frozen"]
    assert "in evaluation while the model is in training" in reasons["evaluating"]
    assert "constant" in reasons["constant"]
    assert "no running statistics" in reasons["batch"]
    assert reasons["unused"] == "it was never reached"
    assert_same(
        before, state(model), but={f"moving.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    )
    assert "left: it was never reached" in str(found)
    assert "1 of 6 layers have new statistics, of 8 samples in 1 batches" in str(found)


def test_a_whole_model_in_evaluation_is_not_frozen():
    model = network().eval()
    assert len(bn.recalibrate(model, images(), progress=False).moved) == 2


def test_a_layer_that_a_single_value_reached_stays():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    found = bn.recalibrate(model, [torch.randn(1, 2)], progress=False)
    assert found.left[0].reason == "a single value reached it, which has no variance"
    assert model[0].running_var.tolist() == [1.0, 1.0]


def test_masks_that_are_false_everywhere_leave_a_layer_as_it_is():
    layer = bnt.BatchNorm1d(2).eval()
    found = bn.recalibrate(layer, [{"x": torch.randn(3, 2, 4), "mask": torch.zeros(3, 4, dtype=bool)}], progress=False)
    assert found.left[0].reason == "no value reached it"


class Act(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm has."""

    def forward(self, x):
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


class Functional(nn.Module):
    """Normalization by a function alone, on buffers of other names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("spread", torch.ones(3))

    def forward(self, x):
        return torch.batch_norm(x, None, None, self.average, self.spread, self.training, 0.1, 1e-5, False)


@pytest.mark.parametrize("make", [lambda: Act(3), Functional], ids=["subclass", "function"])
def test_layers_with_a_forward_of_their_own_are_measured(make):
    model = nn.Sequential(make()).eval()
    data = images()
    bn.recalibrate(model, data, progress=False)
    values = torch.cat(data).double().movedim(1, 0).flatten(1).numpy()
    mean, var = list(model.buffers())[:2]
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(var, values.var(1, ddof=1), rtol=EXACT)


def test_tied_statistics_are_pooled():
    first, second = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    second.running_mean, second.running_var = first.running_mean, first.running_var
    model = nn.Sequential(first, second).eval()
    with torch.no_grad():
        first.bias.fill_(7.0)
    found = bn.recalibrate(model, [torch.tensor([[1.0], [3.0]])], progress=False)
    assert len(found.moved) == 1
    assert first.running_mean.item() == pytest.approx((1 + 3 + 6 + 8) / 4, abs=1e-4)


def test_compiled_traced_and_exported_models_are_measured():
    data = images((6, 6))
    plain = network().eval()
    example = data[0]
    wrapped = {
        "compiled": torch.compile(copy.deepcopy(plain), backend="eager"),
        "parallel": nn.DataParallel(copy.deepcopy(plain)),
        "graph": torch.fx.symbolic_trace(copy.deepcopy(plain)),
    }
    program = torch.export.export(copy.deepcopy(plain), (example,))
    wrapped["compiled"](example)
    bn.recalibrate(plain, data, progress=False)
    for name, model in [*wrapped.items(), ("program", program)]:
        bn.recalibrate(model, data, progress=False)
        tensors = model.state_dict if name == "program" else model.state_dict()
        for key, v in tensors.items():
            if "running" in key:
                expected = plain.state_dict()[key.removeprefix("_orig_mod.").removeprefix("module.")]
                torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-6, msg=name)


def test_a_script_module_is_refused_or_measured():
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)).eval())
    with pytest.raises(OptionError, match="ScriptModule"):
        bn.recalibrate(model, [torch.randn(4, 2)], progress=False)


def test_convert_sync_batchnorm_layers_are_measured():
    model = nn.Sequential(nn.SyncBatchNorm(3)).eval()
    data = images()
    bn.recalibrate(model, data, progress=False)
    np.testing.assert_allclose(model[0].running_mean, torch.cat(data).mean((0, 2, 3)), atol=1e-6)


# -- forms of batches --------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    label: torch.Tensor


@dataclasses.dataclass
class Other:
    pixels: torch.Tensor


class Endless(IterableDataset):
    def __iter__(self):
        for x in images((4,) * 10):
            yield x, torch.zeros(4)


class Whole(nn.Module):
    """A model that takes the batch as it is."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, batch):
        return self.norm(batch["pixels"] if isinstance(batch, dict) else batch.pixels)


X = torch.cat(images())
FORMS = {
    "tensor": [X],
    "tuple": [(X, torch.zeros(40))],
    "list": [[X, torch.zeros(40)]],
    "namedtuple": [Pair(X, torch.zeros(40))],
    "dict": [{"x": X, "labels": torch.zeros(40)}],
    "dataclass": [Record(X, torch.zeros(40))],
    "array": [X.numpy().astype(np.float64)],
    "one tensor": X,
    "one array": X.numpy(),
    "dataset": TensorDataset(X, torch.zeros(40)),
    "loader": DataLoader(TensorDataset(X), batch_size=7),
    # other tests of this process may have loaded JAX, which no fork survives
    "workers": DataLoader(TensorDataset(X), batch_size=20, num_workers=1, multiprocessing_context="spawn"),
    "generator": (x for x in X.split(9)),
}


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, mask=None):
        assert mask is None
        return self.norm(x)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_is_understood(form):
    model = Named()
    found = bn.recalibrate(model, FORMS[form], progress=False)
    values = X.double().movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(model.norm.running_mean, values.mean(1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model.norm.running_var, values.var(1, ddof=1), rtol=EXACT)
    assert found.samples == 40


@pytest.mark.parametrize("batch", [{"pixels": X}, Other(X)], ids=["dict", "dataclass"])
def test_a_model_that_takes_the_whole_batch_gets_it(batch):
    model = Whole()
    bn.recalibrate(model, [batch], progress=False)
    np.testing.assert_allclose(model.norm.running_mean, X.mean((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    "forward",
    [lambda model, batch: model(batch["image"][0]), lambda batch: HELD(batch["image"][0])],
    ids=["two", "one"],
)
def test_forward_calls_the_model_in_its_own_way(forward):
    bn.recalibrate(HELD, [{"image": [X]}], forward=forward, progress=False)
    np.testing.assert_allclose(HELD.norm.running_mean, X.mean((0, 2, 3)), atol=1e-6)


HELD = Named()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, a, b):
        return self.norm(a + b)


def test_a_model_of_two_inputs_gets_two():
    model = Two()
    bn.recalibrate(model, [(X, X, torch.zeros(40))], progress=False)
    np.testing.assert_allclose(model.norm.running_mean, 2 * X.mean((0, 2, 3)), atol=1e-6)


def test_an_iterable_data_set_can_be_cut_off():
    model = Named()
    found = bn.recalibrate(model, Endless(), batches=3, progress=False)
    assert (found.batches, found.samples) == (3, 12)
    assert bn.recalibrate(model, Endless(), samples=9, progress=False).samples == 12
    assert bn.recalibrate(model, Endless(), progress=False).batches == 10
    assert bn.recalibrate(model, Endless(), method="sequential", progress=False).passes == 2


def test_batches_are_moved_to_where_the_model_is():
    moved = []

    class Placed(torch.Tensor):
        def to(self, *args, **kwargs):
            moved.append(args[0])
            return self.as_subclass(torch.Tensor)

    bn.recalibrate(Named(), [X.as_subclass(Placed)], progress=False)
    assert moved == [torch.device("cpu")]
    with pytest.raises(DataError, match="must take the batches"):
        bn.recalibrate(Named(), [X], device="meta", progress=False)


# -- prior, tolerance, progress ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0, 10, 40.0, 1e9, float("inf")])
@pytest.mark.parametrize("method", ["one-pass", "sequential"])
def test_the_prior_counts_as_samples(prior, method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.BatchNorm2d(3)).eval(), X * 2 + 1
    model[0].running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model[0].running_var.copy_(torch.tensor([0.5, 1.0, 4.0]))
    old = Moments(prior * 64 if prior < np.inf else 1e300, model[0].running_mean.double().numpy(), None)
    old = Moments(old.count, old.mean, model[0].running_var.double().numpy() * old.count)
    new = Moments.of(x.double().numpy()).merge(old)
    bn.recalibrate(model, [x], prior=prior, method=method, progress=False)
    np.testing.assert_allclose(model[0].running_mean, new.mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model[0].running_var, new.unbiased_variance, rtol=1e-6)


def test_an_infinite_prior_changes_no_bit():
    model = network()
    bn.recalibrate(model, images(), progress=False)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    found = bn.recalibrate(model, images(seed=1), prior=float("inf"), progress=False)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(m.shift == 0 and m.ratio == (1.0, 1.0) for m in found.moved)


def test_a_tolerance_stops_when_the_statistics_have_settled():
    model, data = Named(), images((64,) * 40)
    found = bn.recalibrate(model, data, tolerance=0.005, progress=False)
    assert found.settled
    assert 2 < found.batches < 40
    assert not bn.recalibrate(model, data, tolerance=1e-9, progress=False).settled


def test_progress_is_shown_on_the_error_stream_only_where_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr("batchnorm.progress.LINE_EVERY_SECONDS", 0.0)
    bn.recalibrate(Named(), X)
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 of 1 batches, about 0 s left" in said.err
    bn.recalibrate(Named(), X, progress=False)
    assert capsys.readouterr().err == ""


def test_the_number_of_batches_grows_so_that_training_goes_on_from_here():
    layer = bnt.BatchNorm1d(1, debias=True)
    bn.recalibrate(layer, [torch.tensor([[0.0], [2.0]])] * 3, progress=False)
    assert layer.num_batches_tracked.item() == 3
    layer.train()(torch.tensor([[10.0], [12.0]]))
    assert layer.running_mean.item() < 5


def test_the_result_says_how_far_the_statistics_moved():
    model = nn.Sequential(nn.BatchNorm1d(1, eps=0.0)).eval()
    found = bn.recalibrate(model, [torch.tensor([[1.0], [5.0]])], progress=False)
    assert found.model is model
    (moved,) = found.moved
    assert moved.shift == pytest.approx(3 / 8**0.5)
    assert moved.ratio == pytest.approx((8.0, 8.0))
