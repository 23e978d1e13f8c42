"""Folding in ONNX: what goes, and that every output stays, by an evaluation that shares nothing with the wing."""

import io
import logging
import warnings
from itertools import cycle, product

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from batchnorm.fold import fold, prune, strip_bias
from batchnorm.onnx.model import OnnxModel
from onnx_graphs import EPS, LATEST, TYPES, Build, feeds_of, folded, ops, reasons, run

OPSETS = (7, 8, 9, 11, 13, 14, 15, 17, 20, LATEST)


def gone(result):
    """Assert that nothing is left of the norms, and that the proof was in float64."""
    assert not result.kept, reasons(result)
    assert not {"BatchNormalization", "Mul"} & set(ops(result.model))
    assert float(result.error) <= 1e-12
    assert not result.error.note


# -- the grid ------------------------------------------------------------------------------------------------------


def convolution(b, x, kind, rank, groups, bias, stride=1, dilation=1, pad=0, more=0):
    """Add a convolution from 4 to 8 channels."""
    shape = (8, 4 // groups) if kind == "Conv" else (4, 8 // groups)
    weights = [b.random(*shape, *[3, 2, 2][:rank], name="conv.weight")] + [
        b.random(8, name="conv.bias") for _ in range(bias)
    ]
    geometry = {"strides": [stride] * rank, "dilations": [dilation] * rank, "pads": [pad] * 2 * rank, "group": groups}
    if kind == "ConvTranspose":
        geometry["output_padding"] = [more] * rank
    return b.node(kind, x, *weights, name="conv", **geometry)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_convolutions(kind, groups, rank):
    opsets, dtypes = cycle(OPSETS), cycle(("float32", "float64"))
    for (stride, dilation, pad, more), bias, after in product(
        [(1, 1, 0, 0), (2, 1, 1, 1), (1, 2, 1, 0)], (False, True), (True, False)
    ):
        dtype, opset = next(dtypes), next(opsets)
        for precision in {dtype, "float64"}:
            b = Build(precision, opset=opset)
            x = b.input([2, 4, *[6, 5, 4][:rank]])
            if after:
                y = b.norm(convolution(b, x, kind, rank, groups, bias, stride, dilation, pad, more), 8)
            else:
                y = convolution(b, b.norm(b.node("Abs", x), 4), kind, rank, groups, bias, stride, dilation, pad, more)
            result = folded(b.model(y), bound=1e-12 if precision == "float64" else 1e-5)
            if after or (kind == "Conv" and not pad):
                gone(result)
                assert result.folded[0].how == ("backward" if after else "forward")
            else:
                assert result.kept[0].became == "scale and shift"
                assert "pads with zeros" in reasons(result) or "transposed convolution" in reasons(result)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(dtype, trans_a, trans_b):
    for bias, after, (alpha, beta) in product([None, (6,), (1, 6), (1,), ()], (True, False), [(1.0, 1.0), (0.5, -2.0)]):
        b = Build(dtype, opset=13)
        b.input([4, 3] if trans_a else [3, 4])
        scaled = b.random(*((6, 4) if trans_b else (4, 6)), name="w")
        c = [] if bias is None else [b.random(*bias)]
        geometry = {"transA": trans_a, "transB": trans_b, "alpha": alpha, "beta": beta}
        if after:
            y = b.norm(b.node("Gemm", "x", scaled, *c, **geometry), 6)
        else:
            # channels on axis 1 before the product: those are rows where A is transposed
            x = b.norm("x", 3 if trans_a else 4)
            y = b.node("Gemm", x, scaled, *c, **geometry)
        result = folded(b.model(y), bound={"float64": 1e-12, "float32": 1e-5, "float16": 3e-2}[dtype])
        if after or not trans_a:
            gone(result)
        else:
            assert "normalizes another axis" in reasons(result)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("added", [False, True])
def test_matmul(side, added):
    b = Build("float64", opset=17)
    if side == "right":
        x = b.input([3, 5, 4])
        y = b.node("MatMul", x, b.random(4, 6))
        y = b.node("Add", y, b.random(6)) if added else y
        y = b.norm(b.node("Transpose", y, perm=[0, 2, 1]), 6)
    else:
        x = b.input([3, 4, 5])
        y = b.node("MatMul", b.random(6, 4), x)
        y = b.node("Add", b.random(6, 1), y) if added else y
        y = b.norm(y, 6)
    result = folded(b.model(y))
    assert not result.kept
    assert ops(result.model).count("Add") == 1
    assert "BatchNormalization" not in ops(result.model)


def test_forward_into_a_matmul():
    b = Build("float64")
    y = b.node("Abs", b.input([3, 4]))
    y = b.node("MatMul", b.norm(y, 4), b.random(4, 5))
    y = b.node("Relu", b.node("Add", y, b.random(5)))
    gone(folded(b.model(y)))


class Chain:
    """A network that grows by one step at a time."""

    def __init__(self, pick, seed):
        self.pick, self.skip, self.channels = pick, [], 4
        self.b = Build("float64", opset=pick(9, 13, 17, 21), form=pick("initializer", "Constant"), seed=seed)
        self.y = self.b.input([2, 4, 8, 8])

    def conv(self):
        weights = [self.b.random(4, self.channels, 3, 3), *(self.b.random(4) for _ in range(self.pick(0, 1)))]
        self.y, self.channels = self.b.node("Conv", self.y, *weights, pads=self.pick([0] * 4, [1] * 4)), 4

    def norm(self):
        self.y = self.b.norm(
            self.y, self.channels, self.b.fresh("bn"), signs=self.pick(True, False), shift=self.pick(True, False)
        )

    def relu(self):
        self.y = self.b.node(self.pick("Relu", "Sigmoid", "Abs"), self.y)

    def pool(self):
        op = self.pick("MaxPool", "AveragePool")
        self.y = self.b.node(op, self.y, kernel_shape=[2, 2], pads=self.pick([0] * 4, [1] * 4))

    def up(self):
        if self.b.opset > 10:
            scales = self.b.const(np.array([1, 1, 1.5, 1.5]), dtype="float32")
            self.y = self.b.node("Resize", self.y, "", scales, mode=self.pick("nearest", "linear"))

    def pad(self):
        if self.b.opset > 10:
            amounts = self.b.const(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
            self.y = self.b.node("Pad", self.y, amounts, mode=self.pick("constant", "reflect", "edge"))

    def cat(self):
        self.y = self.b.node(
            "Concat", self.y, self.b.node("Conv", self.y, self.b.random(2, self.channels, 1, 1)), axis=1
        )
        self.channels += 2

    def add(self):
        self.y = self.b.node(
            "Add", self.y, self.b.node("Conv", self.y, self.b.random(self.channels, self.channels, 1, 1))
        )

    def keep(self):
        self.skip = [*self.skip, self.y] if self.y != "x" else []

    def end(self):
        y = self.b.node("Relu", self.y)
        shape = run(self.b.model(y), {"x": np.ones((2, 4, 8, 8))})[0].shape
        size = int(np.prod(shape[1:]))
        y = self.b.norm(self.b.node("Flatten", y), size, "last")
        y = self.b.node("Gemm", y, self.b.random(size, 3), self.b.random(3))
        return self.b.model(y, *dict.fromkeys(self.skip))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_networks_of_everything(data):
    """Chains of whatever there is: never a wrong answer, and no norm is executed any more."""
    chain = Chain(lambda *choices: data.draw(st.sampled_from(choices)), data.draw(st.integers(0, 99)))
    steps = ("conv", "conv", "norm", "norm", "norm", "relu", "pool", "up", "pad", "cat", "add", "keep")
    for step in data.draw(st.lists(st.sampled_from(steps), min_size=2, max_size=7)):
        getattr(chain, step)()
    model = chain.end()
    result = folded(model, bound=1e-11)
    assert "BatchNormalization" not in ops(result.model)
    assert all(k.became == "scale and shift" for k in result.kept)
    assert len(result.folded) + len(result.kept) == ops(model).count("BatchNormalization")


# -- opsets, forms of weights, dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["initializer", "Constant"])
@pytest.mark.parametrize("opset", sorted({*OPSETS, 10, 12, 16, 18, 19, 22, LATEST - 1}))
def test_every_opset(opset, form):
    b = Build("float32", opset=opset, form=form)
    y = b.norm(convolution(b, b.input([2, 4, 5, 5]), "Conv", 2, 1, False), 8, "one")
    y = b.node("Relu", y)
    y = b.norm(b.node("GlobalAveragePool", y), 8, "two")
    y = b.node("Conv", y, b.random(3, 8, 1, 1))
    result = folded(b.model(y), bound=1e-5)
    gone(result)
    assert {n.op_type for n in result.model.graph.node} == {"Conv", "Relu", "GlobalAveragePool"}
    assert len(result.model.graph.initializer) == 4
    assert [v.name for v in result.model.graph.input] == ["x"] + [t.name for t in result.model.graph.initializer] * (
        opset < 9
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("plain", [False, True])
def test_dtypes(dtype, plain):
    b = Build(dtype, opset=LATEST)
    y = b.input([2, 4, 6, 6])
    y = b.norm(b.node("Relu", y) if plain else convolution(b, y, "Conv", 2, 2, False), 4 if plain else 8)
    result = folded(b.model(b.node("Relu", y)), bound=40 * EPS[dtype])
    assert {t.data_type for t in result.model.graph.initializer} <= {TYPES[dtype], TensorProto.FLOAT}
    assert result.error.measured[-1].precision == dtype
    assert result.error.measured[0].precision == "float64"
    if plain:
        assert result.kept[0].became == "scale and shift"
        assert "BatchNormalization" not in ops(result.model)
    else:
        gone(result)


def test_statistics_of_another_dtype():
    b = Build("float16", opset=17)
    y = convolution(b, b.input([2, 4, 6, 6]), "Conv", 2, 1, True)
    numbers = [b.const(v, dtype="float32") for v in (np.ones(8), np.ones(8), np.full(8, 0.5), np.full(8, 2.0))]
    y = b.node("BatchNormalization", y, *numbers)
    gone(folded(b.model(b.node("Relu", y)), bound=1e-2))


def test_half_numbers_that_overflow():
    b = Build("float16", opset=17)
    y = b.node("Conv", b.input([1, 2, 3, 3]), b.const(np.full((2, 2, 1, 1), 60000.0)))
    y = b.norm(y, 2, gamma=[4.0, 4.0])
    example = np.random.uniform(0, 1e-4, (1, 2, 3, 3)).astype("float16")
    result = folded(b.model(y), example, bound=5e-2, feeds={"x": example})
    assert "finite" in reasons(result)
    assert result.kept[0].became == "scale and shift"


def test_a_large_mean_in_half_precision():
    b = Build("float16", opset=17)
    y = b.node("Abs", b.input([2, 3, 4, 4]))
    model = b.model(b.node("Relu", b.norm(y, 3, mean=[900.0, -700, 3])))
    result = folded(model, {"x": 900 + np.random.randn(2, 3, 4, 4)}, bound=0.1)
    assert "Cast" in ops(result.model)
    assert float(result.error) < 1e-12


# -- how the file looks afterwards ---------------------------------------------------------------------------------


def conv_norm(**options):
    b = Build(**options)
    y = b.node("Conv", b.input(["N", 4, 6, 6]), b.random(8, 4, 3, 3, name="body.weight"), name="conv")
    return b, b.norm(y, 8, "norm")


def test_names_and_metadata_stay():
    b, y = conv_norm()
    model = b.model(y)
    model.producer_name, model.doc_string, model.domain, model.model_version = "maker", "about", "org.example", 5
    model.metadata_props.add(key="a", value="b")
    model.graph.doc_string, model.graph.node[0].doc_string = "graph", "node"
    model.opset_import.add(domain="com.microsoft", version=1)
    new = fold(model).model
    assert [n.op_type for n in new.graph.node] == ["Conv"]
    assert list(new.graph.node[0].input) == ["x", "body.weight", "body.bias"]
    assert list(new.graph.node[0].output) == [y]
    assert new.graph.node[0].name == "conv"
    assert new.graph.node[0].doc_string == "node"
    for field in (
        "producer_name",
        "doc_string",
        "domain",
        "model_version",
        "ir_version",
        "metadata_props",
        "opset_import",
    ):
        assert getattr(new, field) == getattr(model, field)
    assert new.graph.input == model.graph.input
    assert new.graph.output == model.graph.output


def test_remembered_shapes_of_values_that_are_gone():
    b, y = conv_norm()
    model = onnx.shape_inference.infer_shapes(b.model(b.node("Relu", y)))
    assert len(model.graph.value_info) == 2
    assert {v.name for v in folded(model, bound=1e-5).model.graph.value_info} < {v.name for v in model.graph.value_info}


def test_inplace():
    b, y = conv_norm()
    model = b.model(y)
    want = run(model, feeds_of(model))[0]
    result = fold(model, inplace=True)
    assert result.model is model
    assert ops(model) == ["Conv"]
    assert np.allclose(run(model, feeds_of(model))[0], want, atol=1e-5)


def test_a_scale_and_shift_has_only_what_is_needed():
    for gamma, shift, left in (([2, 3], True, ["Mul", "Add"]), ([2, 3], False, ["Mul"])):
        b = Build()
        y = b.node("Abs", b.input([2, 2, 4]))
        result = folded(b.model(b.node("Sigmoid", b.norm(y, 2, "n", gamma=gamma, shift=shift))), bound=1e-5)
        assert ops(result.model) == ["Abs", *left, "Sigmoid"]
        assert [n.name for n in result.model.graph.node][1:-1] == [f"n_{w}" for w in ("scale", "shift")][: len(left)]
        assert {tuple(t.dims) for t in result.model.graph.initializer} == {(2, 1)}


def test_nodes_without_names():
    b = Build()
    y = b.node("Conv", b.input([1, 4, 6, 6]), b.random(8, 4, 3, 3), name="")
    model = b.model(b.norm(y, 8, ""))
    result = folded(model, bound=1e-5)
    assert result.folded[0].into == (y,)


def test_examples_in_all_forms():
    b = Build()
    y = b.node("Add", *(b.node("Conv", b.input([None, 4, None, 6], n), b.random(8, 4, 3, 3)) for n in "uv"))
    model = b.model(b.norm(y, 8))
    u, v = (np.random.randn(1, 4, 5, 6) for _ in "uv")
    for example in ((u, v), [u, v], {"v": v, "u": u}, None):
        assert not fold(model, example).kept


def test_random_inputs_keep_what_may_be_a_size():
    b = Build()
    b.input([3], "sizes", dtype="int64"), b.input([2, 3], "tokens", dtype="int64"), b.input([2], "x")
    model = b.model(b.node("Relu", "x"))
    example = {"sizes": np.array([7, 8, 9]), "tokens": np.arange(6).reshape(2, 3), "x": np.array([1.0, np.inf])}
    made = OnnxModel(model).inputs(example, 0)
    assert np.array_equal(made["sizes"], example["sizes"])
    assert sorted(made["tokens"].ravel()) == [0, 1, 2, 3, 4, 5]
    assert not np.array_equal(made["tokens"], example["tokens"])
    assert np.isfinite(made["x"]).all()


def test_whole_numbers_as_inputs():
    b = Build()
    y = b.node("Gather", b.random(7, 5, name="table"), b.input([2, 3], dtype="int64"))
    y = b.node("Conv", b.node("Transpose", y, perm=[0, 2, 1]), b.random(4, 5, 1))
    model = b.model(b.norm(y, 4))
    gone(folded(model, bound=1e-5))
    gone(fold(model, np.array([[6, 5, 4], [3, 2, 1]])))


# -- weights that several nodes read -------------------------------------------------------------------------------


def test_shared_weights_are_cloned_and_never_corrupted():
    b = Build("float64")
    w, x = b.random(4, 4, 1, 1, name="w"), b.input([1, 4, 3, 3])
    one, two, three = (b.node("Conv", x, w) for _ in range(3))
    result = folded(b.model(b.norm(one, 4, "a"), b.norm(two, 4, "b"), three))
    gone(result)
    assert len({t.name for t in result.model.graph.initializer}) == 5


def test_equal_clones_are_stored_once():
    b = Build("float64")
    w, x = b.random(4, 4, 1, 1, name="w"), b.input([1, 4, 3, 3])
    y = b.norm(b.node("Conv", x, w), 4, "a")
    for _ in range(2):
        # by the same norm
        y = b.node("BatchNormalization", b.node("Conv", y, w), *b.nodes[1].input[1:])
    result = folded(b.model(y), bound=1e-11)
    gone(result)
    assert len(result.model.graph.initializer) == 2


def test_a_weight_that_is_an_output_too():
    b = Build("float64")
    w = b.random(4, 4, 1, 1, name="w")
    y = b.norm(b.node("Conv", b.input([1, 4, 3, 3]), w), 4)
    result = folded(b.model(y, w))
    gone(result)
    assert result.model.graph.output[1].name == "w"


def test_a_table_that_is_looked_up_and_multiplied():
    b = Build("float64")
    w = b.random(5, 4, name="w")
    y = b.node("MatMul", b.input([2, 5]), w)
    result = folded(b.model(b.norm(y, 4), b.node("Gather", w, b.const(np.array([1, 2])))))
    assert not result.kept


def test_identities_and_transposes_of_constants():
    b = Build("float64")
    w = b.node("Transpose", b.node("Identity", b.random(6, 5, name="w")), perm=[1, 0])
    result = folded(b.model(b.norm(b.node("MatMul", b.input([2, 5]), w), 6)))
    assert not result.kept
    assert ops(result.model) == ["MatMul", "Add"]
    assert "w" not in {t.name for t in result.model.graph.initializer}


def test_norms_that_share_their_numbers():
    b = Build("float64")
    y = b.norm(convolution(b, b.input([1, 4, 5, 5]), "Conv", 2, 1, True), 8)
    y = b.node("BatchNormalization", b.node("Sigmoid", y), *b.nodes[1].input[1:])
    result = folded(b.model(b.node("Sigmoid", y)))
    assert len(result.folded) == len(result.kept) == 1


# -- graphs inside of graphs ---------------------------------------------------------------------------------------


def branches(b, inside, outside=()):
    """Return the value of an If whose branches are made by ``inside``; what is constant lives in the outer graph."""
    graphs = []
    for number in range(2):
        inner, b.nodes = b.nodes, []
        y = inside(number)
        graphs.append(
            helper.make_graph(b.nodes, f"g{number}", [], [helper.make_tensor_value_info(y, TYPES[b.dtype], None)])
        )
        b.nodes = inner
    graphs[1].output[0].name, graphs[0].output[0].name = graphs[1].output[0].name, graphs[0].output[0].name
    return b.node("If", "c", *outside, then_branch=graphs[0], else_branch=graphs[1], name="if")


@pytest.mark.parametrize("truth", [True, False])
def test_inside_of_a_branch(truth):
    b = Build("float64")
    x, _ = b.input([2, 4, 5, 5]), b.input([], "c", dtype="bool")
    y = branches(b, lambda n: b.norm(b.node("Conv", x, b.random(6, 4, 3, 3)), 6, f"bn{n}"))
    model = b.model(b.node("Relu", y))
    feeds = {"x": np.random.randn(2, 4, 5, 5), "c": np.array(truth)}
    result = folded(model, feeds, feeds=feeds)
    gone(result)
    assert len(result.folded) == 2


def test_a_value_that_a_branch_reads_stays():
    b = Build("float64")
    x, _ = b.input([2, 4, 5, 5]), b.input([], "c", dtype="bool")
    raw = b.node("Conv", x, b.random(6, 4, 3, 3), name="conv")
    y = b.norm(raw, 6)
    model = b.model(y, branches(b, lambda n: b.node("Relu", raw)))
    feeds = {"x": np.random.randn(2, 4, 5, 5), "c": np.array(True)}
    result = folded(model, feeds, feeds=feeds)
    assert "a graph inside of if reads it" in reasons(result)


def test_a_norm_that_a_branch_reads_keeps_its_name():
    b = Build("float64")
    x, _ = b.input([2, 4, 5, 5]), b.input([], "c", dtype="bool")
    y = b.norm(b.node("Conv", x, b.random(6, 4, 3, 3), name="conv"), 6)
    model = b.model(branches(b, lambda n: b.node("Relu", y)))
    feeds = {"x": np.random.randn(2, 4, 5, 5), "c": np.array(True)}
    gone(folded(model, feeds, feeds=feeds))


def test_weights_that_two_branches_share():
    b = Build("float64")
    x, _ = b.input([2, 4, 5, 5]), b.input([], "c", dtype="bool")
    w = b.random(6, 4, 3, 3, name="w")
    y = branches(b, lambda n: b.norm(b.node("Conv", x, w), 6, f"bn{n}"))
    feeds = {"x": np.random.randn(2, 4, 5, 5), "c": np.array(False)}
    gone(folded(b.model(y), feeds, feeds=feeds))


def test_inside_of_a_loop():
    b = Build("float64")
    x, inner = b.input([2, 4, 5, 5]), Build("float64", seed=1)
    y = inner.norm(inner.node("Conv", "state", inner.random(4, 4, 1, 1, name="lw")), 4, "inside")
    done = inner.node("Identity", "going")
    ends = [
        helper.make_tensor_value_info(done, TensorProto.BOOL, []),
        helper.make_tensor_value_info(y, TYPES["float64"], None),
    ]
    starts = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TYPES["float64"], [2, 4, 5, 5]),
    ]
    body = helper.make_graph(inner.nodes, "body", starts, ends, inner.held)
    y = b.node("Loop", b.const(np.array(3)), b.const(np.array(True)), x, body=body, name="loop")
    result = folded(b.model(b.norm(y, 4, "outside")), bound=1e-11)
    assert [f.layer for f in result.folded] == ["inside"]
    assert "Loop" in reasons(result)


# -- exports of torch ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5)
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Sequential(
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.last = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.BatchNorm2d(4)
        )

    def forward(self, x):
        x = self.stem(x)
        return self.last(torch.cat([x, self.one(x)], 1)).mean((2, 3))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm, self.out = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.norm(self.proj(x.flatten(2).transpose(1, 2)).transpose(1, 2)).transpose(1, 2))


def exported(net, *, dynamo, dynamic=False):
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    net, x = net.eval().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
            program = torch.onnx.export(net, (x,), dynamo=True, optimize=False, verbose=False, dynamic_shapes=shapes)
            model = program.model_proto
        else:
            file, mode = io.BytesIO(), torch.onnx.TrainingMode.PRESERVE
            axes = {"x": {0: "batch"}} if dynamic else None
            torch.onnx.export(
                net,
                (x,),
                file,
                dynamo=False,
                training=mode,
                do_constant_folding=False,
                input_names=["x"],
                dynamic_axes=axes,
            )
            model = onnx.load_model_from_string(file.getvalue())
    return model, x, net(x).detach().numpy()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(("net", "left"), [(Residual, 0), (Dense, 2), (Sequence, 0)])
def test_exports_of_torch(net, left, dynamo, dynamic):
    model, x, want = exported(net(), dynamo=dynamo, dynamic=dynamic)
    assert "BatchNormalization" in ops(model)
    result = folded(model, x.numpy(), feeds={model.graph.input[0].name: x.numpy()})
    assert "BatchNormalization" not in ops(result.model)
    assert len(result.kept) <= left, reasons(result)
    got = run(result.model, {model.graph.input[0].name: x.numpy()})[0]
    assert np.abs(got - want).max() <= 1e-11 * np.abs(want).max()


# -- the other verbs on the same picture ----------------------------------------------------------------------------


def test_a_bias_before_a_norm_moves_into_the_mean():
    b = Build("float64", opset=17)
    y = b.norm(convolution(b, b.input([2, 4, 5, 5]), "Conv", 2, 1, True), 8)
    y = b.node("Transpose", b.node("GlobalAveragePool", y), perm=[0, 2, 3, 1])
    y = b.node("Add", b.node("MatMul", y, b.random(8, 3)), b.random(3))
    model = b.model(b.norm(b.node("Transpose", y, perm=[0, 3, 1, 2]), 3, "last"))
    result = strip_bias(model)
    assert [s.parameters for s in result.stripped] == [8, 3]
    assert "Add" not in ops(result.model)
    onnx.checker.check_model(result.model)
    want, got = (run(m, feeds_of(model))[0] for m in (model, result.model))
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


def test_channels_that_are_constant_are_pruned():
    b = Build("float64", opset=17)
    y = b.norm(convolution(b, b.input([2, 4, 7, 7]), "Conv", 2, 1, True), 8, gamma=[0, 1, 2, 0, -1, 1, 1, 0])
    y = b.node("Conv", b.node("Sigmoid", y), b.random(8, 1, 3, 3), group=8)
    y = b.norm(y, 8, gamma=[1, 1, 0, 1, 1, 1, 1, 1.0], name="second")
    model = b.model(b.node("Conv", b.node("Relu", y), b.random(3, 8, 1, 1)))
    result = prune(model)
    assert [p.channels for p in result.pruned] == [(0, 2, 3, 7), (0, 2, 3, 7)], str(result)
    assert {tuple(t.dims) for t in result.model.graph.initializer} == {
        (4, 4, 3, 2),
        (4,),
        (4, 1, 3, 3),
        (3, 4, 1, 1),
        (3,),
    }
    onnx.checker.check_model(result.model)
    want, got = (run(m, feeds_of(model))[0] for m in (model, result.model))
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


def test_the_proof_is_against_something():
    """The stock evaluator sees a difference when the weights are touched."""
    b, y = conv_norm(dtype="float64")
    model = b.model(y)
    new = fold(model).model
    new.graph.initializer[0].raw_data = (np.frombuffer(new.graph.initializer[0].raw_data) * (1 + 1e-9)).tobytes()
    assert np.abs(run(new, feeds_of(model))[0] - run(model, feeds_of(model))[0]).max() > 1e-12


# -- frozen norms: a Mul and an Add -------------------------------------------------------------------------------


def frozen(b, x, channels, *, ndim=4, first="x", computed=True):
    """Add what detectors do in the place of a norm; its numbers computed from statistics, or ready made."""
    lay = (channels,) + (1,) * (ndim - 2)
    vectors = [b.rng.uniform(0.5, 2, lay), b.rng.standard_normal(lay), b.rng.standard_normal(lay)]
    variance, gamma, mean = (b.const(v) for v in vectors)
    beta = b.random(*lay)
    if computed:
        root = b.node("Sqrt", b.node("Add", variance, b.const(np.array(1e-5))))
        scale = b.node("Mul", gamma, b.node("Reciprocal", root))
        beta = b.node("Sub", beta, b.node("Div", b.node("Mul", mean, gamma), root))
    else:
        scale = gamma
    y = b.node("Mul", *((x, scale) if first == "x" else (scale, x)), name="frozen")
    return y, b.node("Add", *((y, beta) if first == "x" else (beta, y)))


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("first", ["x", "constant"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_frozen_norm_goes_into_the_layer_before_or_behind_it(dtype, first, computed):
    for after in (True, False):
        b = Build(dtype)
        x = b.input([2, 4, 6, 6])
        if after:
            y = frozen(b, b.node("Conv", x, b.random(4, 4, 3, 3)), 4, first=first, computed=computed)[1]
        else:
            y = b.node("Conv", frozen(b, x, 4, first=first, computed=computed)[1], b.random(4, 4, 3, 3))
        result = folded(b.model(y), bound=1e-5 if dtype == "float32" else 1e-12)
        gone(result)
        assert [f.layer for f in result.folded] == ["frozen"]
        # the nodes that made its numbers are gone too
        assert ops(result.model) == ["Conv"]


def test_a_frozen_norm_that_nothing_takes_in_is_a_scale_and_shift_already():
    b = Build("float64")
    y = b.node("Relu", frozen(b, b.node("Relu", b.input([2, 4, 6, 6])), 4)[1])
    model = b.model(y)
    result = folded(model)
    assert result.kept == ()
    assert ops(result.model) == ops(model)


@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_norm_and_another_one_become_one_scale_and_shift(first):
    b = Build("float64")
    x = b.node("Relu", b.input([2, 4, 6, 6]))
    y = frozen(b, b.norm(x, 4), 4)[1] if first else b.norm(frozen(b, x, 4)[1], 4)
    result = folded(b.model(b.node("Relu", y)))
    assert len(result.folded) == len(result.kept) == 1
    assert sorted(ops(result.model)) == ["Add", "Mul", "Relu", "Relu"]


def two_readers(b, x):
    product, y = frozen(b, x, 4)
    return b.node("Concat", product, y, axis=1)


def product_is_output(b, x):
    product, y = frozen(b, x, 4)
    return product, y


def last_axis(b, x):
    return b.node("Add", b.node("Mul", x, b.random(4)), b.random(4))


def one_number(b, x):
    return b.node("Add", b.node("Mul", x, b.random(1)), b.random(1))


def squared(b, x):
    return b.node("Add", b.node("Mul", x, x), b.random(4, 1, 1))


def added_twice(b, x):
    y = b.node("Mul", x, b.random(4, 1, 1))
    return b.node("Add", y, y)


def two_axes(b, x):
    flat = b.node("Flatten", b.node("GlobalAveragePool", x))
    return b.node("Add", b.node("Mul", flat, b.random(4)), b.random(4))


def constants_alone(b, x):
    shift = b.node("Add", b.node("Mul", b.random(1, 4, 1, 1), b.random(1, 4, 1, 1)), b.random(1, 4, 1, 1))
    return b.node("Relu", b.node("Add", b.node("Relu", x), shift))


def multiplied_out(b, x):
    mean = b.node("GlobalMaxPool", b.node("Transpose", x, perm=[0, 2, 1, 3]))
    return b.node(
        "Add",
        b.node("Mul", b.node("Slice", mean, *(b.const(np.array([n])) for n in (0, 1, 1))), b.random(1, 4, 1, 1)),
        b.random(1, 4, 1, 1),
    )


def added_in_a_branch(b, x):
    product, _ = b.node("Mul", x, b.random(4, 1, 1)), b.input([], "c", dtype="bool")
    return branches(b, lambda n: b.node("Add", product, b.random(4, 1, 1)) if n else b.node("Relu", x))


def grown(b, x):
    return b.node("Add", b.node("Mul", b.node("GlobalAveragePool", x), b.random(1, 4, 1, 1)), b.random(1, 4, 4, 1))


@pytest.mark.parametrize(
    "build",
    [
        two_readers,
        product_is_output,
        last_axis,
        one_number,
        squared,
        added_twice,
        two_axes,
        constants_alone,
        multiplied_out,
        added_in_a_branch,
        grown,
    ],
    ids=lambda f: f.__name__,
)
def test_other_arithmetic_is_no_norm(build):
    b = Build("float64")
    made = build(b, b.node("Conv", b.input([2, 4, 6, 6]), b.random(4, 4, 3, 3)))
    result = folded(b.model(*(made if isinstance(made, tuple) else (made,))))
    assert not result.folded
    assert not result.kept


def test_a_frozen_norm_whose_numbers_a_caller_may_give_stays():
    b = Build("float64")
    y = frozen(b, b.node("Conv", b.input([2, 4, 6, 6]), b.random(4, 4, 3, 3)), 4)[1]
    model = b.model(y)
    variance = next(t for t in model.graph.initializer if t.dims == [4, 1, 1])
    model.graph.input.append(helper.make_tensor_value_info(variance.name, variance.data_type, list(variance.dims)))
    assert not folded(model, feeds={"x": np.ones((2, 4, 6, 6))}, example={"x": np.ones((2, 4, 6, 6))}).folded
