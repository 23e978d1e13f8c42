"""A layer in another framework: the same evaluation, the same running statistics after more training, there and back."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import re
import sys
import warnings
from itertools import product

import flax
import jax
import jax.numpy as jnp
import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from flax import linen, nnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import batchnorm as bn
import batchnorm.keras
import batchnorm.torch
from batchnorm.bench.zoo import open_torchvision
from batchnorm.errors import BatchNormWarning, OptionError
from batchnorm.flax import FlaxLayer
from batchnorm.portable import complement

C = 3
SHAPE = (6, C, 4, 2)
ULPS = 64 * 2.0**-23


def batches(count, shape=SHAPE, seed=7):
    rng = np.random.default_rng(seed)
    return [(3 * rng.standard_normal(shape) + rng.standard_normal((1, C, *[1] * (len(shape) - 2)))).astype(np.float32)
            for _ in range(count)]  # fmt: skip


def vectors(seed):
    """γ, β, mean, variance; none of them as a layer starts."""
    rng = np.random.default_rng(seed)
    gamma, beta, mean = rng.standard_normal((3, C)).astype(np.float32)
    return gamma, beta, mean, rng.uniform(0.3, 4, C).astype(np.float32)


class Torch:
    """Channels are on axis 1."""

    unbiased = True

    @staticmethod
    def make(eps, decay, scale, center, numbers, cls=nn.BatchNorm2d, **options):
        gamma, beta, mean, variance = map(torch.from_numpy, numbers)
        layer = cls(C, eps, complement(decay), affine=scale, bias=center, **options)
        with torch.no_grad():
            for tensor, values in (
                (layer.weight, gamma), (layer.bias, beta), (layer.running_mean, mean), (layer.running_var, variance)
            ):  # fmt: skip
                if tensor is not None:
                    tensor.copy_(values)
        return layer

    @staticmethod
    def evaluate(layer, x):
        with torch.no_grad():
            return layer.eval()(torch.from_numpy(x)).numpy()

    @staticmethod
    def train(layer, data):
        layer.train()
        for x in data:
            layer(torch.from_numpy(x))
        return layer

    @staticmethod
    def stored(layer):
        held = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        return [None if v is None else v.detach().numpy().copy() for v in held]


class Keras:
    """Channels are on the last axis."""

    unbiased = False

    @staticmethod
    def make(eps, decay, scale, center, numbers, cls=keras.layers.BatchNormalization, **options):
        layer = cls(momentum=decay, epsilon=eps, scale=scale, center=center, **options)
        layer.build((None, None, None, C))
        for variable, values in zip(
            (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance), numbers, strict=True
        ):
            if variable is not None:
                variable.assign(values)
        return layer

    @staticmethod
    def evaluate(layer, x):
        return np.moveaxis(layer(np.moveaxis(x, 1, -1), training=False).detach().numpy(), -1, 1)

    @staticmethod
    def train(layer, data):
        for x in data:
            layer(np.moveaxis(x, 1, -1), training=True)
        return layer

    @staticmethod
    def stored(layer):
        held = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
        return [None if v is None else v.value.detach().numpy().copy() for v in held]


class Linen:
    """Channels are on the last axis."""

    unbiased = False

    @staticmethod
    def make(eps, decay, scale, center, numbers, **options):
        module = linen.BatchNorm(epsilon=eps, momentum=decay, use_scale=scale, use_bias=center, **options)
        gamma, beta, mean, variance = map(jnp.asarray, numbers)
        parameters = {name: v for name, v, used in (("scale", gamma, scale), ("bias", beta, center)) if used}
        return FlaxLayer(module, {"params": parameters, "batch_stats": {"mean": mean, "var": variance}})

    @staticmethod
    def evaluate(layer, x):
        y = layer.module.apply(layer.variables, np.moveaxis(x, 1, -1), use_running_average=True)
        return np.moveaxis(np.asarray(y), -1, 1)

    @staticmethod
    def train(layer, data):
        variables = layer.variables
        for x in data:
            _, moved = layer.module.apply(
                variables, np.moveaxis(x, 1, -1), use_running_average=False, mutable=["batch_stats"]
            )
            variables = {**variables, **moved}
        return FlaxLayer(layer.module, variables)

    @staticmethod
    def stored(layer):
        parameters, statistics = layer.variables.get("params", {}), layer.variables["batch_stats"]
        held = (parameters.get("scale"), parameters.get("bias"), statistics["mean"], statistics["var"])
        return [None if v is None else np.asarray(v) for v in held]


class Nnx:
    """Channels are on the last axis."""

    unbiased = False

    @staticmethod
    def make(eps, decay, scale, center, numbers, **options):
        layer = nnx.BatchNorm(
            C, epsilon=eps, momentum=decay, use_scale=scale, use_bias=center, rngs=nnx.Rngs(0), **options
        )
        for variable, values in zip((layer.scale, layer.bias, layer.mean, layer.var), numbers, strict=True):
            if variable is not None:
                variable[...] = jnp.asarray(values)
        return layer

    @staticmethod
    def evaluate(layer, x):
        return np.moveaxis(np.asarray(layer(np.moveaxis(x, 1, -1), use_running_average=True)), -1, 1)

    @staticmethod
    def train(layer, data):
        for x in data:
            layer(np.moveaxis(x, 1, -1), use_running_average=False)
        return layer

    @staticmethod
    def stored(layer):
        held = (layer.scale, layer.bias, layer.mean, layer.var)
        return [None if v is None else np.asarray(v[...]) for v in held]


class Onnx:
    """Channels are on axis 1; it only infers."""

    unbiased = False

    @staticmethod
    def make(eps, decay, scale, center, numbers):
        gamma, beta, mean, variance = numbers
        gamma, beta = gamma if scale else np.ones_like(gamma), beta if center else np.zeros_like(beta)
        held = [numpy_helper.from_array(v, n) for n, v in zip("gbmv", (gamma, beta, mean, variance), strict=True)]
        node = helper.make_node("BatchNormalization", ["a", *"gbmv"], ["z"], "norm", epsilon=eps, momentum=decay)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", C, "H", "W"]) for name in "az"]
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], held)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)

    @staticmethod
    def evaluate(model, x):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {model.graph.input[0].name: x})[0]

    @staticmethod
    def stored(model):
        node = model.graph.node[0]
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        return [held[name] for name in node.input[1:]]


SIDES = {"torch": Torch, "keras": Keras, "flax": Linen, "nnx": Nnx, "onnx": Onnx}
CASES = {
    "usual": {"eps": 1e-5, "decay": 0.9, "scale": True, "center": True},
    "slow": {"eps": 1e-3, "decay": 0.99, "scale": True, "center": True},
    "bare": {"eps": 0.02, "decay": 0.6, "scale": False, "center": False},
    "no shift": {"eps": 1e-3, "decay": 0.75, "scale": True, "center": False},
    "no scale": {"eps": 1e-4, "decay": 0.3, "scale": False, "center": True},
}
PAIRS = [
    pytest.param(home, to, case, id=f"{home}-{to}-{case}")
    for home, to, case in product(SIDES, SIDES, CASES)
    if not (home == "torch" and case == "no scale")
    # three cases are enough once for each framework, to and fro
    and (case in ("usual", "bare") or "keras" in (home, to))
]


def quietly(source, to, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        return bn.translate(source, to, **options)


def assert_near(actual, expected, ulps=ULPS):
    np.testing.assert_allclose(actual, expected, rtol=ulps, atol=ulps * max(1e-30, np.abs(expected).max()))


def assert_carried(actual, expected):
    """Bit for bit; what is left out in one framework may be ones and zeros in another."""
    for a, e, absent in zip(actual, expected, (1, 0, None, None), strict=True):
        if a is None or e is None:
            assert (absent if a is None else a == absent) is not None
            assert all(v is None or (v == absent).all() for v in (a, e))
        else:
            np.testing.assert_array_equal(a, e)
            assert a.dtype == e.dtype


@pytest.mark.parametrize(("home", "to", "case"), PAIRS)
def test_a_layer_there_and_back_evaluates_and_trains_as_before(home, to, case):
    here, there, numbers = SIDES[home], SIDES[to], vectors(seed=len(home) + 10 * len(to))
    source = here.make(**CASES[case], numbers=numbers)
    x, *data = batches(6)
    expected = here.evaluate(source, x)
    abroad = quietly(source, to, dims=2)
    assert_near(there.evaluate(abroad, x), expected)
    assert_carried(there.stored(abroad), here.stored(source))
    back = quietly(abroad, home, dims=2, unbiased=here.unbiased)
    assert_near(here.evaluate(back, x), expected)
    assert_carried(here.stored(back), here.stored(source))
    if home == "onnx":
        assert (back.graph.node[0].attribute[0].f, len(back.graph.node)) == (source.graph.node[0].attribute[0].f, 1)
        return
    before = here.stored(source)
    source, back = here.train(source, data), here.train(back, data)
    # large enough to be seen, were it another decay or convention
    assert np.abs(here.stored(source)[3] - before[3]).max() > 0.02
    for a, e in zip(here.stored(back)[2:], here.stored(source)[2:], strict=True):
        assert_near(a, e)


# torch's own and ours, Keras's own and ours, and Flax's two styles; Flax has one convention
TRAINED = [
    ("torch", nn.BatchNorm2d, {}, True),
    ("torch", batchnorm.torch.BatchNorm2d, {"unbiased": False}, False),
    ("keras", keras.layers.BatchNormalization, {}, False),
    ("keras", batchnorm.keras.BatchNormalization, {"unbiased": True}, True),
    ("flax", None, {}, False),
    ("nnx", None, {}, False),
]


@pytest.mark.parametrize("case", ["usual", "bare"])
@pytest.mark.parametrize(
    ("home", "cls", "options", "unbiased", "to"),
    [
        pytest.param(home, cls, options, unbiased, to, id=f"{home}-{'un' * unbiased}biased-{to}")
        for (home, cls, options, unbiased), to in product(TRAINED, ("torch", "keras", "flax", "nnx"))
        if not (unbiased and to in ("flax", "nnx"))
    ],
)
def test_a_layer_moves_abroad_as_it_moves_at_home(home, cls, options, unbiased, to, case):
    here, there = SIDES[home], SIDES[to]
    made = {} if cls is None else {"cls": cls}
    source = here.make(**CASES[case], numbers=vectors(3), **made, **options)
    # no warning: nothing goes on in another way
    abroad = bn.translate(source, to, dims=2)
    data = batches(5)
    source, abroad = here.train(source, data), there.train(abroad, data)
    for a, e in zip(there.stored(abroad)[2:], here.stored(source)[2:], strict=True):
        assert_near(a, e)
    assert_near(there.evaluate(abroad, data[0]), here.evaluate(source, data[0]))


def test_the_convention_of_the_variance_shows_in_this_data():
    one, other = (
        Torch.train(
            Torch.make(**CASES["usual"], numbers=vectors(3), cls=batchnorm.torch.BatchNorm2d, unbiased=u), batches(5)
        )
        for u in (True, False)
    )
    assert np.abs(1 - Torch.stored(one)[3] / Torch.stored(other)[3]).min() > 1000 * ULPS


@pytest.mark.parametrize(
    ("cls", "shape"),
    [(nn.BatchNorm1d, (8, C)), (nn.BatchNorm1d, (8, C, 5)), (nn.BatchNorm2d, SHAPE), (nn.BatchNorm3d, (2, C, 2, 3, 2))],
)
@pytest.mark.parametrize("axis", [-1, 1])
def test_every_number_of_axes_in_both_layouts(cls, shape, axis):
    (x,) = batches(1, shape)
    source = Torch.make(**CASES["usual"], numbers=vectors(5), cls=cls)
    given = x if axis == 1 else np.moveaxis(x, 1, -1)
    layer = bn.translate(source, "keras", axis=axis, dims=len(shape) - 2)
    y = layer(given, training=False).detach().numpy()
    assert_near(y if axis == 1 else np.moveaxis(y, -1, 1), Torch.evaluate(source, x))
    back = bn.translate(layer, "torch")
    assert isinstance(back, {nn.BatchNorm1d: batchnorm.torch.BatchNorm1d}.get(cls, cls))
    assert_near(Torch.evaluate(back, x), Torch.evaluate(source, x))
    if cls is nn.BatchNorm2d:
        module, variables = quietly(source, "flax", axis=axis)
        assert_near(np.asarray(module.apply(variables, given, use_running_average=True)), y)
    session = quietly(source, "onnx", dims=len(shape) - 2)
    assert_near(Onnx.evaluate(session, x), Torch.evaluate(source, x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("to", ["torch", "keras", "flax", "nnx", "onnx"])
def test_dtypes_are_carried(dtype, to):
    source = Torch.make(**CASES["usual"], numbers=vectors(1)).to(getattr(torch, dtype))
    expected = [
        v.detach().double().numpy() for v in (source.weight, source.bias, source.running_mean, source.running_var)
    ]
    if dtype == "float64" and to in ("flax", "nnx"):
        with pytest.raises(
            OptionError, match=re.escape("holds float64, which JAX stores as float32: switch float64 on")
        ):
            quietly(source, to)
        with jax.enable_x64(True):
            back = quietly(quietly(source, to), "torch", dims=2)
    else:
        back = quietly(quietly(source, to), "torch", dims=2)
    held = (back.weight, back.bias, back.running_mean, back.running_var)
    # no more than the statistics of Flax, in float32, are wider
    assert {v.dtype for v in held} <= {getattr(torch, dtype), torch.float32}
    assert back.weight.dtype == getattr(torch, dtype)
    for a, e in zip(held, expected, strict=True):
        np.testing.assert_array_equal(a.detach().double().numpy(), e)


def test_mixed_precision_of_keras_is_that_of_flax():
    source = Keras.make(**CASES["slow"], numbers=vectors(2), dtype="mixed_bfloat16")
    module, _ = bn.translate(source, "flax")
    assert (module.dtype, module.param_dtype) == ("bfloat16", jnp.float32)
    back = bn.translate((module, bn.translate(source, "flax").variables), "keras", dims=2)
    assert (back.compute_dtype, back.variable_dtype) == ("bfloat16", "float32")


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_that_both_have_are_carried():
    options = {"virtual_batch_size": 3, "debias": False, "on_single": "running"}
    source = Torch.make(**CASES["usual"], numbers=vectors(4), cls=batchnorm.torch.BatchNorm2d, **options)
    layer = bn.translate(source, "keras")
    assert {name: getattr(layer, name) for name in options} == options
    back = bn.translate(layer, "torch")
    assert back.options == source.options
    assert repr(back) == repr(source)


def test_a_debiased_layer_goes_on_from_the_same_step():
    layer = batchnorm.torch.BatchNorm2d(C, momentum=0.02, debias=True)
    first, *data = batches(6)
    Torch.train(layer, [first])
    abroad = bn.translate(layer, "keras")
    back = bn.translate(abroad, "torch")
    Torch.train(layer, data)
    for a, e in zip(Keras.stored(Keras.train(abroad, data))[2:], Torch.stored(layer)[2:], strict=True):
        assert_near(a, e)
    assert int(Torch.train(back, data).num_batches_tracked) == int(layer.num_batches_tracked) == 6
    assert_near(Torch.stored(back)[3], Torch.stored(layer)[3])


@pytest.mark.parametrize(
    ("options", "to", "plain"),
    [
        ({"activation": "relu"}, "keras", False),
        ({"activation": "relu"}, "onnx", False),
        ({"activation": "relu"}, "flax", False),
        ({"activation": "relu"}, "torch", True),
        ({"renorm": True}, "keras", False),
        ({"total_variance": True}, "keras", False),
        ({"example_weight": 0.5}, "onnx", False),
        ({"domains": ("target",)}, "torch", False),
        ({"virtual_batch_size": 2}, "flax", False),
        ({"virtual_batch_size": 2}, "keras", True),
        ({"process_group": "default"}, "nnx", False),
    ],
)
def test_options_that_only_one_has_are_named(options, to, plain):
    source = batchnorm.torch.BatchNorm2d(C, **options)
    name = {"process_group": "synchronized"}.get(*options, next(iter(options)))
    with pytest.raises(OptionError, match=rf"the torch BatchNorm2d layer has {name}=.*has no counterpart: set it back"):
        bn.translate(source, to, plain=plain)


def test_what_matters_in_training_alone_does_not_keep_a_layer_from_onnx():
    source = batchnorm.torch.BatchNorm2d(C, momentum=None, virtual_batch_size=2, renorm=True)
    assert bn.translate(source, "onnx").graph.node[0].op_type == "BatchNormalization"


@pytest.mark.parametrize("to", ["keras", "flax", "nnx"])
@pytest.mark.parametrize(
    ("source", "text"),
    [
        (nn.BatchNorm2d(C, momentum=None), "has momentum=None (all batches count alike), for which"),
        (nn.BatchNorm2d(C, track_running_stats=False), "has track_running_stats=False, for which"),
        (batchnorm.torch.BatchNorm2d(C, momentum=lambda step: 0.1), "has momentum="),
    ],
    ids=["cumulative", "untracked", "schedule"],
)
def test_what_has_no_counterpart_is_named(source, text, to):
    with pytest.raises(OptionError, match=re.escape(text)):
        bn.translate(source, to)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_torch_to_torch_keeps_everything(momentum):
    source = Torch.train(nn.BatchNorm2d(C, momentum=momentum, track_running_stats=True), batches(3))
    twin = bn.translate(source, "torch")
    for layer in (source, twin):
        Torch.train(layer, batches(2, seed=1))
    for (name, a), (_, e) in zip(twin.state_dict().items(), source.state_dict().items(), strict=True):
        assert_near(a.numpy(), e.numpy())
        assert name != "num_batches_tracked" or int(a) == 5
    untracked = bn.translate(nn.BatchNorm2d(C, track_running_stats=False), "torch")
    assert untracked.running_mean is None


def test_a_regularizer_of_keras_is_named():
    layer = keras.layers.BatchNormalization(gamma_regularizer="l2")
    layer.build((None, C))
    with pytest.raises(OptionError, match=r"has gamma_regularizer=.* for which the torch layer has no counterpart"):
        bn.translate(layer, "torch")
    assert bn.translate(layer, "keras").gamma_regularizer is layer.gamma_regularizer


def test_an_axis_name_of_flax_is_named():
    source = Linen.make(**CASES["slow"], numbers=vectors(2), axis_name="devices")
    with pytest.raises(OptionError, match="has axis_name='devices', for which the torch layer has no counterpart"):
        bn.translate(source, "torch", dims=2)
    assert bn.translate(source, "nnx").axis_name == "devices"


# -- what goes on in another way is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "to", "options", "text"),
    [
        (lambda: nn.BatchNorm2d(C), "flax", {}, "BatchNorm of Flax keeps the biased running variance, it kept the unbiased"),
        (lambda: nn.BatchNorm2d(C), "nnx", {}, "BatchNorm of Flax keeps the biased running variance, it kept the unbiased"),
        (lambda: nn.BatchNorm2d(C), "keras", {"plain": True}, "Keras's own layer keeps the biased running variance"),
        (
            lambda: Keras.make(**CASES["slow"], numbers=vectors(1)), "torch", {"plain": True},
            "torch.nn keeps the unbiased running variance, it kept the biased one",
        ),
        (
            lambda: Keras.make(**CASES["no scale"], numbers=vectors(1)), "torch", {},
            "torch has no β without γ: the new layer has a γ of ones",
        ),
        (
            lambda: Keras.make(**CASES["slow"], numbers=vectors(1), trainable=False), "flax", {},
            "it is frozen, Flax has use_running_average=True for it",
        ),
    ],
)  # fmt: skip
def test_what_goes_on_in_another_way_is_said(source, to, options, text):
    with pytest.warns(BatchNormWarning, match=re.escape(text)) as said:
        bn.translate(source(), to, **options)
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("to", ["torch", "keras"])
def test_plain_layers_are_of_the_framework(to):
    source = Linen.make(**CASES["slow"], numbers=vectors(2))
    layer = quietly(source, to, plain=True, dims=2)
    assert type(layer) is {"torch": nn.BatchNorm2d, "keras": keras.layers.BatchNormalization}[to]
    (x,) = batches(1)
    assert_near(SIDES[to].evaluate(layer, x), Linen.evaluate(source, x))


# -- frozen layers -----------------------------------------------------------------------------------------------------


def test_a_frozen_layer_stays_frozen():
    source = batchnorm.torch.freeze(Torch.make(**CASES["usual"], numbers=vectors(6)))
    layer = bn.translate(source, "keras")
    assert not layer.trainable
    x, *data = batches(3)
    before = Keras.stored(layer)
    Keras.train(layer, data)
    assert_carried(Keras.stored(layer), before)
    back = bn.translate(layer, "torch")
    assert back.frozen_statistics
    assert not back.weight.requires_grad
    assert_near(Torch.evaluate(back, x), Torch.evaluate(source, x))


def test_a_layer_with_frozen_statistics_alone_has_no_counterpart():
    source = batchnorm.torch.freeze(nn.BatchNorm2d(C), affine=False)
    with pytest.raises(OptionError, match="has frozen_statistics=True, for which the Keras layer has no counterpart"):
        bn.translate(source, "keras")


def test_a_frozen_layer_of_torchvision_is_seen():
    open_torchvision()
    from torchvision.ops import FrozenBatchNorm2d

    source = FrozenBatchNorm2d(C, eps=1e-3)
    names = ("weight", "bias", "running_mean", "running_var")
    source.load_state_dict({name: torch.from_numpy(v) for name, v in zip(names, vectors(8), strict=True)})
    x, *data = batches(2)
    layer = bn.translate(source, "keras")
    assert_near(Keras.evaluate(layer, x), Torch.evaluate(source, x))
    assert_carried(Keras.stored(Keras.train(layer, data)), vectors(8))


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Rogue(nn.Module):
    """Keeps the numbers of a frozen layer, and computes something else."""

    def __init__(self):
        super().__init__()
        for name in ("running_mean", "running_var", "weight", "bias"):
            self.register_buffer(name, torch.rand(C))
        self.eps = 1e-5

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (Shifted(C), "must be batch normalization alone, Shifted has a forward of its own"),
        (Rogue(), "a Rogue must be batch normalization alone, with its running statistics: it computes something else"),
        (nn.Linear(2, 3), "must be batch normalization, or keep running_mean, running_var, weight, bias and eps, got a Linear"),
        (nn.BatchNorm2d(C, affine=False, track_running_stats=False), "holds no numbers: there is nothing to translate"),
        (nn.LazyBatchNorm2d(), "must know its size"),
        (keras.layers.Dense(3), "a Keras layer must be BatchNormalization, Keras's or ours, got a Dense"),
        (keras.layers.BatchNormalization(name="bn"), "layer 'bn' must be built, so that it holds numbers"),
        (linen.Dense(3), "a layer of linen must be given with its variables, (module, variables)"),
        ((linen.Dense(3), {}), "a layer of Flax must be BatchNorm, got a Dense"),
        ((linen.BatchNorm(axis=(1, 2)), {}), "variables must hold params with scale, bias"),
        (({"eps": 1}, {}), "the arguments must be those of flax.linen.BatchNorm"),
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "a layer of Flax must be BatchNorm, got a Linear"),
        (3, "a layer must be a torch module, a Keras layer"),
    ],
)  # fmt: skip
def test_what_is_no_batch_normalization_is_refused(source, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        bn.translate(source, "onnx")


def test_variables_of_flax_are_checked():
    module, variables = Linen.make(**CASES["usual"], numbers=vectors(1))
    with pytest.raises(OptionError, match=r"variables must hold batch_stats with mean, var, .* got nothing"):
        bn.translate((module, {"params": variables["params"]}), "torch")
    short = {**variables, "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(C)}}
    with pytest.raises(OptionError, match=r"one number for each channel, got arrays of shapes .*'mean': \(2,\)"):
        bn.translate((module, short), "torch")
    with pytest.raises(OptionError, match="must have one axis of channels, got axis=\\(1, 2\\)"):
        bn.translate(({"axis": (1, 2)}, variables), "torch")


def test_arguments_of_flax_stand_for_the_module():
    module, variables = Linen.make(**CASES["slow"], numbers=vectors(1))
    frozen = flax.core.freeze(variables)
    one, other = (bn.translate((m, frozen), "torch", dims=2) for m in (module, {"momentum": 0.99, "epsilon": 1e-3}))
    assert repr(one) == repr(other)
    assert_carried(Torch.stored(one), Torch.stored(other))


def test_nodes_of_onnx_are_found():
    model = Onnx.make(**CASES["usual"], numbers=vectors(1))
    node, held = model.graph.node[0], list(model.graph.initializer)
    layers = [
        bn.translate(s, "torch", dims=2)
        for s in (model, (model, "norm"), (node, held), (node, {t.name: t for t in held}))
    ]
    for layer in layers:
        assert_carried(Torch.stored(layer), Onnx.stored(model))
        assert (layer.eps, layer.momentum, layer.options.unbiased) == (1e-5, 0.1, False)
    with pytest.raises(OptionError, match="must be that of a BatchNormalization, 'norm', got 'other'"):
        bn.translate((model, "other"), "torch")
    with pytest.raises(OptionError, match="must be a BatchNormalization, given with the initializers g, b, m, v, got"):
        bn.translate((node, held[:2]), "torch")
    model.graph.node.append(helper.make_node("BatchNormalization", ["z", *"gbmv"], ["y"], "second"))
    with pytest.raises(
        OptionError, match="must have one BatchNormalization, or be given with its name: it has 'norm', 'second'"
    ):
        bn.translate(model, "torch")
    del model.graph.initializer[:]
    with pytest.raises(OptionError, match="node 'norm' must read constants"):
        bn.translate((model, "norm"), "torch")


@pytest.mark.parametrize(
    ("to", "options", "text"),
    [
        ("tensorflow", {}, "to must be one of 'torch', 'keras', 'flax', 'nnx', 'onnx', got 'tensorflow'"),
        ("onnx", {"plain": True}, "plain is for torch and keras, got plain=True with to='onnx'"),
        ("torch", {"axis": 2}, "axis is for keras and flax and nnx, got axis=2 with to='torch'"),
        ("keras", {"axis": 5}, "axis must be one of the 4 axes of the data, and not that of the samples, got 5"),
        ("keras", {"dims": 4}, "dims must be 0, 1, 2 or 3 axes of places, got 4"),
    ],
)
def test_options_are_checked(to, options, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        bn.translate(nn.BatchNorm2d(C), to, **options)


def test_dims_are_asked_for_where_nobody_knows():
    with pytest.raises(OptionError, match="a torch layer must know the axes of its data, and the Flax BatchNorm layer"):
        bn.translate(Linen.make(**CASES["usual"], numbers=vectors(1)), "torch")


def test_without_flax_it_is_said_what_to_install(monkeypatch):
    for name in ("batchnorm.flax", "batchnorm.flax.translating"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    text = "batchnorm.flax.translating needs the package 'flax', which is not installed: pip install 'batchnorm[flax]'"
    with pytest.raises(bn.errors.MissingDependencyError, match=re.escape(text)):
        bn.translate(nn.BatchNorm2d(C), "flax")


def test_the_source_is_left_as_it_is():
    source = Torch.make(**CASES["usual"], numbers=vectors(9))
    before = {name: v.clone() for name, v in source.state_dict().items()}
    Keras.train(bn.translate(source, "keras"), batches(2))
    Nnx.train(quietly(source, "nnx"), batches(2))
    Torch.train(bn.translate(source, "torch"), batches(2))
    assert all(torch.equal(v, before[name]) for name, v in source.state_dict().items())


def test_the_onnx_model_is_valid():
    onnx.checker.check_model(bn.translate(nn.BatchNorm3d(C), "onnx"), full_check=True)
