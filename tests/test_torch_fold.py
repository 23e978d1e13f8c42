"""Folding torch models: a grid of small graphs, judged without the proof of the library itself."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import batchnorm as bn
from batchnorm.torch.evaluation import call

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def ci(examples):
    # an example is many graphs, and names the one that fails: to shrink them all would take long
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)


# --- the judge ----------------------------------------------------------------------------------------------------


def trained(model, seed=0):
    """Give a model parameters and statistics as of training: γ of both signs and zeros, β, means and variances."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda v: torch.randn(v.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(p) * 0.5)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(draw(module.running_mean))
                module.running_var.copy_(draw(module.running_var).abs() + 0.3)
                if getattr(module, "weight", None) is not None and hasattr(module, "eps"):
                    gamma = draw(module.weight)
                    module.weight.copy_(torch.where(gamma.abs() < 0.2, 0.0, gamma + 0.1 * gamma.sign()))
    return model.eval()


def results(model, inputs):
    """Return every tensor that a model gives, in evaluation."""
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, torch.Tensor)]
    assert found
    return found


def relative(got, expected):
    assert len(got) == len(expected)
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.isfinite(b).all()
        if b.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300)))
    return worst


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def norms_run(model, inputs):
    """Return how many batch normalization operations are executed."""
    with _Ops() as ops, torch.no_grad():
        call(model, inputs)
    return sum("batch_norm" in name for name in ops.names)


def wide(tree):
    return tree_map(lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, tree)


def judged(model, example, *others, exact=1e-12):
    """Fold in float64 and in float32, hold both to the unfolded model on all inputs, and return the float32 result."""
    model64 = copy.deepcopy(model).double()
    folded64 = bn.fold(model64, wide(example)).model
    result = bn.fold(model, example)
    for inputs in (example, *others):
        truth = results(model64, wide(inputs))
        assert relative(results(folded64, wide(inputs)), truth) <= exact
        assert_own(results(result.model, inputs), results(model, inputs), truth)
    return result


def assert_own(got, unfolded, truth):
    """Hold a folded model in its own dtype to float64.

    It may err twice as far as the unfolded model. Products of weights are rounded once more, and a shift is added after a sum
    and not before it: a few roundings for each layer, of numbers that may be larger than what they add up to.
    """
    for a, b, t in zip(got, unfolded, truth, strict=True):
        assert a.dtype == b.dtype
        size = t.abs().max()
        allowed = 2 * (b.double() - t).abs().max() + 32 * torch.finfo(a.dtype).eps * size
        assert (a.double() - t).abs().max() <= allowed


def names(entries):
    return [entry.layer for entry in entries]


# --- small graphs -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A graph of a few layers: ``run(self, x)`` says how they are called.

    Args:
        run: the forward.
        shape: of the input, with a batch of 3.
        places: axes of the input that may have other sizes.
        gone: whether every norm follows a linear layer that nothing else uses.
    """

    def __init__(self, run, shape, places=(), gone=False, **layers):
        super().__init__()
        self.run, self.shape, self.places, self.gone = run, shape, places, gone
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)

    def extra_repr(self):
        free = zip(self.run.__code__.co_freevars, self.run.__closure__ or (), strict=True)
        return f"{self.run.__qualname__}, {self.shape}, {[(n, c.cell_contents) for n, c in free]}"

    def input(self, generator, *, batch=3, more=0):
        shape = [n + more * (i in self.places) for i, n in enumerate(self.shape)]
        shape[0] = batch
        return torch.randn(shape, generator=generator, dtype=torch.float64)


NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS = {
    1: (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
eps = st.sampled_from([1e-5, 1e-3, 0.1])
flip = st.booleans()


@st.composite
def norm_of(draw, rank, channels):
    affine = draw(st.sampled_from([True, True, False]))
    return NORMS[rank](channels, eps=draw(eps), affine=affine)


@st.composite
def linear(draw, rank, inputs=None):
    """Return a linear layer with its numbers of input and output channels."""
    if rank == 0:
        inputs = inputs or draw(st.integers(1, 4))
        outputs = draw(st.integers(1, 4))
        return nn.Linear(inputs, outputs, bias=draw(flip)), inputs, outputs
    groups = draw(st.sampled_from([1, 1, 2, 3])) if inputs is None else draw(st.sampled_from([1, inputs]))
    inputs = inputs or groups * draw(st.integers(1, 2))
    outputs = groups * draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2))
    options = {"groups": groups, "dilation": dilation, "bias": draw(flip)}
    if draw(st.integers(0, 2)) == 0:
        stride = draw(st.integers(1, 3))
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        padding = min(draw(st.integers(0, 1)), dilation * (kernel - 1))
        layer = TRANSPOSED[rank](inputs, outputs, kernel, stride, padding, output_padding=extra, **options)
    elif draw(st.integers(0, 4)) == 0:
        layer = CONVS[rank](inputs, outputs, kernel, padding=draw(st.sampled_from(["same", "valid"])), **options)
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular", "replicate"]))
        padding = draw(st.sampled_from([0, 0, 1]))
        layer = CONVS[rank](inputs, outputs, kernel, draw(st.integers(1, 2)), padding, padding_mode=mode, **options)
    return layer, inputs, outputs


def places(rank):
    return tuple(range(2, 2 + rank))


def shape_of(rank, channels):
    return (3, channels, *((7, 6, 5)[:rank]))


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2, inplace=True), nn.Sigmoid(), nn.Tanh(), nn.GELU(),
    nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.PReLU(), nn.ELU(inplace=True), nn.ReLU6(inplace=True), nn.Softplus(),
    nn.Hardtanh(), nn.Dropout(), nn.Dropout(inplace=True), nn.Identity(), nn.CELU(), nn.Softmax(dim=1),
]  # fmt: skip
activation = st.sampled_from(ACTIVATIONS).map(copy.deepcopy)
rank_of = st.sampled_from([0, 1, 1, 2, 2, 3])


@st.composite
def linear_norm(draw):
    rank = draw(rank_of)
    layer, inputs, outputs = draw(linear(rank))
    if rank == 0 and draw(flip):
        # a sequence of features, which the norm finds after a transpose
        run = lambda self, x: self.norm(self.lin(x).transpose(1, 2))  # noqa: E731
        return Small(run, (3, 5, inputs), (1,), True, lin=layer, norm=draw(norm_of(1, outputs)))
    norms = nn.Sequential(*(draw(norm_of(rank, outputs)) for _ in range(draw(st.integers(1, 2)))))
    run = lambda self, x: self.act(self.norms(self.lin(x)))  # noqa: E731
    return Small(run, shape_of(rank, inputs), places(rank), True, lin=layer, norms=norms, act=draw(activation))


@st.composite
def norm_linear(draw):
    rank = draw(rank_of)
    layer, inputs, outputs = draw(linear(rank))
    second = draw(linear(rank, outputs))[0]
    kind = draw(st.sampled_from(["plain", "two readers", "residual", "act"]))

    def run(self, x):
        h = self.norm(self.act(x.clone()))
        if kind == "two readers":
            return self.lin(h), h.relu()
        if kind == "residual":
            return self.lin(h), x.sum()
        return self.second(self.act2(self.lin(h))) if kind == "act" else (self.lin(h), self.lin(h))

    return Small(
        run, shape_of(rank, inputs), places(rank), lin=layer, second=second, norm=draw(norm_of(rank, inputs)),
        act=draw(activation), act2=draw(activation),
    )  # fmt: skip


@st.composite
def pool(draw, rank):
    average, maximum, adaptive, adaptive_max = POOLS[rank]
    kind = draw(st.integers(0, 4))
    if kind == 0:
        padding = draw(st.integers(0, 1))
        return average(2, draw(st.integers(1, 2)), padding, ceil_mode=draw(flip), count_include_pad=draw(flip))
    if kind == 1:
        return maximum(2, draw(st.integers(1, 2)), draw(st.integers(0, 1)), ceil_mode=draw(flip))
    if kind == 2:
        return adaptive(draw(st.integers(1, 3)))
    if kind == 3:
        return adaptive_max(draw(st.integers(1, 3)))
    mode = draw(st.sampled_from(["nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]]))
    return nn.Upsample(scale_factor=2, mode=mode)


@st.composite
def with_places_between(draw):
    """Return a norm with something between it and the linear layer, before or after it."""
    rank = draw(st.integers(1, 2))
    layer, inputs, outputs = draw(linear(rank))
    pads = {
        1: (nn.ConstantPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d),
        2: (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    }
    constant, *edges = pads[rank]
    between = draw(
        st.one_of(
            pool(rank),
            st.sampled_from([constant(1, 0.0), constant(1, 1.5), constant(-1, 0.0), *(edge(1) for edge in edges)]),
            activation,
        )
    )
    if draw(flip):
        run = lambda self, x: self.norm(self.between(self.lin(x)))  # noqa: E731
        return Small(
            run, shape_of(rank, inputs), places(rank), lin=layer, between=between, norm=draw(norm_of(rank, outputs))
        )
    run = lambda self, x: self.lin(F.pad(self.between(self.norm(x.tanh())), (0, 4) * rank, "replicate"))  # noqa: E731
    return Small(
        run, shape_of(rank, inputs), places(rank), lin=layer, between=between, norm=draw(norm_of(rank, inputs))
    )


@st.composite
def flattened(draw):
    rank = draw(st.integers(1, 2))
    channels, axis = (
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["flatten", "view", "mean", "squeeze", "last", "channels last"])),
    )
    shape = shape_of(rank, channels)
    values = torch.Size(shape[2:]).numel()
    features = {"flatten": channels * values, "view": channels * values, "last": shape[-1]}.get(axis, channels)

    def run(self, x):
        h = self.between(self.norm(self.first(x)))
        match axis:
            case "flatten":
                h = h.flatten(1)
            case "view":
                h = h.view(h.shape[0], -1)
            case "mean":
                h = h.mean(list(range(2, h.ndim)))
            case "squeeze":
                h = F.adaptive_avg_pool1d(h.flatten(2), 1).squeeze(-1)
            case "channels last":
                h = h.flatten(2).permute(0, 2, 1)
        return self.lin(h)

    between = draw(st.sampled_from([nn.Identity(), nn.Dropout(), nn.ReLU(), nn.ReLU(inplace=True)]))
    lin = nn.Linear(features, draw(st.integers(1, 3)), bias=draw(flip))
    movable = places(rank) if axis in ("mean", "squeeze", "channels last") else ()
    return Small(run, shape, movable, first=nn.Sigmoid(), between=between, norm=draw(norm_of(rank, channels)), lin=lin)


@st.composite
def branches(draw):
    rank = draw(rank_of)
    kind = draw(
        st.sampled_from(["cat", "add", "iadd", "add scaled", "add constant", "self add", "cat twice", "cat batch"])
    )
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    make = (
        nn.Linear
        if rank == 0
        else lambda a, b, bias: CONVS[rank](a, b, draw(st.integers(1, 2)) * 2 - 1, bias=bias, padding="same")
    )
    a, b = make(inputs, outputs, bias=draw(flip)), make(inputs, outputs, bias=draw(flip))

    def run(self, x):
        left, right = self.a(x), self.b(x)
        match kind:
            case "cat":
                return self.norm(torch.cat([left, right], 1))
            case "cat twice":
                return self.norm(torch.cat([left, left], 1)), right
            case "cat batch":
                return self.norm(torch.cat([left, right], 0))
            case "add":
                return self.norm(left + right)
            case "iadd":
                left += right
                return self.norm(left)
            case "add scaled":
                return self.norm(torch.add(left, right, alpha=0.5))
            case "add constant":
                return self.norm(left + 1.5), right
        return self.norm(left + left), right

    channels = 2 * outputs if kind in ("cat", "cat twice") else outputs
    gone = kind in ("cat", "add", "iadd", "cat batch")
    return Small(run, shape_of(rank, inputs), places(rank), gone, a=a, b=b, norm=draw(norm_of(rank, channels)))


def loop(self, x):
    for _ in range(3):
        x = self.norm(self.a(x)).relu()
    return x


def two_norms(self, x):
    y = self.a(x)
    return self.norm(y), self.other(y)


def two_consumers(self, x):
    y = self.norm(self.a(x))
    return self.b(y), y.sigmoid()


def pre(self, x):
    h = self.norm(x.sigmoid())
    return self.a(h) + self.b(h.relu())


SHARED = {
    "conv": lambda self, x: (self.norm(self.a(x)), self.a(x.relu())),
    "norm": lambda self, x: (self.norm(self.a(x)), self.norm(self.b(x))),
    "both": lambda self, x: (self.norm(self.a(x)), self.norm(self.a(x.relu()))),
    "conv twice": lambda self, x: self.other(self.norm(self.a(self.a(x)))),
    "norm twice": lambda self, x: self.norm(self.norm(self.a(x))),
    "forward and back": lambda self, x: (self.b(self.norm(self.a(x).tanh())), self.norm(self.a(x))),
    "loop": loop,
    "two norms": two_norms,
    "two consumers": two_consumers,
    "pre": pre,
}


@st.composite
def shared(draw):
    """Return layers and norms that are called several times, and values that are read several times."""
    rank = draw(rank_of)
    channels = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(sorted(SHARED)))
    make = nn.Linear if rank == 0 else lambda a, b: CONVS[rank](a, b, 3, padding=1)
    return Small(
        SHARED[kind], shape_of(rank, channels), places(rank), kind in ("norm", "both", "loop", "two consumers"),
        a=make(channels, channels), b=make(channels, channels), norm=draw(norm_of(rank, channels)),
        other=draw(norm_of(rank, channels)),
    )  # fmt: skip


@st.composite
def deep(draw):
    """Return a chain: linear, norm, activation, norm, linear, norm, with a pool at times."""
    rank = draw(rank_of)
    first, inputs, middle = draw(linear(rank))
    second, _, outputs = draw(linear(rank, middle))
    stack = [first]
    stack += [draw(norm_of(rank, middle))] if draw(flip) else []
    stack += [draw(activation)] if draw(flip) else []
    stack += [draw(norm_of(rank, middle))] if draw(flip) else []
    stack += [second]
    stack += [draw(norm_of(rank, outputs))] if draw(flip) else []
    return Small(lambda self, x: self.stack(x), shape_of(rank, inputs), places(rank), stack=nn.Sequential(*stack))


@st.composite
def shuffled(draw):
    """Return channels that are shuffled, cut and joined between a linear layer and a norm."""
    groups, width = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    channels = groups * width
    kind = draw(st.sampled_from(["shuffle", "chunk", "flip", "unsqueeze", "slice", "stack", "pixels"]))

    def run(self, x):
        y = self.a(x)
        match kind:
            case "shuffle":
                n, c, h, w = y.shape
                y = y.view(n, groups, width, h, w).transpose(1, 2).reshape(n, c, h, w)
            case "chunk":
                y = torch.cat(y.chunk(2, 1)[::-1], 1)
            case "flip":
                y = y.flip(2)
            case "unsqueeze":
                y = y.unsqueeze(1).squeeze(1)
            case "slice":
                y = y[:, :, 1:]
            case "stack":
                y = torch.stack([y, y], 2).flatten(2, 3)
            case "pixels":
                y = F.pixel_unshuffle(F.pixel_shuffle(torch.cat([y] * 4, 1), 2), 2)[:, :channels]
        return self.b(self.norm(y).relu())

    gone = kind in ("shuffle", "unsqueeze")
    a, b = nn.Conv2d(2, channels, 1, bias=draw(flip)), nn.Conv2d(channels, 2, 3)
    return Small(run, (3, 2, 6, 5), (2, 3), gone, a=a, b=b, norm=draw(norm_of(2, channels)))


class Parallel(nn.Module):
    """Several small graphs side by side, each with an input of its own."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *inputs):
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]

    def inputs(self, seed, **sizes):
        generator = torch.Generator().manual_seed(seed)
        return tuple(part.input(generator, **sizes) for part in self.parts)


kinds = {
    "linear_norm": linear_norm, "norm_linear": norm_linear, "places": with_places_between, "flattened": flattened,
    "branches": branches, "shared": shared, "deep": deep, "shuffled": shuffled,
}  # fmt: skip
small = st.one_of(*(kind() for kind in kinds.values()))


def runs(part):
    """Say whether a graph that was drawn takes its own input, and other sizes of it."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for sizes in ({}, {"more": 2}):
                part.eval()(part.input(generator, **sizes).float())
    except RuntimeError:
        return False
    return True


def folded_together(model, example):
    """Fold, and where that fails say which of the graphs it is."""
    try:
        return bn.fold(model, example)
    except bn.BatchNormError as error:
        for part, x in zip(model.parts, example, strict=True):
            try:
                bn.fold(part, x)
            except bn.BatchNormError as alone:
                raise AssertionError(f"{alone}: {part}") from error
        raise


@ci(40)
@given(st.lists(small, min_size=12, max_size=12), st.integers(0, 2**16))
def test_small_graphs_compute_the_same_in_float64_for_all_sizes(parts, seed):
    model = trained(Parallel([part for part in parts if runs(part)]), seed).double()
    example = model.inputs(seed)
    result = folded_together(model, example)
    for sizes in ({}, {"batch": 1}, {"batch": 4}, {"more": 2}):
        inputs = model.inputs(seed + 1, **sizes)
        for part, folded, x in zip(model.parts, result.model.parts, inputs, strict=True):
            assert relative(results(folded, x), results(part, x)) <= 1e-12, (part, folded)
    for i, (part, folded, x) in enumerate(zip(model.parts, result.model.parts, example, strict=True)):
        assert norms_run(folded, x) == 0, (part, folded)
        kept = [k for k in result.kept if k.layer.startswith(f"parts.{i}.") and k.became != "unchanged"]
        assert not (part.gone and kept), (part, folded, kept)


# --- the dtypes ---------------------------------------------------------------------------------------------------


@ci(40)
@given(small, st.integers(0, 2**16), st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
def test_small_graphs_stay_within_rounding_in_their_own_dtype(part, seed, dtype):
    if not runs(part):
        return
    model = trained(part, seed).to(dtype)
    model64 = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    example = part.input(generator).to(dtype)
    result = bn.fold(model, example)
    for inputs in (example, part.input(generator, batch=1, more=2).to(dtype)):
        assert_own(results(result.model, inputs), results(model, inputs), results(model64, inputs.double()))
        assert norms_run(result.model, inputs) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gammas", [(1.0, -2.0, 0.0), (0.0, 0.0, 0.0), (-1.0, -0.5, -3.0)])
@pytest.mark.parametrize("order", ["backward", "forward", "border"])
def test_every_sign_of_gamma_in_every_direction(dtype, gammas, order):
    norm, conv = nn.BatchNorm1d(3), nn.Conv1d(3, 3, 3, padding=int(order == "border"))
    model = trained(nn.Sequential(conv, norm) if order == "backward" else nn.Sequential(nn.Tanh(), norm, conv))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gammas))
    result = judged(
        model.to(dtype), torch.randn(2, 3, 6, dtype=torch.float32).to(dtype), torch.randn(1, 3, 9).to(dtype)
    )
    zero_stands_for_nothing = order == "border" and 0.0 in gammas
    assert [k.became for k in result.kept] == ["scale and shift"] * zero_stands_for_nothing


def test_statistics_in_float32_beside_weights_in_half():
    model = trained(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)))
    model[0].half()
    x = torch.randn(2, 3, 6).half()
    with torch.no_grad():
        assert model(x).dtype is torch.float16
    result = bn.fold(model, x)
    assert names(result.folded) == ["1"]
    assert result.model[0].weight.dtype is torch.float16
    wide = copy.deepcopy(model).double()
    assert_own(results(result.model, x), results(model, x), results(wide, x.double()))


def test_means_far_from_zero_are_folded():
    """Both ways round: a mean of ten thousand deviations costs the digits it costs without folding."""
    for layers in ([nn.BatchNorm1d(8), nn.Linear(8, 4)], [nn.Linear(8, 4), nn.BatchNorm1d(4)]):
        model = trained(nn.Sequential(*layers))
        norm = next(m for m in model if isinstance(m, nn.BatchNorm1d))
        with torch.no_grad():
            norm.running_mean += 1e4
        result = bn.fold(model, torch.randn(16, 8) + 1e4)
        assert len(result.folded) == 1


# --- the result ---------------------------------------------------------------------------------------------------


class Example(nn.Module):
    """A block of each kind: folded backward, folded forward with a border, a scale and shift, never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act = nn.Sigmoid()
        self.pre = nn.BatchNorm2d(4)
        self.next = nn.Conv2d(4, 4, 3, padding=1)
        self.post = nn.BatchNorm2d(4)
        self.spare = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()

    def forward(self, x):
        x = self.act(self.bn1(self.conv(x)))
        return self.post(self.act(self.drop(self.next(self.pre(x)))))


@pytest.fixture
def model():
    return trained(Example())


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def test_every_norm_is_listed_exactly_once(model, x):
    result = judged(model, x, x[:1, :, :7])
    assert [(f.layer, f.into) for f in result.folded] == [("bn1", ("conv",)), ("pre", ("next",))]
    assert [f.how.split(",")[0] for f in result.folded] == ["backward", "forward"]
    assert [(k.layer, k.became) for k in result.kept] == [("post", "scale and shift"), ("spare", "unchanged")]


def test_the_result_prints_as_a_table(model, x):
    lines = str(bn.fold(model, x)).splitlines()
    assert lines[0].split() == ["Layer", "Became", "How,", "or", "why", "not"]
    assert lines[2] == "bn1    folded           backward into conv"
    assert lines[3] == "pre    folded           forward, padding with the value that it maps to zero, into next"
    assert lines[4].startswith(
        "post   scale and shift  act (activation) is neither linear nor commutes with a scale and shift; "
    )
    assert lines[5].startswith("spare  unchanged        it was not called on the example")
    assert lines[7] == "4 normalization layers: 2 folded, 1 became a scale and shift, 1 unchanged"
    assert [line.split(":")[0] for line in lines[8:12]] == [
        "float64, example inputs", "float64, random inputs", "float32, example inputs", "float32, random inputs",
    ]  # fmt: skip


def test_the_error_is_what_it_says(model, x):
    result = bn.fold(model, x)
    own = next(m for m in result.error.measured if (m.inputs, m.precision) == ("example", "float32"))
    with torch.no_grad():
        before, after = model(x).double(), result.model(x).double()
    assert own.absolute == float((after - before).abs().max())
    assert own.relative == pytest.approx(own.absolute / float(before.abs().max()))
    assert [(m.inputs, m.precision) for m in result.error.measured] == [
        ("example", "float64"), ("random", "float64"), ("example", "float32"), ("random", "float32"),
    ]  # fmt: skip
    assert all(0 <= m.relative <= m.bound for m in result.error.measured)
    assert float(result.error) == max(m.relative for m in result.error.measured if m.precision == "float64") <= 1e-12
    assert result.error.relative == max(m.relative for m in result.error.measured if m.precision == "float32")
    assert result.error.absolute >= own.absolute
    assert result.error.note == ""


def test_a_model_in_float64_is_measured_in_float64(model, x):
    error = bn.fold(model.double(), x.double()).error
    assert {m.precision for m in error.measured} == {"float64"}
    assert error.relative == float(error)


def test_the_state_is_the_old_one_without_the_norms(model, x):
    folded = bn.fold(model, x).model
    norms = ("bn1.", "pre.", "post.")
    expected = {k for k in model.state_dict() if not k.startswith(norms)} | {
        "conv.bias",
        "pre.value",
        "post.weight",
        "post.bias",
    }
    assert set(folded.state_dict()) == expected
    for key, v in folded.state_dict().items():
        assert v.dtype is torch.float32 or key.endswith("num_batches_tracked")
        if key in model.state_dict() and not key.startswith(norms):
            assert v.shape == model.state_dict()[key].shape


def test_classes_names_and_modes_of_modules_stay(model, x):
    model.drop.train()
    model.next.weight.requires_grad_(False)
    folded = bn.fold(model, x).model
    assert type(folded) is Example
    assert [name for name, _ in folded.named_children()] == [name for name, _ in model.named_children()]
    assert [m.training for m in folded.children()] == [m.training for m in model.children()]
    kept = {"conv", "act", "next", "spare", "drop"}
    assert all(type(getattr(folded, name)) is type(getattr(model, name)) for name in kept)
    assert type(folded.bn1) is nn.Identity
    assert not folded.next.weight.requires_grad
    assert folded.conv.bias.requires_grad
    assert all(isinstance(p, nn.Parameter) for p in folded.parameters())


def test_folding_again_changes_nothing(model, x):
    once = bn.fold(model, x).model
    twice = bn.fold(once, x)
    assert names(twice.kept) == ["spare"]
    assert twice.folded == ()
    assert relative(results(twice.model, x), results(once, x)) == 0


def test_folding_in_place_changes_the_model_itself(model, x):
    expected, conv, weight = results(model, x), model.conv, model.conv.weight
    result = bn.fold(model, x, inplace=True)
    assert result.model is model
    assert model.conv is conv
    assert model.conv.weight is weight
    assert relative(results(model, x), expected) < 1e-5
    assert norms_run(model, x) == 0
    assert set(model.state_dict()) == set(bn.fold(trained(Example()), x).model.state_dict())


def test_a_folded_model_can_be_copied_pickled_and_loaded(model, x, tmp_path):
    import pickle

    folded = bn.fold(model, x).model
    expected = results(folded, x)
    assert relative(results(copy.deepcopy(folded), x), expected) == 0
    assert relative(results(pickle.loads(pickle.dumps(folded)), x), expected) == 0
    torch.save(folded.state_dict(), tmp_path / "weights.pt")
    fresh = bn.fold(trained(Example(), 5), x).model
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert relative(results(fresh, x), expected) == 0


def test_a_folded_model_is_exported_compiled_and_scripted(model, x):
    folded = bn.fold(model, x).model
    expected = results(folded, x)
    program = torch.export.export(
        folded, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    )
    more = torch.randn(5, 3, 10, 8)
    with torch.no_grad():
        assert relative([program.module()(more)], results(folded, more)) < 1e-6
        assert relative([torch.compile(folded, backend="eager", fullgraph=True)(x)], expected) < 1e-6
        assert relative([torch.jit.trace(folded, x)(x)], expected) < 1e-6
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_a_folded_model_is_exported_to_onnx(model, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    folded = bn.fold(model, x).model
    program = torch.onnx.export(folded, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative([torch.from_numpy(got)], results(folded, x)) < 1e-5
    assert "BatchNormalization" not in {node.op_type for node in program.model_proto.graph.node}


def test_a_folded_model_trains(model, x):
    folded = bn.fold(model, x).model.train()
    before = {k: v.clone() for k, v in folded.named_parameters()}
    optimizer = torch.optim.SGD(folded.parameters(), 0.1)
    (folded(x) * torch.randn(2, 4, 6, 6)).sum().backward()
    optimizer.step()
    moved = {k for k, v in folded.named_parameters() if not torch.equal(v, before[k])}
    assert {"conv.weight", "conv.bias", "next.weight", "next.bias"} <= moved
    assert all(p.grad is None for p in model.parameters())
