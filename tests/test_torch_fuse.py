"""`convert(fuse=True)`: what is fused, that it is, and that nothing else changes whatever the program does."""

import copy
import io
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bn
from batchnorm.bench.zoo import open_torchvision
from batchnorm.errors import BatchNormWarning, FusionError, OptionError, ShapeError
from batchnorm.torch import deferred
from batchnorm.torch.deferred import Deferred
from batchnorm.torch.layers import BatchNorm
from oracle import assert_near


class Site(nn.Module):
    """One layer, and a program behind it that gets its output and another tensor of the same shape."""

    def __init__(self, program, layer=nn.BatchNorm2d, affine=True):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.program, self.other = layer(3, affine=affine), program, nn.Identity()
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x, r):
        return self.program(self, self.norm(x * 2), r * 3)


@pytest.fixture(autouse=True)
def _small_outputs_too(monkeypatch):
    monkeypatch.setattr(deferred, "FEW", 0)


@pytest.fixture
def computed(monkeypatch):
    """Count what layers are asked to compute: whether with a residual, and with which activation."""
    seen, original = Counter(), BatchNorm.normalize

    def counting(self, x, residual, activation):
        seen[residual is not None, activation] += 1
        return original(self, x, residual, activation)

    monkeypatch.setattr(BatchNorm, "normalize", counting)
    return seen


def inputs(shape=(4, 3, 5, 2), dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def step(model, given, run=None, times=2):
    """Return output, gradients and statistics of a few steps with a random upstream gradient."""
    found, generator = [], torch.Generator().manual_seed(7)
    for _ in range(times):
        given = [v.detach().clone().requires_grad_() for v in given]
        y = first((model if run is None else run)(*given))
        wanted = [v for v in (*given, *model.parameters()) if v.requires_grad]
        dy = torch.randn(y.shape, generator=generator).to(y.dtype)
        grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
        found += [y, *(g for g in grads if g is not None)]
    return [v.detach().clone() for v in (*found, *model.buffers())]


def assert_same(got, expected, ulps=16.0):
    assert len(got) == len(expected)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        if a.is_floating_point():
            exact = np.finfo(np.float32).eps if a.dtype != torch.float64 else np.finfo(np.float64).eps
            scale = float(torch.finfo(a.dtype).eps) / exact
            assert_near(
                a.double() if scale == 1 and exact < 1e-9 else a.float(), b.double(), ulps=ulps * scale, what=str(place)
            )
        else:
            assert torch.equal(a, b)


def both(make, given):
    """Return a model as it is converted, and the same fused."""
    plain, fused = bn.convert(make()), make()
    bn.convert(fused, fuse=True, example=tuple(given))
    return plain, fused


def marks(model):
    return {name: layer._followers for name, layer in model.named_modules() if isinstance(layer, BatchNorm)}


# --- what is fused ----------------------------------------------------------------------------------------------------


def statement(write):
    """Return a program that writes in place and goes on with what it has written to."""

    def program(model, y, r):
        write(y, r)
        return y * 1

    return program


def iadd(y, r):
    y += r
    return y


ACTIVATIONS = {
    "relu": [
        lambda m, y, r: nn.ReLU()(y), lambda m, y, r: nn.ReLU(inplace=True)(y), lambda m, y, r: F.relu(y),
        lambda m, y, r: F.relu(y, True), lambda m, y, r: torch.relu(y), lambda m, y, r: torch.relu_(y),
        lambda m, y, r: y.relu(), lambda m, y, r: y.relu_(), statement(lambda y, r: y.relu_()),
        statement(lambda y, r: F.relu(y, inplace=True)),
    ],
    "relu6": [lambda m, y, r: nn.ReLU6()(y), lambda m, y, r: nn.ReLU6(True)(y), lambda m, y, r: F.relu6(y),
              lambda m, y, r: F.relu6(y, inplace=True), lambda m, y, r: nn.Hardtanh(0, 6)(y)],
    "leaky_relu": [lambda m, y, r: nn.LeakyReLU()(y), lambda m, y, r: nn.LeakyReLU(inplace=True)(y),
                   lambda m, y, r: F.leaky_relu(y, 0.01), lambda m, y, r: F.leaky_relu_(y)],
    "silu": [lambda m, y, r: nn.SiLU()(y), lambda m, y, r: nn.SiLU(inplace=True)(y), lambda m, y, r: F.silu(y)],
    "gelu": [lambda m, y, r: nn.GELU()(y), lambda m, y, r: F.gelu(y), lambda m, y, r: F.gelu(y, approximate="none")],
    "hardswish": [lambda m, y, r: nn.Hardswish()(y), lambda m, y, r: nn.Hardswish(True)(y), lambda m, y, r: F.hardswish(y)],
    "sigmoid": [lambda m, y, r: nn.Sigmoid()(y), lambda m, y, r: y.sigmoid(), lambda m, y, r: torch.sigmoid_(y),
                lambda m, y, r: F.sigmoid(y), statement(lambda y, r: y.sigmoid_())],
    "tanh": [lambda m, y, r: nn.Tanh()(y), lambda m, y, r: torch.tanh(y), lambda m, y, r: y.tanh_()],
}  # fmt: skip
ADDS = {
    "y + r": lambda m, y, r: y + r,
    "r + y": lambda m, y, r: r + y,
    "y += r": lambda m, y, r: iadd(y, r),
    "y.add(r)": lambda m, y, r: y.add(r),
    "y.add_(r)": lambda m, y, r: y.add_(r),
    "y.add_(r) as a statement": lambda m, y, r: (y.add_(r), y)[1],
    "torch.add(y, r)": lambda m, y, r: torch.add(y, r),
    "torch.add(r, y)": lambda m, y, r: torch.add(r, y, alpha=1),
    "sum": lambda m, y, r: sum([y, r][1:], y),
}
ALONE = {f"{name} {i}": (form, ((name,),), name) for name, forms in ACTIVATIONS.items() for i, form in enumerate(forms)}
ADDED = {
    **{name: (lambda m, y, r, add=add: add(m, y, r) * 2, (("add",),), None) for name, add in ADDS.items()},
    **{
        f"{name}, relu": (lambda m, y, r, add=add: F.relu(add(m, y, r)), (("add", "relu"),), "relu")
        for name, add in ADDS.items()
    },
    **{
        f"y += r, {name}": (lambda m, y, r, form=forms[-1]: form(m, iadd(y, r), r), (("add", name),), name)
        for name, forms in ACTIVATIONS.items()
    },
    "in place, one after the other": (lambda m, y, r: (y.add_(r), y.relu_(), y * 1)[2], (("add", "relu"),), "relu"),
}


@pytest.mark.parametrize(("program", "chains", "activation"), [*ALONE.values(), *ADDED.values()], ids=[*ALONE, *ADDED])
def test_what_follows_a_layer_is_computed_with_it(program, chains, activation, computed):
    given = inputs()
    plain, fused = both(lambda: Site(program), given)
    assert marks(fused) == {"norm": chains}
    expected = step(plain, given)
    computed.clear()
    got = step(fused, given)
    assert computed == {("add" in chains[0], activation): 2}
    assert_same(got, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "dtype", "affine"),
    [
        (nn.BatchNorm1d, (6, 3), torch.float32, True),
        (nn.BatchNorm1d, (6, 3, 4), torch.float64, False),
        (nn.BatchNorm3d, (2, 3, 3, 2, 4), torch.float32, True),
        (nn.BatchNorm2d, (4, 3, 5, 2), torch.bfloat16, True),
    ],
    ids=["1d", "1d with a length", "3d", "bfloat16"],
)
def test_every_layer_is_fused_in_both_modes(layer, shape, dtype, affine, training, computed):
    given = inputs(shape, dtype)
    plain, fused = both(lambda: Site(lambda m, y, r: F.silu(y + r), layer, affine).to(dtype), given)
    expected = step(plain.train(training), given)
    computed.clear()
    assert_same(step(fused.train(training), given), expected)
    assert computed == {(True, "silu"): 2}


def test_channels_last_stays_channels_last(computed):
    given = [v.to(memory_format=torch.channels_last) for v in inputs()]
    plain, fused = both(lambda: Site(lambda m, y, r: F.relu(y + r)), given)
    expected = step(plain, given)
    computed.clear()
    got = step(fused, given)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert computed == {(True, "relu"): 2}
    assert_same(got, expected)


# --- what is not -----------------------------------------------------------------------------------------------------


class Relu(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx, y):
        out = y.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


def kept(model, y, r):
    model.kept = [y]
    return F.relu(y)


def hooked(model, y, r):
    y.register_hook(lambda g: g * 2)
    return F.relu(y)


def hooked_later(model, y, r):
    out = F.relu(y)
    y.register_hook(lambda g: g * 2)
    return out


def written_later(model, y, r):
    out = F.silu(y + r)
    r.mul_(2)
    return out


def read_and_written(model, y, r):
    out = y + r
    r.mul_(2)
    return F.relu(out)


DECLINED = {
    "another slope": lambda m, y, r: F.leaky_relu(y, 0.2),
    "gelu by tanh": lambda m, y, r: F.gelu(y, approximate="tanh"),
    "clamp": lambda m, y, r: y.clamp(min=0),
    "hardtanh": lambda m, y, r: F.hardtanh(y),
    "a number": lambda m, y, r: y + 1,
    "alpha": lambda m, y, r: torch.add(y, r, alpha=2),
    "broadcast": lambda m, y, r: y + r[:, :1],
    "a wider residual": lambda m, y, r: F.relu(y + r.double()),
    "other strides": lambda m, y, r: F.relu(y + r.transpose(2, 3).contiguous().transpose(2, 3)),
    "into the residual": lambda m, y, r: F.relu(iadd(r, y)),
    "itself": lambda m, y, r: F.relu(y + y),
    "used twice": lambda m, y, r: F.relu(y) + y,
    "returned": lambda m, y, r: (F.relu(y), y),
    "kept": kept,
    "a hook": hooked,
    "a hook, later": hooked_later,
    "its gradient": lambda m, y, r: (y.retain_grad(), F.relu(y))[1],
    "a function of its own": lambda m, y, r: Relu.apply(y),
    "detached": lambda m, y, r: F.relu(y.detach() + r),
    "nothing": lambda m, y, r: y,
    "one of two outputs": lambda m, y, r: F.relu(y) if m.training else y,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in DECLINED if name != "one of two outputs"])
def test_an_output_that_something_else_sees_is_not_fused(name, computed):
    given = inputs()
    plain, fused = both(lambda: Site(DECLINED[name]), given)
    assert marks(fused) == {"norm": ()}
    expected = step(plain, given)
    computed.clear()
    assert_same(step(fused, given), expected)
    assert computed == {(False, None): 2}


def test_a_sum_that_is_seen_is_fused_without_what_follows_it(computed):
    programs = {
        "used twice": lambda m, y, r: F.relu(y + r) + (y + r),
        "the sum, used twice": lambda m, y, r: (lambda z: F.relu(z) + z)(y + r),
        "the residual is written to": read_and_written,
        "the residual is written to later": written_later,
    }
    for name, program in programs.items():
        given = inputs()
        plain, fused = both(lambda program=program: Site(program), given)
        assert marks(fused) == {"norm": () if name == "used twice" else (("add",),)}
        assert_same(step(fused, given), step(plain, given))


def test_a_layer_whose_input_is_written_to_is_not_fused():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x, r):
            x = x * 2
            y = self.norm(x)
            x += r
            return F.relu(y)

    plain, fused = both(Written, inputs())
    assert marks(fused) == {"norm": ()}
    with torch.no_grad():
        assert_same([fused(*inputs())], [plain(*inputs())])


def test_of_two_layers_that_are_added_the_left_one_is_fused(computed):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x, r):
            return F.relu(self.a(x) + self.b(r))

    plain, fused = both(Two, inputs())
    assert marks(fused) == {"a": (("add", "relu"),), "b": ()}
    computed.clear()
    got = step(fused, inputs())
    assert computed == {(True, "relu"): 2, (False, None): 2}
    assert_same(got, step(plain, inputs()))


def test_a_layer_that_is_called_twice_is_fused_at_both_places(computed):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3, momentum=0.3)

        def forward(self, x, r):
            return F.relu(self.norm(F.relu(self.norm(x)) * 2) + r)

    plain, fused = both(Shared, inputs())
    assert marks(fused) == {"norm": (("relu",), ("add", "relu"))}
    computed.clear()
    got = step(fused, inputs())
    assert computed == {(False, "relu"): 2, (True, "relu"): 2}
    assert_same(got, step(plain, inputs()), ulps=64)


def test_a_layer_that_is_seen_at_one_of_two_places_is_not_fused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x, r):
            return self.norm(F.relu(self.norm(x)))

    assert marks(both(Shared, inputs())[1]) == {"norm": ()}


@pytest.mark.parametrize(
    "hook",
    [
        lambda m: m.norm.register_forward_hook(lambda *_: None),
        lambda m: m.other.register_forward_hook(lambda *_: None),
        lambda m: m.other.register_forward_pre_hook(lambda *_: None),
        lambda m: m.other.register_full_backward_hook(lambda *_: None),
    ],
    ids=["on the layer", "behind it", "before what follows", "of the backward"],
)
def test_an_output_that_a_hook_sees_is_not_fused(hook):
    model = Site(lambda m, y, r: F.relu(m.other(y)))
    hook(model)
    seen = bn.convert(model, fuse=True, example=tuple(inputs()))
    assert marks(seen) == {"norm": ()}
    bare = bn.convert(Site(lambda m, y, r: F.relu(m.other(y))), fuse=True, example=tuple(inputs()))
    assert marks(bare) == {"norm": (("relu",),)}


# --- networks ---------------------------------------------------------------------------------------------------------


def densenet():
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)


NETWORKS = {
    "resnet18": {("relu",): 9, ("add", "relu"): 8, (): 3},
    "mobilenet_v2": {("relu6",): 35, ("add",): 10, (): 7},
    "mobilenet_v3_small": {("hardswish",): 18, ("relu",): 5, ("add",): 6, (): 5},
    "shufflenet_v2_x0_5": {("relu",): 37, (): 19},
    "densenet": {("relu",): 11},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_the_same(name, computed):
    open_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    model = densenet() if name == "densenet" else getattr(models, name)(weights=None, num_classes=5)
    model, x = model.double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain, fused = bn.convert(copy.deepcopy(model)), bn.convert(copy.deepcopy(model), fuse=True, example=x)
    found = Counter(chains[0] if chains else () for chains in marks(fused).values())
    assert found == NETWORKS[name]

    def run(model):
        def seeded(x):
            torch.manual_seed(3)
            return model(x)

        return step(model, [x], seeded, times=1)

    expected = run(plain)
    computed.clear()
    got = run(fused)
    asked = Counter()
    for chain, count in found.items():
        asked["add" in chain, chain[-1] if chain and chain[-1] != "add" else None] += count
    assert computed == asked
    # through dozens of layers; a bias before a normalization has a gradient of 0 and some rounding
    for part in (slice(0, 1), slice(1, -len(list(model.buffers()))), slice(-len(list(model.buffers())), None)):
        assert_same(
            *([torch.cat([v.double().flatten() for v in found[part]])] for found in (got, expected)), ulps=2.0**16
        )
    assert list(fused.state_dict()) == list(model.state_dict())


# --- nothing else changes ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.drop(F.relu(self.block(x) + x))


class Looking(Net):
    """The same, but it can't be watched without values."""

    def forward(self, x):
        return super().forward(x if x.mean() < 9 else -x)


def fused_net():
    return bn.convert(Net(), fuse=True, example=torch.randn(4, 3, 5, 2))


def snapshot(model):
    state = {name: v.clone() for name, v in model.state_dict().items()}
    return repr(model), [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()], state


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[:2] == before[:2]
    assert all(torch.equal(now[2][name], v) for name, v in before[2].items())


@pytest.mark.parametrize("kind", [Net, Looking])
def test_watching_leaves_no_trace(kind):
    model, x = kind().eval(), torch.randn(4, 3, 5, 2, requires_grad=True)
    model.block.train()
    modules, parameters, state = list(model.modules()), list(model.parameters()), torch.get_rng_state()
    modes, values = [m.training for m in modules], [v.clone() for v in model.state_dict().values()]
    assert bn.convert(model, fuse=True, example=x) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in modules] == modes
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values, strict=True))
    assert x.grad is None
    assert all(p.grad is None for p in parameters)
    assert marks(model) == {"norm": (("relu",),), "block.0": (("relu",),), "block.3": (("add", "relu"),)}


def test_a_layer_says_what_it_is_fused_with():
    model = fused_net()
    assert repr(model.block[3]) == (
        "BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, fused with add, relu)"
    )
    model.norm._followers = (("relu",), ("add",))
    assert repr(model.norm).endswith("fused with relu or add)")


@pytest.mark.parametrize("example", [(torch.randn(4, 3, 5, 2),), {"x": torch.randn(4, 3, 5, 2)}], ids=["tuple", "dict"])
def test_an_example_has_any_form(example):
    assert all(marks(bn.convert(Net(), fuse=True, example=example)).values())


def test_fusion_survives_copies_and_files_and_is_taken_out():
    model = fused_net()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in [*twins, torch.load(file, weights_only=False)]:
        assert marks(twin) == marks(model)
    plain = bn.convert(Net())
    assert list(model.state_dict()) == list(plain.state_dict()) == list(Net().state_dict())
    model.load_state_dict(Net().state_dict())
    Net().load_state_dict(model.state_dict())
    assert repr(bn.convert(model)) == repr(plain)
    assert not any(marks(model).values())


def test_revert_leaves_nothing_of_it():
    before = Net()
    after = bn.revert(bn.convert(Net(), fuse=True, example=torch.randn(4, 3, 5, 2)))
    assert repr(after) == repr(before)
    assert [sorted(m.__dict__) for m in after.modules()] == [sorted(m.__dict__) for m in before.modules()]


def test_other_verbs_keep_fusion(computed):
    plain, fused, x = bn.convert(Net()), fused_net(), torch.randn(4, 3, 5, 2)
    for verb in (bn.freeze, bn.unfreeze, lambda m: bn.add_domains(m, ["night"])):
        verb(plain), verb(fused)
        assert all(marks(fused).values())
        torch.manual_seed(1)
        expected = step(plain, [x])
        computed.clear()
        torch.manual_seed(1)
        assert_same(step(fused, [x]), expected, ulps=64)
        assert computed == {(False, "relu"): 4, (True, "relu"): 2}


def test_options_are_given_too():
    model = bn.convert(Net(), fuse=True, example=torch.randn(4, 3, 5, 2), unbiased=False)
    assert all(layer.options.unbiased is False for layer in model.modules() if isinstance(layer, BatchNorm))
    assert all(marks(model).values())
    own = bn.convert(Net(), fuse=True, example=torch.randn(4, 3, 5, 2), activation="tanh")
    assert not any(marks(own).values())


def test_without_an_example_nothing_is_done():
    model = Net()
    before = snapshot(model)
    with pytest.raises(OptionError, match=r"fuse=True must see the model run, but got no example.*example=x"):
        bn.convert(model, fuse=True)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("example", "options", "text"),
    [
        (torch.randn(4, 2, 5, 2), {}, r"the model must run on the example, but it failed: RuntimeError: .*channels"),
        (
            torch.randn(4, 3, 5, 2),
            {"on_single": "maybe"},
            r"layer 'norm', BatchNorm2d: on_single must be .* got 'maybe'",
        ),
    ],
    ids=["another input", "an option"],
)
def test_what_fails_leaves_the_model_as_it_was(example, options, text):
    model = Net()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(OptionError, match=text):
        bn.convert(model, fuse=True, example=example, **options)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.autograd.Function.apply.__func__.__module__ == "torch.autograd.function"


def test_a_model_that_looks_at_values_is_watched_with_them(computed):
    def program(m, y, r):
        return F.relu(y) if r.mean() > 0 else torch.tanh(y + r)

    x, r = inputs()
    plain, fused = both(lambda: Site(program), [x, r.abs()])
    assert marks(fused) == {"norm": (("relu",),)}
    for other in (r.abs(), -r.abs()):
        assert_same(step(fused, [x, other]), step(plain, [x, other]))
    assert computed[False, "relu"] == 2
    assert computed[True, None] == 2


def test_a_single_value_is_seen_and_refused_by_the_layer_later():
    model = bn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), fuse=True, example=torch.randn(1, 3))
    assert marks(model) == {"0": (("relu",),)}
    with pytest.raises(ShapeError, match=r"layer '0', BatchNorm1d\(3\): Expected more than 1 value per channel"):
        model(torch.randn(1, 3))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 2, 5, 2), (1, 3, 1, 1)], ids=str)
def test_a_fused_layer_raises_when_it_is_called(shape):
    x = torch.randn(shape)
    layer = bn.convert(Site(ACTIVATIONS["relu"][0]), fuse=True, example=tuple(inputs())).norm
    with pytest.raises((ValueError, RuntimeError)) as ours:
        layer(x)
    with pytest.raises((ValueError, RuntimeError)) as others:
        bn.BatchNorm2d(3)(x)
    assert type(ours.value) is type(others.value)
    assert str(ours.value) == str(others.value)


def test_a_subclass_with_a_forward_of_its_own_is_left_with_one_warning():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Own(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    with pytest.warns(BatchNormWarning, match="layer '0' is a Own") as said:
        bn.convert(model, fuse=True, example=inputs()[0])
    assert len(said) == 1
    assert said[0].filename == __file__
    assert marks(model) == {"2": (("relu",),)}


# --- other ways than the one that was watched -------------------------------------------------------------------------


class Switched(Site):
    """A program that is watched, and another one that runs afterwards."""

    def __init__(self, program, watched=ACTIVATIONS["relu"][0]):
        super().__init__(lambda m, y, r: (program if m.switched else watched)(m, y, r))
        self.switched = False


def switched(program, watched=ACTIVATIONS["relu"][0]):
    plain, fused = both(lambda: Switched(program, watched), inputs())
    assert all(marks(fused).values())
    plain.switched = fused.switched = True
    return plain, fused


def stacked(m, y, r):
    return torch.stack([y, r]).sum(0) * torch.cat([y, y])[: len(y)]


def closed(m, y, r):
    with torch.no_grad():
        mean = y.mean()
    return F.relu(y) * mean


def opened(m, y, r):
    with torch.no_grad():
        out = F.relu(y)
    return out + y


OTHER_WAYS = [
    *(stacked, closed, opened),
    *(DECLINED[name] for name in DECLINED if "function" not in name and "later" not in name),
    *ADDS.values(),
    lambda m, y, r: F.silu(y + r) * F.relu(y),
    lambda m, y, r: (F.relu(y), y * 2)[1],
    lambda m, y, r: (y.mul_(2), y + y.relu())[1],
    lambda m, y, r: (y.relu_(), y + 1)[1],
    lambda m, y, r: y.clone().relu() + y.relu(),
    lambda m, y, r: F.relu(y + r + r * 2),
    lambda m, y, r: F.relu(iadd(iadd(y, r), r * 2)),
    lambda m, y, r: (y.add_(r), y.mul_(3), y.relu())[2],
    lambda m, y, r: (y + r).relu() * (y - r),
    lambda m, y, r: y[1:2].relu() + y.view(-1)[0],
    lambda m, y, r: torch.autograd.grad(y.sum() * 2 + (y * r).sum(), r, create_graph=True)[0] * y,
    lambda m, y, r: y.copy_(r) + y,
    lambda m, y, r: F.batch_norm(y, None, None, training=True) + m.norm(y.relu()),
]


@pytest.mark.parametrize(
    "watched", [ACTIVATIONS["relu"][0], ADDED["y + r, relu"][0], ADDED["y += r"][0]], ids=["relu", "add, relu", "add"]
)
@pytest.mark.parametrize("program", OTHER_WAYS, ids=[str(i) for i in range(len(OTHER_WAYS))])
def test_another_way_computes_the_same(program, watched):
    plain, fused = switched(program, watched)
    assert_same(step(fused, inputs()), step(plain, inputs()), ulps=64)


def test_an_output_that_nobody_uses_moves_the_statistics_once():
    plain, fused = switched(lambda m, y, r: r)
    for model in (plain, fused):
        model(*inputs())
    assert fused.norm.num_batches_tracked == 1
    assert_same(list(fused.buffers()), list(plain.buffers()))
    fused.eval()(*inputs())
    assert fused.norm.num_batches_tracked == 1


def test_statistics_move_in_the_order_of_the_calls():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.late = nn.BatchNorm2d(3, momentum=0.4), False

        def forward(self, x, r):
            if not self.late:
                return F.relu(self.norm(x)) + F.relu(self.norm(r + 2))
            a, b = self.norm(x), self.norm(r + 2)
            return F.relu(b) + F.relu(a)

    plain, fused = both(Two, inputs())
    plain.late = fused.late = True
    assert_same(step(fused, inputs()), step(plain, inputs()))


def test_an_output_is_computed_as_everything_stood_when_the_layer_was_called():
    plain, fused = (model.norm for model in switched(lambda m, y, r: y))
    x = inputs()[0]
    expected = plain(x).detach()
    y = fused(x)
    assert isinstance(y, Deferred)
    fused.eval()
    bn.freeze(fused)
    assert_same([y.detach(), *fused.buffers()], [expected, *plain.buffers()])
    assert not fused.training
    assert fused.frozen_statistics


def test_a_waiting_output_is_a_tensor_for_everybody():
    plain, fused = (model.norm for model in switched(lambda m, y, r: y))
    x = inputs()[0]
    expected = plain(x)
    y = fused(x)
    said = (
        y.shape,
        y.dtype,
        y.device,
        y.ndim,
        y.size(1),
        y.stride(),
        y.numel(),
        y.is_contiguous(),
        y.requires_grad,
        len(y),
    )
    assert isinstance(y, Deferred)
    assert said == (x.shape, x.dtype, x.device, 4, 3, x.stride(), x.numel(), True, True, 4)
    file = io.BytesIO()
    torch.save(fused(x).detach(), file)
    file.seek(0)
    for got in (
        y.detach(),
        torch.load(file),
        pickle.loads(pickle.dumps(fused(x).detach())),
        torch.from_numpy(np.asarray(fused(x).detach())),
    ):
        assert type(got) is torch.Tensor
        assert_same([got], [expected.detach()])
    assert repr(y) == repr(y.made())
    assert y.grad_fn is not None
    assert not y.is_leaf
    assert_same(list(torch.unbind(fused(x).detach())), list(torch.unbind(expected.detach())))


def test_a_written_input_is_refused_with_the_cure():
    norm = switched(lambda m, y, r: y)[1].norm
    x = inputs()[0]
    y = norm(x)
    x.add_(1)
    with pytest.raises(
        FusionError, match=r"BatchNorm2d\(3\): its input, γ, β .* written to between .*convert\(model, fuse=False\)"
    ):
        F.relu(y)
    model = switched(read_and_written, ADDED["y + r, relu"][0])[1]
    with pytest.raises(
        FusionError, match=r"layer 'norm', BatchNorm2d\(3\): what was added to its output was written to"
    ):
        model(*inputs())


def test_a_function_of_its_own_is_refused_and_not_wrong():
    _, fused = switched(DECLINED["a function of its own"])
    x, r = inputs()
    with torch.no_grad():
        assert fused(x, r).min() == 0
    y = fused(x.requires_grad_(), r)
    with pytest.raises(
        FusionError, match=r"BatchNorm2d\(3\) is fused with what follows it, but its output reached .* fuse again"
    ):
        y.backward(torch.randn_like(y))


def test_a_checkpoint_that_returns_the_output_is_refused_and_not_wrong():
    def program(m, y, r):
        return F.relu(y if not m.switched else checkpoint(m.norm, r, use_reentrant=True))

    _, fused = switched(program, program)
    x, r = inputs()
    with pytest.raises(FusionError, match="a function with a backward of its own"):
        fused(x, r.requires_grad_())


def test_compiled_code_is_refused():
    norm = switched(lambda m, y, r: y)[1].norm
    y = norm(inputs()[0])
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(FusionError, match="past all functions of torch"):
        y * 2


@pytest.mark.parametrize("late", [DECLINED["a hook, later"], lambda m, y, r: (F.relu(y), y.retain_grad())[0]])
def test_a_place_in_the_graph_that_is_gone_is_refused(late):
    _, fused = switched(late)
    with pytest.raises(
        FusionError, match=r"layer 'norm', BatchNorm2d\(3\): .* gradient of the output itself is not known"
    ):
        fused(*inputs())


def test_a_hook_that_comes_later_is_called_with_the_output():
    plain, fused = both(lambda: Site(ACTIVATIONS["relu"][0]), inputs())
    seen = []
    for model in (plain, fused):
        model.norm.register_forward_hook(lambda module, args, y: seen.append(y) or y * 2)
    assert_same(step(fused, inputs()), step(plain, inputs()))
    assert [type(y) for y in seen] == [torch.Tensor] * 4


def test_a_small_output_is_computed_at_once(monkeypatch):
    monkeypatch.setattr(deferred, "FEW", 120)
    norm = switched(lambda m, y, r: y)[1].norm
    x = inputs()[0]
    assert x.numel() == 120
    assert type(norm(x)) is Deferred
    assert type(norm(x[:3])) is torch.Tensor


# --- beside other things ----------------------------------------------------------------------------------------------


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return F.relu(checkpoint(self.block, x, use_reentrant=self.reentrant) + x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, computed):
    x = torch.randn(4, 3, 5, 2)
    models = [Checkpointed() for _ in range(2)]
    for model in models:
        model.reentrant = reentrant
    plain, fused = bn.convert(models[0]), bn.convert(models[1], fuse=True, example=x)
    # an output of the checkpoint is handed on by a function with a backward of its own, where it is reentrant
    assert marks(fused) == {
        "norm": (("relu",),),
        "block.0": (("relu",),),
        "block.3": () if reentrant else (("add", "relu"),),
    }

    def backward(model):
        given = x.clone().requires_grad_()
        y = model(given)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        return [y.detach(), given.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    expected = backward(plain)
    computed.clear()
    got = backward(fused)
    assert_same(got, expected, ulps=64)
    assert computed[False, "relu"] == 3
    assert fused.block[0].num_batches_tracked == fused.block[3].num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_is_given_the_output(reentrant):
    def program(m, y, r):
        return checkpoint(F.relu, y, use_reentrant=reentrant)

    plain, fused = both(lambda: Site(program), inputs())
    for model in (plain, fused):
        model.grads = [v.requires_grad_() for v in inputs()]
        y = model(*model.grads)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    grads = [[model.grads[0].grad, *(p.grad for p in model.parameters()), *model.buffers()] for model in (fused, plain)]
    assert_same(*grads)


def test_without_gradients_and_in_inference_mode(computed):
    plain, fused = both(lambda: Site(ADDED["y + r, relu"][0]), inputs())
    for guard in (torch.no_grad, torch.inference_mode):
        for mode in (True, False):
            with guard():
                expected = plain.train(mode)(*inputs())
                computed.clear()
                got = fused.train(mode)(*inputs())
            assert_same([got, *fused.buffers()], [expected, *plain.buffers()])
            # what has no versions can't be seen to be written to
            assert computed == ({(True, "relu"): 1} if guard is torch.no_grad else {(False, None): 1})


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
def test_autocast(residual, computed):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(4)
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, r):
            return F.relu(self.norm(self.conv(x)) + r)

    x, r = inputs()
    plain, fused = both(Cast, [x, r])

    def run(model):
        def cast(x, r):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(x, r.to(residual))

        return step(model, [x, r], cast)

    expected = run(plain)
    computed.clear()
    got = run(fused)
    assert got[0].dtype == residual
    assert_same(got, expected)
    assert computed == {((True, "relu") if residual is torch.bfloat16 else (False, None)): 2}


def test_derivatives_of_any_order_and_transforms():
    plain, fused = both(lambda: Site(lambda m, y, r: F.silu(y + r)).double(), inputs(dtype=torch.float64))
    x, r = inputs(dtype=torch.float64)

    def second(model):
        given = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(given, r), given, torch.ones_like(x) * r, create_graph=True)
        return torch.autograd.grad(g, given, r)

    assert_same(second(fused), second(plain), ulps=2.0**12)
    for model in (plain, fused):
        model.eval()
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        call = lambda x, model=model, state=state: torch.func.functional_call(model, state, (x, r))  # noqa: E731
        model.found = [torch.func.jvp(call, (x,), (r,))[1], *torch.func.vmap(call)(torch.stack([x, r])).unbind()]
        model.found += [torch.func.grad(lambda x, call=call: (call(x) * r).sum())(x)]
    assert_same([v.detach() for v in fused.found], [v.detach() for v in plain.found], ulps=64)


def test_a_compiled_model_is_one_graph(computed):
    fused = bn.convert(Site(ADDED["y + r, relu"][0]), fuse=True, example=tuple(inputs()))
    plain = bn.convert(Site(ADDED["y + r, relu"][0]))
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    assert_same(step(fused, inputs(), compiled), step(plain, inputs()))


def test_a_mask_is_computed_at_once():
    layer = bn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse=True, example=inputs()[0])[0]
    x, r = inputs()
    assert isinstance(layer(x), Deferred)
    for given in ({"mask": torch.ones(4, 5, 2, dtype=torch.bool)}, {"residual": r}, {"sample_weight": torch.ones(4)}):
        assert type(layer(x, **given)) is torch.Tensor
    bn.sync(layer)
    assert type(layer.eval()(x)) is torch.Tensor


def test_a_waiting_output_is_added_by_another_layer():
    plain, fused = both(lambda: Site(ACTIVATIONS["relu"][0]), inputs())
    last = bn.BatchNorm2d(3, activation="relu")
    x, r = inputs()
    assert isinstance(fused.norm(x), Deferred)
    assert_same([last(r, residual=fused.norm(x)).detach()], [last(r, residual=plain.norm(x)).detach()])
    assert_same([last(fused.norm(x)).detach()], [last(plain.norm(x)).detach()])


def test_two_threads_call_one_layer():
    from concurrent.futures import ThreadPoolExecutor

    plain, fused = both(lambda: Site(ACTIVATIONS["relu"][0]), inputs())
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: fused.eval()(*inputs()), range(20)))
    assert_same([y.detach() for y in outputs], [plain.eval()(*inputs()).detach()] * 20)
