"""`recompute`: what is saved, what comes back bit for bit, and that nothing else changes whatever stands beside it."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from torch.utils.checkpoint import checkpoint

from batchnorm import torch as bn
from batchnorm.errors import RecomputeError
from batchnorm.torch.recompute import active

C = 16
# the smallest images that go through a kernel
SHAPE = (2, C, 16, 16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t):
    return t.detach().contiguous().resolve_neg().view(BITS[t.element_size()])


def images(channels=C, dtype=torch.float32, seed=5, samples=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((samples, channels, 16, 16), generator=generator).to(dtype) * 2 + 1


def layer(activation="relu", channels=C, kind=bn.BatchNorm2d, **options):
    made = kind(channels, activation=activation, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for v in (made.weight, made.bias, made.running_mean):
            v.copy_(torch.randn(channels, generator=generator))
    return made


def conv(seed=1, channels=C):
    torch.manual_seed(seed)
    return nn.Conv2d(C, channels, 3, padding=1, bias=False)


def stack(depth=3, activation="relu"):
    return nn.Sequential(*(m for i in range(depth) for m in (conv(i), layer(activation))), conv(depth))


class Saved(torch.autograd.Function):
    """Save a tensor, and show what the backward gets for it."""

    got = None

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        (Saved.got,) = ctx.saved_tensors
        return torch.ones_like(Saved.got)


@contextlib.contextmanager
def counted():
    """Count the bytes of the storages that the backward is left with, but not those of parameters."""
    kept, found = {}, []

    def pack(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        yield found
    found.append(sum(storage.nbytes() for storage in kept.values()))


def gradients(program, modules, *, rebuilt, x=None, times=1):
    """Return output, gradients and statistics of a step with a random upstream gradient."""
    modules = copy.deepcopy(modules)
    x = (images() if x is None else x).clone().requires_grad_()
    with bn.recompute(enabled=rebuilt):
        y = program(modules, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    for i in range(times):
        y.backward(dy, retain_graph=i + 1 < times)
    grads = [p.grad for p in (x, *modules.parameters())]
    return [v.detach() for v in (y, *grads, *modules.buffers()) if v is not None]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.stride() == b.stride(), place
        assert torch.equal(bits(a), bits(b)), place


def assert_alike(program, modules, **options):
    assert_equal(*(gradients(program, modules, rebuilt=rebuilt, **options) for rebuilt in (True, False)))


def is_rebuilt(y, program=Saved.apply):
    """Whether what a program saves of an output comes back as another tensor with the same bits, in the context."""
    (_,) = torch.autograd.grad(program(y), y)
    return Saved.got.untyped_storage()._cdata != y.untyped_storage()._cdata


# kernels that are compiled for the tests of the kernels too
CASES = [
    (None, torch.float32, "planes"),
    ("relu", torch.float16, "planes"),
    ("relu", torch.bfloat16, "rows"),
    ("relu6", torch.float64, "samples"),
    ("leaky_relu", torch.float32, "rows"),
    ("silu", torch.float32, "planes"),
    ("gelu", torch.float64, "samples"),
    ("hardswish", torch.float32, "rows"),
    ("sigmoid", torch.float64, "rows"),
    ("tanh", torch.float32, "samples"),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("activation", "dtype", "layout"), CASES, ids=str)
def test_an_output_comes_back_bit_for_bit(activation, dtype, layout, training):
    norm = layer(activation, 33, bn.BatchNorm1d if layout == "samples" else bn.BatchNorm2d).train(training)
    norm = norm.double() if dtype == torch.float64 else norm
    x = (torch.randn(300, 33) if layout == "samples" else torch.randn(4, 33, 9, 8)).to(dtype) * 3 + 1
    x = x.contiguous(memory_format=torch.channels_last) if layout == "rows" else x
    with bn.force("kernel"), bn.recompute():
        y = norm(x.requires_grad_())
        assert is_rebuilt(y)
    assert_equal([Saved.got], [y])


class Twin(torch.autograd.Function):
    """A product with itself, whose backward asks twice."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y, y)
        return y * y

    @staticmethod
    def backward(ctx, dz):
        first, second = ctx.saved_tensors
        Twin.shared, Twin.made = first.data_ptr() == second.data_ptr(), weakref.ref(first.untyped_storage())
        again, _ = ctx.saved_tensors
        return dz * (first + again)


CONSUMERS = {
    "convolution": lambda m, y: m["conv"](y),
    "rows of a matrix": lambda m, y: F.linear(y.flatten(1), m["conv"].weight.view(1, -1)[:, : C * 4].repeat(3, 64)),
    "transposed": lambda m, y: y.transpose(1, 3).square(),
    "slice": lambda m, y: y[:, 3:7].exp() * y[1:, :4],
    "our layer": lambda m, y: m["norm 2"](y),
    "our layer, and a convolution": lambda m, y: m["conv"](m["norm 2"](y)),
    "torch's layer": lambda m, y: F.layer_norm(y, y.shape[1:]),
    "product with itself": lambda m, y: y * y,
    "own function": lambda m, y: Twin.apply(y),
    "pooling": lambda m, y: F.max_pool2d(y, 3, 2),
    "two convolutions": lambda m, y: m["conv"](y) + m["conv"](y).sigmoid() * y,
    "same layer again": lambda m, y: m["norm"](y),
    "addition in place": lambda m, y: m["conv"](y.add_(1)),
    "clamp in place": lambda m, y: m["conv"](F.relu6(y, inplace=True)),
    "part in place": lambda m, y: m["conv"](y.index_fill_(1, torch.tensor([2]), 7.0)),
    "detached": lambda m, y: y * y.detach(),
    "detached, then in place": lambda m, y: y + (lambda z: m["conv"](z.mul_(2)))(y.detach()),
    "other values": lambda m, y: m["conv"](y.new_tensor(0) + y),
    "other dtype": lambda m, y: m["conv"](y) * y.detach().view(torch.int32),
    "residual": lambda m, y: m["conv"](m["norm 2"](m["conv"](y), residual=y)),
    "checkpointed": lambda m, y: checkpoint(lambda v: m["conv"](v.sin()), y, use_reentrant=False),
    "checkpointed, reentrant": lambda m, y: checkpoint(lambda v: m["conv"](v.sin()), y, use_reentrant=True),
}


def modules(activation="relu"):
    return nn.ModuleDict({"norm": layer(activation), "norm 2": layer(None), "conv": conv()})


@pytest.mark.parametrize("name", CONSUMERS)
def test_gradients_are_the_same_bit_for_bit_whatever_uses_an_output(name):
    assert_alike(lambda m, x: CONSUMERS[name](m, m["norm"](x * 1.5)), modules())


def test_who_asks_twice_gets_one_tensor():
    with bn.recompute():
        z = Twin.apply(layer()(images().requires_grad_()))
    z.backward(images(), retain_graph=True)
    assert Twin.shared
    # the graph is still there, and what was made for it is not
    assert Twin.made() is None


REBUILT = {
    "itself": lambda y: y,
    "flat": lambda y: y.flatten(1),
    "transposed": lambda y: y.transpose(1, 2),
    "slice": lambda y: y[1:, 3:5],
    "detached": lambda y: y.detach(),
}
STORED = {
    "a cast copy": lambda y: y.bfloat16(),
    "changed in place": lambda y: y.mul_(2),
    "read as other numbers": lambda y: y.detach().view(torch.bfloat16),
    "read with the other sign": lambda y: torch._neg_view(y.detach()),
    "an alias that counts for itself, of a changed output": lambda y: y.add_(1).data,
    "such an alias, changed": lambda y: y.data.add_(1),
}


@pytest.mark.parametrize("name", [*REBUILT, *STORED])
def test_what_is_not_the_output_as_it_was_is_saved_as_it_is(name):
    taken = []
    with bn.recompute():
        y = layer()(images().requires_grad_())
        v = (REBUILT | STORED)[name](y)
        # `y` may be gone: the storage tells
        saved = active().pack(v)
        taken.append(active().unpack(saved))
    assert torch.equal(bits(taken[0]), bits(v))
    assert taken[0].stride() == v.stride()
    assert (taken[0].data_ptr() != v.data_ptr()) == (name in REBUILT)


def test_another_tensor_in_the_place_of_a_dead_output_is_saved_as_it_is():
    taken = []
    with bn.recompute():
        memory = active()
        for i in range(5):
            y = layer()(images().requires_grad_())
            places = {y.data_ptr(), y.untyped_storage()._cdata}
            assert len(memory.outputs) == 1
            del y
            assert len(memory.outputs) == 0
            others = [torch.full(SHAPE, float(i)) for _ in range(20)]
            taken += [t for t in others if {t.data_ptr(), t.untyped_storage()._cdata} & places]
            assert all(memory.unpack(memory.pack(t)).data_ptr() == t.data_ptr() for t in others)
        y = layer()(images().requires_grad_())
        assert taken
        y.data = images()
        assert memory.unpack(memory.pack(y)).data_ptr() == y.data_ptr()


LARGE = (8, C, 64, 64)


def test_memory_that_is_lent_again_holds_another_output():
    """An output that is gone, and one with a residual in its place, which is no recipe; its storage never died."""
    x, taken = torch.randn(LARGE).requires_grad_(), []
    with bn.recompute():
        memory = active()
        for _ in range(5):
            y = layer()(x)
            place = y.data_ptr()
            assert memory.unpack(memory.pack(y)).data_ptr() != place
            del y
            other = layer()(x, residual=x)
            taken.append(other.data_ptr() == place)
            assert memory.unpack(memory.pack(other)).data_ptr() == other.data_ptr()
            del other
    assert any(taken)


def test_what_was_made_again_is_made_once_more_when_its_memory_went_on():
    x, taken = torch.randn(LARGE).requires_grad_(), []
    for _ in range(5):
        with bn.recompute():
            y = layer()(x)
            right, saved = y.detach().clone(), active().pack(y)
            memory = active()
            del y
        first = memory.unpack(saved)
        assert memory.unpack(saved).data_ptr() == first.data_ptr()
        place = first.data_ptr()
        del first
        others = [bn.BatchNorm2d(C)(x.detach()) for _ in range(3)]
        taken += [other.data_ptr() == place for other in others]
        assert torch.equal(memory.unpack(saved), right)
        assert torch.equal(others[0], others[1])
    assert any(taken)


SITUATIONS = {
    "evaluation": lambda m: m.eval(),
    "frozen": bn.freeze,
    "a frozen convolution": lambda m: m["conv"].requires_grad_(False),
    "frozen γ": lambda m: m["norm"].weight.requires_grad_(False),
    "no γ": lambda m: m.update({"norm": bn.BatchNorm2d(C, affine=False, activation="relu")}),
    "a schedule of momenta": lambda m: m.update({"norm": layer(momentum=lambda step: 0.5)}),
    "float64": lambda m: m.double(),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_gradients_are_the_same_bit_for_bit_in_other_situations(name):
    m = modules()
    SITUATIONS[name](m)
    x = images(dtype=torch.float64 if name == "float64" else torch.float32)
    assert_alike(lambda m, x: m["conv"](m["norm"](x * 2)), m, x=x)


def test_a_backward_runs_twice_where_the_graph_is_retained():
    assert_alike(lambda m, x: m(x), stack(), times=2)


def second_derivatives(m, x, rebuilt, within):
    x = x.clone().requires_grad_()
    with bn.recompute(enabled=rebuilt), contextlib.ExitStack() as stack:
        y = m["conv"](m["norm"](x).exp().mul(0.1))
        if not within:
            stack.close()
        (dx,) = torch.autograd.grad((y * images(seed=2)).sum(), x, create_graph=True)
        penalty = (dx * images(seed=4)).square().sum()
    return torch.autograd.grad(penalty, [x, *m["norm"].parameters(), m["conv"].weight])


def test_second_derivatives_are_the_same():
    m, x = modules(), images()
    expected = second_derivatives(m, x, rebuilt=False, within=True)
    assert_equal(second_derivatives(m, x, rebuilt=True, within=True), expected)
    y = bn.recompute(m["norm"])(x.requires_grad_())
    (dx,) = torch.autograd.grad((m["conv"](y.exp().mul(0.1)) * images(seed=2)).sum(), x, create_graph=True)
    penalty = (dx * images(seed=4)).square().sum()
    got = torch.autograd.grad(penalty, [x, *m["norm"].parameters(), m["conv"].weight])
    assert_equal(got, expected)


def spoil(name, m, x, h, y):
    with torch.no_grad():
        if name == "step":
            torch.optim.SGD([m["norm"].weight], lr=0.1).step()
        else:
            {
                "output": y,
                "view": y.view(-1),
                "input": h,
                "γ": m["norm"].weight,
                "β": m["norm"].bias,
                "w": m["conv"].weight,
            }[name].add_(0)


@pytest.mark.parametrize("rebuilt", [True, False], ids=["rebuilt", "plain"])
@pytest.mark.parametrize("name", ["output", "view", "input", "γ", "β", "w", "step"])
def test_what_is_changed_before_the_backward_raises_with_torchs_words(name, rebuilt):
    m, x = modules(), images().requires_grad_()
    with bn.recompute(enabled=rebuilt):
        h = x * 2
        y = m["norm"](h)
        z = m["conv"](y)
    m["norm"].weight.grad = torch.ones(C)
    spoil(name, m, x, h, y)
    error = RecomputeError if rebuilt else RuntimeError
    with pytest.raises(error, match=r"has been modified by an inplace operation: .* expected version . instead"):
        # the gradient of the convolution alone asks for y, x, γ and β only where they are recipes
        torch.autograd.grad(z, [m["conv"].weight] if rebuilt and name != "w" else [x], torch.randn_like(z))


def test_an_input_changed_between_is_no_recipe():
    m = modules()
    with bn.recompute():
        h = images().requires_grad_() * 2
        y = m["norm"](h)
        with torch.no_grad():
            h.add_(1)
        z = m["conv"](y)
    got = torch.autograd.grad(z, m["conv"].weight, images(seed=6))
    expected = torch.autograd.grad(m["conv"](y.detach()), m["conv"].weight, images(seed=6))
    assert_equal(got, expected)


# the fewest samples that are fused
MANY = 16


class Bottleneck(nn.Module):
    """Two layers, the second with what has come in, as torchvision writes them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(1), nn.BatchNorm2d(C), conv(2), nn.BatchNorm2d(C)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return F.relu(y)


def fused():
    return bn.convert(nn.Sequential(Bottleneck(), Bottleneck()), fuse=True, example=images(samples=MANY))


SIZE = 4 * 2 * C * 16 * 16
# how many tensors of the size of the images are kept: (without, with)
KEPT = {
    "a stack": (lambda: stack(3), 7, 4),
    "no activation": (lambda: stack(3, None), 7, 4),
    "layers on a layer": (lambda: nn.Sequential(conv(), layer(), layer(None), layer(), conv()), 5, 3),
    "pooled": (lambda: nn.Sequential(conv(), layer(), nn.MaxPool2d(2), conv()), 3.75, 2.5),
    "residuals, fused": (fused, 9, 7),
    "residuals, not fused": (lambda: bn.convert(nn.Sequential(Bottleneck(), Bottleneck())), 9, 9),
    "activation by itself": (lambda: nn.Sequential(conv(), layer(None), nn.ReLU(), conv()), 3, 3),
    "torch's layers": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv()), 3, 3),
}


@pytest.mark.parametrize("name", KEPT)
def test_as_many_bytes_are_saved(name):
    build, without, rebuilt = KEPT[name]
    for enabled, expected in ((False, without), (True, rebuilt)):
        model = build()
        with counted() as found, bn.recompute(enabled=enabled):
            _y = model(images(samples=MANY))
        # statistics and masks of channels are small
        assert found[0] / SIZE * 2 / MANY == pytest.approx(expected, abs=0.03), enabled


def test_fused_residuals_have_the_same_gradients():
    assert_alike(lambda m, x: m(x), fused(), x=images(samples=MANY))


def test_few_values_are_saved_as_they_are():
    norm = layer()
    with bn.recompute():
        norm(images()[:, :, :4, :4].contiguous().requires_grad_())
        assert len(active().outputs) == 0


def test_the_indices_of_a_pooling_come_back_in_64_bits():
    index = torch.tensor([[[[0, 2**31 - 1]]]])
    with bn.recompute():
        for given, fits in ((index, True), (index + 1, False), (index - 1, False), (index[0], False)):
            saved = active().pack(given)
            assert saved.value.dtype == (torch.int32 if fits else torch.int64)
            assert torch.equal(active().unpack(saved), given)
        saved = active().pack(index)
        index.add_(1)
        with pytest.raises(RecomputeError, match="LongTensor"):
            active().unpack(saved)


@pytest.fixture
def _without_collector():
    gc.disable()
    yield
    gc.enable()


def storages(program):
    """Return an output's graph, and weak references to the storages of what goes into a layer and what comes out."""
    seen = []
    m, x = modules(), images().requires_grad_()
    with bn.recompute():
        h = x * 2
        y = m["norm"](h)
        z = program(m, y)
        seen += [weakref.ref(v.untyped_storage()) for v in (h, y)]
    return z, seen


@pytest.mark.usefixtures("_without_collector")
@pytest.mark.parametrize(
    "name", ["convolution", "rows of a matrix", "slice", "pooling", "product with itself", "own function"]
)
def test_memory_is_given_back(name):
    z, (x, y) = storages(CONSUMERS[name])
    # the output is gone before the backward: this is what it is all about
    assert x() is not None
    assert y() is None
    z.backward(torch.randn_like(z))
    # `z` and its graph are still there
    assert x() is None
    z, (x, y) = storages(CONSUMERS[name])
    del z
    assert x() is None


@pytest.mark.usefixtures("_without_collector")
def test_an_output_that_somebody_keeps_does_not_keep_its_input():
    m, x = modules(), images().requires_grad_()
    with bn.recompute():
        h = x * 2
        kept = m["norm"](h)
        z = m["conv"](kept)
        # a graph that stays, with the hooks
        other = x.exp()
    x = weakref.ref(h.untyped_storage())
    del h
    z.backward(torch.randn_like(z))
    assert x() is None
    assert kept is not None
    assert other is not None


def test_a_model_runs_its_forwards_in_the_context():
    model = stack()
    keys, text = list(model.state_dict()), repr(model)
    expected = gradients(lambda m, x: m(x), model, rebuilt=False)
    assert bn.recompute(model) is model
    assert bn.recompute(model) is model
    assert (list(model.state_dict()), repr(model)) == (keys, text)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counted() as found:
            assert_equal(gradients(lambda m, x: m(x), twin, rebuilt=False), expected)
        assert found[0] / SIZE == pytest.approx(4, abs=0.03)
    assert active() is None
    assert bn.recompute(model, enabled=False) is model
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    with counted() as found:
        model(images())
    assert found[0] / SIZE == pytest.approx(7, abs=0.03)


def test_other_hooks_of_a_model_stay():
    seen = []
    model = nn.Sequential(nn.Identity())
    model.register_forward_hook(lambda *_: seen.append("after"), always_call=True)
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    bn.recompute(bn.recompute(model), enabled=False)(images())
    assert seen == ["before", "after"]


def test_a_failing_forward_leaves_no_context():
    model = bn.recompute(stack())
    with pytest.raises(ValueError, match="expected 4D input"):
        bn.recompute(nn.Sequential(model, layer()))(images()[0])
    assert active() is None
    with pytest.raises(RuntimeError), bn.recompute():
        model(images(3))
    assert active() is None
    # what fails before our hook is run has entered nothing
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images())
    handle.remove()
    assert active() is None
    assert model(images()).grad_fn is not None


def test_a_failure_that_is_caught_leaves_the_context_around_it():
    class Catching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bn.recompute(nn.Identity())

        def forward(self, x):
            with pytest.raises(ZeroDivisionError):
                self.inner(x)
            assert active() is not None
            return x

    model = bn.recompute(Catching())
    fail = lambda module, _: 1 / 0 if module is model.inner else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        model(images())
    finally:
        handle.remove()
    assert active() is None


def test_contexts_in_contexts_are_one():
    model = bn.recompute(stack(2))
    bn.recompute(model[0])
    bn.recompute(model[1])
    expected = gradients(lambda m, x: m(x), model, rebuilt=False)
    with bn.recompute():
        outer = active()
        with bn.recompute():
            assert active() is outer
        assert active() is outer
    assert_equal(gradients(lambda m, x: m(x), model, rebuilt=True), expected)
    with counted() as found:
        model(images())
    assert found[0] / SIZE == pytest.approx(3, abs=0.03)


def test_without_gradients_nothing_is_remembered():
    with bn.recompute():
        with torch.no_grad():
            layer()(images())
        with torch.inference_mode():
            layer()(images())
        frozen = layer().requires_grad_(requires_grad=False)
        conv()(frozen(images()))
        assert len(active().outputs) == 0


CHECKPOINTED = {
    "around": lambda m, x, **how: checkpoint(bn.recompute(m), x, **how),
    "parts of it": lambda m, x, **how: m[2:](checkpoint(m[:2], x, **how)),
    "all of it": checkpoint,
    "between": lambda m, x, **how: m[3:](checkpoint(m[2], m[:2](x), **how)),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_activation_checkpointing_stands_beside_it(name, reentrant):
    def run(m, x):
        return CHECKPOINTED[name](m, x, use_reentrant=reentrant)

    plain = gradients(lambda m, x: m(x), stack(), rebuilt=False)
    assert_equal(gradients(run, stack(), rebuilt=True), plain)
    assert_equal(gradients(run, stack(), rebuilt=False), plain)


def test_a_checkpoint_around_it_saves_nothing():
    model = bn.recompute(stack())
    with counted() as found:
        z = checkpoint(model, images().requires_grad_(), use_reentrant=False)
    assert found[0] == SIZE
    z.backward(torch.randn_like(z))


def test_other_hooks_get_what_is_saved_after_all():
    with save_on_cpu():
        got = gradients(lambda m, x: m(x), stack(2), rebuilt=True)
    assert_equal(got, gradients(lambda m, x: m(x), stack(2), rebuilt=False))
    # these keep values, but not their layout
    m, x = stack(2), images().contiguous(memory_format=torch.channels_last)
    assert not m[0](x).is_contiguous()
    with saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
        got = gradients(lambda m, x: m(x), m, rebuilt=True, x=x)
        expected = gradients(lambda m, x: m(x), m, rebuilt=False, x=x)
    for a, b in zip(got, expected, strict=True):
        # convolutions sum one layout in another order than the other
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_mixed_precision_stands_beside_it():
    def run(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    assert_alike(run, stack())
    for enabled, tensors in ((False, 3.5 + 0.5), (True, 2 + 0.5)):
        with counted() as found, bn.recompute(enabled=enabled):
            run(stack(), images())
        weights = sum(p.numel() * 2 for p in stack().parameters() if p.ndim == 4)
        assert (found[0] - weights) / SIZE == pytest.approx(tensors - 0.5, abs=0.03)


def test_threads_do_not_meet():
    expected = gradients(lambda m, x: m(x), stack(), rebuilt=False)
    found, model = {}, stack()

    def work(i):
        found[i] = [gradients(lambda m, x: m(x), model, rebuilt=True) for _ in range(3)]
        found[i, "active"] = active()

    with bn.recompute():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(active().outputs) == 0
    for i in range(3):
        assert found[i, "active"] is None
        for got in found[i]:
            assert_equal(got, expected)


def test_forwards_of_two_threads_leave_each_other_alone():
    here, there, left, found = threading.Event(), threading.Event(), threading.Event(), []

    class Waiting(nn.Module):
        def forward(self, norm, x, *, first):
            y = norm(x)
            (here if first else there).set()
            assert (there if first else left).wait(20)
            found.append(len(active().outputs))
            return y

    model, norm = bn.recompute(Waiting()), layer()
    other = threading.Thread(target=lambda: here.wait(20) and model(norm, images(), first=False))
    other.start()
    _y = model(norm, images(), first=True)
    left.set()
    other.join()
    assert found == [1, 1]


def test_graphs_of_one_thread_are_differentiated_in_another():
    model, x = stack(), images().requires_grad_()
    with bn.recompute():
        z = model(x)
    dy = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    threads = [threading.Thread(target=z.backward, args=(dy,), kwargs={"retain_graph": True}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = gradients(lambda m, x: m(x), stack(), rebuilt=False)[1]
    assert_equal([x.grad], [expected * 2])


def test_compiled_models_stand_beside_it():
    expected = gradients(lambda m, x: m(x), stack(1), rebuilt=False)
    model = bn.recompute(stack(1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = gradients(lambda _, x: compiled(x), model, rebuilt=True)
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_a_context_in_a_compiled_function_does_nothing():
    model = stack(1)

    @torch.compile(backend="eager", fullgraph=True)
    def program(x):
        with bn.recompute():
            return model(x)

    torch.testing.assert_close(program(images()), model(images()))


def test_transforms_and_traces_run_without_it():
    model, x = bn.recompute(stack(1)).eval(), images()

    def loss(v):
        return (model(v) * images(seed=2)).sum()

    expected = torch.autograd.grad(loss(v := x.clone().requires_grad_()), v)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
