"""Folding models in every style they are written in: functions, graphs, exported programs, wrappers, layers of this library."""

import copy
import io
import operator
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

import batchnorm as bn
from batchnorm import torch as bt
from batchnorm.models import adapt
from batchnorm.torch.recording import record
from test_torch_fold import Small, judged, names, norms_run, relative, results, trained

X = torch.linspace(-2, 2, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6).sin()
Y = torch.linspace(-1, 3, 3 * 3 * 8 * 7).reshape(3, 3, 8, 7).cos()


def layers(**more):
    return {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "last": nn.Conv2d(4, 2, 1), **more}


def net(run, **more):
    return trained(Small(run, X.shape, **layers(**more)))


class Named(nn.Module):
    """A model in a class, which `torch.fx` can trace."""

    def __init__(self, **more):
        super().__init__()
        for name, layer in layers(**more).items():
            setattr(self, name, layer)


def function(self, x, **options):
    norm = self.norm
    return F.batch_norm(
        self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps, **options
    )


# --- norms as functions -------------------------------------------------------------------------------------------


class Functional(Named):
    def forward(self, x):
        return self.last(function(self, x).relu())


class Keywords(Named):
    def forward(self, x):
        n = self.norm
        return F.batch_norm(
            bias=n.bias, running_mean=n.running_mean, running_var=n.running_var, input=self.conv(x), weight=n.weight
        )


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.tensor([0.3, -0.2, 0.5, 1.0]))
        self.register_buffer("var", torch.tensor([0.5, 2.0, 1.0, 0.7]))

    def forward(self, x):
        return F.batch_norm(self.conv(x), self.mean, self.var)


class Twice(Named):
    def forward(self, x):
        n, y = self.norm, function(self, x)
        return F.batch_norm(y.relu(), n.running_mean, n.running_var).sum(1, keepdim=True) + self.last(y)


class Optional(Named):
    def forward(self, x, scale=None, flag=True):
        return self.last(function(self, x))


class Whole(nn.Module):
    """Nothing but a function, and no parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3, -0.2, 0.5]))
        self.register_buffer("var", torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var).relu()


class Both(Named):
    def forward(self, x):
        return self.norm(function(self, x).tanh())


@pytest.mark.parametrize("make", [Functional, Keywords, Buffers, Optional])
def test_a_norm_that_is_called_as_a_function_is_folded(make):
    model = trained(make())
    result = judged(model, X, Y)
    assert result.kept == ()
    assert len(result.folded) == 1
    assert norms_run(result.model, X) == 0
    assert not any("running" in k for k in result.model.state_dict())


@pytest.mark.parametrize("make", [Twice, Whole, Both])
def test_functions_that_can_not_be_absorbed_become_scales_and_shifts(make):
    result = judged(trained(make()), X, Y)
    assert norms_run(result.model, X) == 0
    assert "scale and shift" in [k.became for k in result.kept]


def test_a_function_inside_of_a_block_is_folded_and_the_rest_keeps_its_classes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                [Functional(), nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), Functional()]
            )

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    result = judged(trained(Net()), X, Y)
    assert result.kept == ()
    assert len(result.folded) == 3
    assert type(result.model).__name__ == "Net"
    assert type(result.model.blocks[1]) is nn.Sequential
    assert norms_run(result.model, X) == 0


class Untraceable(Named):
    def forward(self, x):
        if x.shape[0] > 0:
            x = function(self, x)
        return x


def test_a_function_that_can_not_be_traced_is_left_with_a_reason():
    result = judged(trained(Untraceable()), X, Y)
    assert result.folded == ()
    assert "calls batch_norm as a function" in result.kept[0].reason
    assert result.kept[0].became == "unchanged"


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps) * 2.0


class OwnBranch(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        return y.relu() if x.shape[1] == 4 else y


@pytest.mark.parametrize("norm", [OwnForward, OwnBranch])
def test_a_subclass_with_a_forward_of_its_own_keeps_what_else_it_does(norm):
    result = judged(net(lambda self, x: self.last(self.norm(self.conv(x))), norm=norm(4)), X, Y)
    assert names(result.folded) + names(result.kept) == ["norm"]
    if norm is OwnBranch:
        assert "forward of its own" in result.kept[0].reason
        assert type(result.model.norm) is OwnBranch


class Subclass(nn.BatchNorm2d):
    """Nothing but another name."""


@pytest.mark.filterwarnings("ignore:.*SyncBatchNorm.*")
@pytest.mark.parametrize("norm", [Subclass(4), nn.SyncBatchNorm(4), bt.BatchNorm2d(4)])
def test_other_classes_of_norms_are_folded(norm):
    result = judged(net(lambda self, x: self.norm(self.conv(x)), norm=norm), X, Y)
    assert names(result.folded) == ["norm"]
    assert type(result.model.norm) is nn.Identity


class Frozen(nn.Module):
    """A norm in plain arithmetic, as detectors have it."""

    def __init__(self, channels, *, swapped=False, inplace=False):
        super().__init__()
        self.swapped, self.inplace, self.eps = swapped, inplace, 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        if self.swapped:
            y = (x - self.running_mean[:, None, None]) / (self.running_var[:, None, None] + self.eps).sqrt()
            return self.bias[:, None, None] + self.weight[:, None, None] * y
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return x.mul_(scale).add_(shift) if self.inplace else x * scale + shift


@pytest.mark.parametrize("options", [{}, {"swapped": True}, {"inplace": True}])
def test_a_frozen_norm_in_plain_arithmetic_is_folded(options):
    model = net(lambda self, x: self.last(self.norm(self.conv(x)).relu()), norm=Frozen(4, **options))
    result = judged(model, X, Y)
    assert names(result.folded) == ["norm"]
    assert type(result.model.norm) is nn.Identity


class FrozenClamped(Frozen):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class FrozenAndMore(Frozen):
    def forward(self, x):
        y = super().forward(x)
        return y * (1 + x.mean())


@pytest.mark.parametrize("norm", [FrozenClamped, FrozenAndMore])
def test_a_frozen_norm_that_does_more_is_left_alone(norm):
    result = judged(net(lambda self, x: self.norm(self.conv(x)), norm=norm(4)), X, Y)
    assert result.folded == ()
    assert type(result.model.norm) is norm


# --- styles of modules --------------------------------------------------------------------------------------------


@dataclass
class Output:
    y: torch.Tensor
    more: dict


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"y": y, "more": [y.relu()]}, lambda y: Output(y, {"z": y.relu()}), lambda y: Pair(y, y * 2),
        lambda y: OrderedDict(y=y), lambda y: [y, (y, None, 3)],
    ],
)  # fmt: skip
def test_outputs_of_every_kind_of_container(wrap):
    model = net(lambda self, x: wrap(self.last(self.norm(self.conv(x)).relu())))
    result = bn.fold(model, X)
    assert names(result.folded) == ["norm"]
    with torch.no_grad():
        got, expected = result.model(X), model(X)
    assert type(got) is type(expected)
    find = lambda o: o.y if isinstance(o, Output) else o  # noqa: E731
    got, expected = (torch.utils._pytree.tree_leaves(find(v)) for v in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b)
        assert not isinstance(a, torch.Tensor) or torch.allclose(a, b, atol=1e-5)


def test_containers_of_modules_nested_in_each_other():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3, bias=False), norm=nn.BatchNorm2d(4)))
            self.heads = nn.ModuleDict(
                {"a": nn.Conv2d(4, 2, 1), "b": nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))}
            )
            self.rest = nn.ModuleList([nn.ModuleList([nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)]) for _ in range(2)])

        def forward(self, x):
            x = self.stem(x).relu()
            y = {name: head(x) for name, head in self.heads.items()}
            for conv, norm in self.rest:
                y["a"] = norm(conv(y["a"])) + y["a"]
            return y

    result = judged(trained(Net()), X, Y)
    assert names(result.folded) == ["stem.norm", "heads.b.0", "rest.0.1", "rest.1.1"]
    assert result.kept == ()
    assert "stem.conv.bias" in result.model.state_dict()


def test_several_inputs_by_position_and_by_name():
    run = lambda self, x, y=None, *, z=1.0: self.norm(self.conv(x)) + (0 if y is None else y[:, :4, :4, :4]) * z  # noqa: E731

    class Net(Named):
        def forward(self, x, y=None, *, z=1.0):
            return run(self, x, y, z=z)

    other = torch.ones(2, 4, 4, 4)
    for example in ((X,), (X, other), {"x": X}, {"x": X, "y": other, "z": 2.0}):
        assert names(judged(trained(Net()), example).folded) == ["norm"]


def test_control_flow_on_shapes_takes_the_way_of_the_example():
    def run(self, x):
        for _ in range(x.shape[-1] // 3):
            x = self.norm(self.same(x)).relu()
        return x

    model = net(run, same=nn.Conv2d(4, 4, 3, padding=1))
    assert names(judged(model, torch.randn(1, 4, 6, 6), torch.randn(2, 4, 9, 9)).folded) == ["norm"]


def test_the_same_module_under_two_names_is_replaced_under_both():
    model = net(lambda self, x: self.other(self.conv2(self.norm(self.conv(x)))), conv2=nn.Conv2d(4, 4, 1))
    model.other = model.norm
    result = judged(model, X, Y)
    assert names(result.folded) == ["norm"]
    assert result.model.other is result.model.norm


def test_a_norm_is_the_model_itself():
    result = judged(trained(nn.BatchNorm2d(3)), X, Y)
    assert [k.became for k in result.kept] == ["scale and shift"]
    assert norms_run(result.model, X) == 0


def test_a_model_without_norms_comes_back_as_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()).eval()
    result = bn.fold(model, X)
    assert result.folded == result.kept == ()
    assert result.model is not model
    assert relative(results(result.model, X), results(model, X)) == 0


def test_a_model_of_a_data_parallel_wrapper():
    result = judged(nn.DataParallel(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))), X, Y)
    assert names(result.folded) == ["module.1"]


def test_a_compiled_model():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    result = bn.fold(torch.compile(model, backend="eager"), X)
    assert len(result.folded) == 1
    assert relative(results(result.model, X), results(model, X)) < 1e-5


def test_a_checkpointed_block_is_folded():
    run = lambda self, x: torch.utils.checkpoint.checkpoint(lambda v: self.norm(self.conv(v)), x, use_reentrant=False)  # noqa: E731
    assert names(judged(net(run), X, Y).folded) == ["norm"]


def test_calls_of_forward_itself_compute_the_same():
    result = judged(net(lambda self, x: self.norm.forward(self.conv.forward(x))), X, Y)
    assert names(result.folded) + names(result.kept) in (["norm"], ["batch_norm"], ["batch_norm", "norm"])


def test_a_script_module_inside_is_left_alone():
    inner = torch.jit.script(trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())))
    model = net(lambda self, x: self.norm(self.inner(x)), inner=inner)
    model.eval()
    result = bn.fold(model, X)
    assert relative(results(result.model, X), results(model, X)) < 1e-5
    assert "norm" in names(result.kept) + names(result.folded)


def test_attention_recurrence_and_embeddings_beside_norms():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.pre = nn.Embedding(7, 4), nn.BatchNorm1d(4)
            self.attention, self.lstm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 4, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.norm, self.head, self.post = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, tokens):
            x = self.pre(self.table(tokens).transpose(1, 2)).transpose(1, 2)
            x = x + self.attention(x, x, x)[0]
            x = self.encoder(self.lstm(x)[0])
            return self.post(self.head(self.norm(x.mean(1))))

    model = Net()
    state = copy.deepcopy(model.encoder.state_dict())
    trained(model).encoder.load_state_dict(state)
    result = judged(model, torch.arange(12).reshape(2, 6) % 7, torch.arange(15).reshape(3, 5) % 7)
    assert names(result.folded) == ["norm", "post"]
    assert [k.became for k in result.kept] == ["scale and shift"]
    assert norms_run(result.model, torch.arange(12).reshape(2, 6) % 7) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 4, 5, 3)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_linear_layer_on_inputs_of_every_rank(bias, shape, contiguous):
    def run(self, x):
        x = x if contiguous else x.transpose(0, -2).contiguous().transpose(0, -2)
        y = self.lin(x).movedim(-1, 1)
        return self.last(self.norm(y.flatten(2) if y.ndim > 2 else y).flatten(2).movedim(1, -1))

    lin, last = nn.Linear(3, 4, bias=bias), nn.Linear(4, 2, bias=bias)
    model = trained(Small(run, shape, lin=lin, last=last, norm=nn.BatchNorm1d(4)))
    if len(shape) == 2:
        model.run = lambda self, x: self.last(self.norm(self.lin(x)))
    result = judged(model, torch.randn(shape), torch.randn(1, *shape[1:]))
    assert names(result.folded) == ["norm"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_before_a_linear_layer_on_a_sequence(bias):
    run = lambda self, x: self.lin(self.norm(x.sigmoid()).transpose(1, 2))  # noqa: E731
    model = trained(Small(run, (3, 4, 5), lin=nn.Linear(4, 2, bias=bias), norm=nn.BatchNorm1d(4)))
    assert names(judged(model, torch.randn(3, 4, 5), torch.randn(1, 4, 7)).folded) == ["norm"]


def test_channels_last_stays():
    model = net(lambda self, x: self.last(self.norm(self.conv(x)))).to(memory_format=torch.channels_last)
    result = judged(model, X.contiguous(memory_format=torch.channels_last), Y)
    assert names(result.folded) == ["norm"]
    assert result.model.conv.weight.is_contiguous(memory_format=torch.channels_last)


# --- layers of this library ---------------------------------------------------------------------------------------

OPTIONS = {
    "activation": {"activation": "relu"}, "silu": {"activation": "silu"}, "wide": {"wide_statistics": True},
    "domains": {"domains": ["target"]}, "debias": {"debias": True}, "ghost": {"virtual_batch_size": 2},
    "renorm": {"renorm": True},
    "single": {"on_single": "skip"}, "biased": {"unbiased": False}, "total": {"total_variance": True},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_our_layers_are_folded_and_their_activation_stays(options):
    model = net(lambda self, x: self.last(self.norm(self.conv(x))), norm=bt.BatchNorm2d(4, **options))
    result = judged(model, X, Y)
    assert names(result.folded) == ["norm"]
    assert norms_run(result.model, X) == 0


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("named", [True, False])
def test_a_residual_is_still_added(activation, named):
    def run(self, x):
        h = self.conv(x)
        y = self.conv2(h.tanh())
        return self.norm(y, residual=h) if named else self.norm(y, None, None, h)

    model = net(run, conv2=nn.Conv2d(4, 4, 1), norm=bt.BatchNorm2d(4, activation=activation))
    result = judged(model, X, Y)
    assert names(result.folded) == ["norm"]


def test_the_chosen_domain_is_the_one_that_is_folded():
    model = net(lambda self, x: self.norm(self.conv(x)), norm=bt.BatchNorm2d(4, domains=["target"]))
    with torch.no_grad():
        model.norm.running_mean_target += 3
    with bt.domain(model, "target"):
        expected = results(model, X)
        result = bn.fold(model, X)
    assert relative(results(result.model, X), expected) < 1e-5
    assert relative(results(bn.fold(model, X).model, X), results(model, X)) < 1e-5


def test_a_frozen_layer_in_training_mode_is_a_fixed_map():
    model = bt.freeze(net(lambda self, x: self.norm(self.conv(x)), norm=bt.BatchNorm2d(4)))
    assert names(judged(model, X, Y).folded) == ["norm"]


# --- graphs of torch.fx -------------------------------------------------------------------------------------------


class Traceable(Named):
    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu())


@pytest.mark.parametrize("make", [Traceable, Functional, Keywords, Twice, Buffers])
def test_a_traced_module_is_folded(make):
    model = fx.symbolic_trace(trained(make()))
    result = judged(model, X, Y)
    assert isinstance(result.model, fx.GraphModule)
    assert norms_run(result.model, X) == 0
    result.model.graph.lint()


def test_a_traced_module_that_calls_a_functional_convolution_is_given_a_bias():
    class Net(Named):
        def forward(self, x):
            return self.norm(F.conv2d(x, self.conv.weight, stride=2, groups=1))

    model = fx.symbolic_trace(trained(Net(conv=nn.Conv2d(3, 4, 3, bias=False))))
    result = judged(model, X, Y)
    assert norms_run(result.model, X) == 0
    assert names(result.folded) + names(result.kept) == ["norm"]


def relu_norm(x, mean, var):
    return F.relu(F.batch_norm(x, mean, var))


fx.wrap("relu_norm")


def test_a_function_that_hides_a_norm_in_a_graph_is_left_whole():
    class Net(Named):
        def forward(self, x):
            return self.last(relu_norm(self.conv(x), self.norm.running_mean, self.norm.running_var))

    result = judged(fx.symbolic_trace(trained(Net())), X, Y)
    assert result.folded == ()
    assert any(node.target is relu_norm for node in result.model.graph.nodes)


def test_a_graph_that_reads_the_statistics_twice_keeps_them():
    class Net(Named):
        def forward(self, x):
            return self.last(function(self, x)) * self.norm.running_var.sum()

    result = judged(fx.symbolic_trace(trained(Net())), X, Y)
    assert norms_run(result.model, X) == 0


# --- exported programs --------------------------------------------------------------------------------------------


def exported(model, *args, shapes=None, **kwargs):
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def saved(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def norm_nodes(program):
    return [node for node in program.graph.nodes if node.op == "call_function" and "batch_norm" in str(node.target)]


def assert_program(result, model, *calls):
    assert isinstance(result.model, torch.export.ExportedProgram)
    again = saved(result.model)
    for args, kwargs in calls:
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
            for program in (result.model, again):
                assert relative(torch.utils._pytree.tree_leaves(program.module()(*args, **kwargs)), expected) < 1e-5
    assert norm_nodes(result.model) == []


@pytest.mark.parametrize("make", [Traceable, Functional, Buffers, Untraceable])
def test_an_exported_program_is_folded(make):
    model = trained(make())
    program = exported(model, X)
    assert len(norm_nodes(program)) == 1
    for example in (None, X, (X,)):
        result = bn.fold(program, example)
        assert_program(result, model, ((X,), {}))
        assert len(result.folded) == 1
    assert len(norm_nodes(program)) == 1


def test_dynamic_sizes_stay_dynamic_and_keep_their_range():
    model = trained(Traceable())
    batch = torch.export.Dim("batch", min=1, max=16)
    program = exported(model, X, shapes=({0: batch, 2: torch.export.Dim.DYNAMIC},))
    result = bn.fold(program)
    assert_program(result, model, ((X,), {}), ((X[:, :, :5].repeat(4, 1, 1, 1),), {}))
    (shape,) = [node.meta["val"].shape for node in result.model.graph.nodes if node.name == "x"]
    assert [isinstance(n, torch.SymInt) for n in shape] == [True, False, True, False]
    with pytest.raises((RuntimeError, AssertionError)):
        result.model.module()(X.repeat(9, 1, 1, 1))


def test_named_inputs_and_several_outputs_of_a_program():
    class Net(Named):
        def forward(self, x, *, y, scale: float = 1.0):
            h = self.norm(self.conv(x))
            return {"a": self.last(h.relu()), "b": [h + y, y]}

    model, y = trained(Net()), torch.ones(2, 4, 4, 4)
    program = exported(model, X, y=y)
    assert_program(bn.fold(program), model, ((X,), {"y": y}))
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}, "y": {0: torch.export.Dim.DYNAMIC}}
    result = bn.fold(exported(model, X, y=y, shapes=shapes))
    assert_program(result, model, ((X,), {"y": y}), ((X[:, :].repeat(3, 1, 1, 1),), {"y": y.repeat(3, 1, 1, 1)}))


def test_a_nested_input_of_a_program():
    class Net(Named):
        def forward(self, inputs):
            return self.norm(self.conv(inputs["x"])) + inputs["more"][0]

    model, inputs = trained(Net()), {"x": X, "more": [torch.ones(())]}
    assert_program(bn.fold(exported(model, inputs)), model, ((inputs,), {}))


def test_a_convolution_without_a_bias_in_a_program():
    model = trained(Traceable(conv=nn.Conv2d(3, 4, 3, bias=False)))
    result = bn.fold(exported(model, X))
    assert_program(result, model, ((X,), {}))
    assert result.kept == ()


def test_a_program_that_was_decomposed_is_folded():
    model = trained(Traceable(conv=nn.Conv2d(3, 4, 3, bias=False)))
    result = bn.fold(exported(model, X).run_decompositions())
    assert_program(result, model, ((X,), {}))


def test_a_program_with_a_norm_after_an_activation_has_a_scale_and_shift():
    model = net(lambda self, x: self.norm(self.conv(x).sigmoid()))
    result = bn.fold(exported(model, X))
    assert_program(result, model, ((X,), {}))
    assert [k.became for k in result.kept] == ["scale and shift"]


def test_a_program_in_training_mode_is_left_unchanged():
    model = net(lambda self, x: self.norm(self.conv(x))).train()
    result = bn.fold(exported(model, X), X)
    assert result.folded == ()
    assert result.kept[0].became == "unchanged"
    assert "by the statistics of the batch" in result.kept[0].reason


def test_a_program_is_not_changed_in_place():
    with pytest.raises(bn.BatchNormError, match="use the model of the result"):
        bn.fold(exported(trained(Traceable()), X), inplace=True)


def test_getitem_of_several_outputs_survives_in_a_graph():
    class Net(Named):
        def forward(self, x):
            a, b = self.last(self.norm(self.conv(x))).chunk(2, 1)
            return operator.add(a, b), a

    assert names(judged(fx.symbolic_trace(trained(Net())), X, Y).folded) == ["norm"]


def test_a_picture_of_a_deep_network_prints_short():
    """Whoever looks at one with a debugger sees a line for each node, not every path through the network."""
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(40)]).eval()
    view = adapt(model)
    graph = view.graph(torch.randn(1, 3, 4, 4))
    assert len(repr(graph.nodes)) < 1000 * len(graph.nodes)
    assert len(repr(record(model, torch.randn(1, 3, 4, 4)))) < 10_000 * len(graph.nodes)
