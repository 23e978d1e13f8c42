"""Small ONNX graphs that folding goes wrong on: attributes, shared and overridable weights, other axes, outputs read twice."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["GRAPHS", "inputs_of"]

GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {}
"""Every graph by its name; built anew on each call."""


class Build:
    """A graph, node by node; names of values are returned and given."""

    def __init__(self, dtype: str = "float32", opset: int = 17, ir: int = 8, form: str = "initializer") -> None:
        self.dtype, self.opset, self.ir, self.form = dtype, opset, ir, form
        self.kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
        self.rng = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.held: list[Any] = []
        self.inputs: list[Any] = []
        self.count = 0

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def input(self, *shape: int, name: str = "x", kind: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind or self.kind, shape))
        return name

    def const(self, values: Any, name: str | None = None) -> str:
        name, values = name or self.fresh("c"), np.asarray(values)
        tensor = numpy_helper.from_array(values.astype(self.dtype) if values.dtype.kind == "f" else values, name)
        if self.form == "initializer":
            self.held.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def random(self, *shape: int, name: str | None = None) -> str:
        return self.const(self.rng.standard_normal(shape), name)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = self.fresh(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [output], f"{output}_n", **attributes))
        return output

    def numbers(self, channels: int) -> list[str]:
        signs = self.rng.choice([-1.0, 1.0], channels)
        signs[0] = 0
        gamma = signs * self.rng.uniform(0.5, 2, channels)
        return [
            self.const(v) for v in (gamma, *self.rng.standard_normal((2, channels)), self.rng.uniform(0.5, 2, channels))
        ]

    def norm(self, x: str, channels: int, numbers: list[str] | None = None) -> str:
        return self.node("BatchNormalization", x, *(numbers or self.numbers(channels)))

    def conv(
        self, x: str, channels: int = 4, outputs: int = 4, *, bias: bool = False, w: str = "", **attributes: Any
    ) -> str:
        constants = [w or self.random(outputs, channels, 3, 3), *(self.random(outputs) for _ in range(bias))]
        return self.node("Conv", x, *constants, **attributes)

    def model(self, *outputs: str) -> onnx.ModelProto:
        ends = [helper.make_tensor_value_info(name, self.kind, None) for name in outputs]
        made = helper.make_graph(self.nodes, "g", self.inputs, ends, self.held)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.ir)
        known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
        for value, other in zip(model.graph.output, known, strict=True):
            value.CopyFrom(other)
        return model


def graph(**options: Any) -> Callable[[Callable[[Build], list[str]]], Callable[[Build], list[str]]]:
    """Enter a graph under the name of the function that builds it."""

    def enter(make: Callable[[Build], list[str]]) -> Callable[[Build], list[str]]:
        def build() -> onnx.ModelProto:
            b = Build(**options)
            return b.model(*make(b))

        GRAPHS[make.__name__.replace("_", " ")] = build
        return make

    return enter


@graph()
def conv_then_norm(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6)), 4)]


@graph()
def conv_with_bias_and_padding(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6), bias=True, pads=[1] * 4), 4)]


@graph()
def depthwise(b: Build) -> list[str]:
    return [b.norm(b.node("Conv", b.input(2, 4, 6, 6), b.random(4, 1, 3, 3), group=4), 4)]


@graph()
def transposed(b: Build) -> list[str]:
    return [b.norm(b.node("ConvTranspose", b.input(2, 4, 6, 6), b.random(4, 6, 3, 3)), 6)]


@graph()
def transposed_in_groups(b: Build) -> list[str]:
    return [b.norm(b.node("ConvTranspose", b.input(2, 4, 6, 6), b.random(4, 3, 3, 3), group=2), 6)]


@graph()
def transposed_in_equal_groups(b: Build) -> list[str]:
    return [b.norm(b.node("ConvTranspose", b.input(2, 4, 6, 6), b.random(4, 2, 3, 3), group=2, strides=[2, 2]), 4)]


@graph(opset=15)
def opset_15(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6)), 4)]


@graph(opset=9, ir=4)
def opset_9(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6)), 4)]


@graph(form="Constant")
def weights_as_constants(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6)), 4)]


@graph()
def norm_then_conv(b: Build) -> list[str]:
    return [b.conv(b.norm(b.node("Relu", b.input(2, 4, 6, 6)), 4))]


@graph()
def norm_then_padded_conv(b: Build) -> list[str]:
    return [b.conv(b.norm(b.node("Relu", b.input(2, 4, 6, 6)), 4), pads=[1] * 4)]


@graph()
def relu_between(b: Build) -> list[str]:
    return [b.conv(b.norm(b.node("Relu", b.conv(b.input(2, 4, 8, 8))), 4))]


@graph()
def shared_weights(b: Build) -> list[str]:
    x, w = b.input(2, 4, 6, 6), b.random(4, 4, 3, 3)
    return [b.norm(b.conv(x, w=w), 4), b.norm(b.conv(x, w=w), 4), b.conv(x, w=w)]


@graph()
def shared_bias(b: Build) -> list[str]:
    x, c = b.input(2, 4, 6, 6), b.random(4)
    one, two = (b.node("Conv", x, b.random(4, 4, 3, 3), c) for _ in range(2))
    return [b.norm(one, 4), two]


@graph()
def shared_norm_numbers(b: Build) -> list[str]:
    numbers = b.numbers(4)
    y = b.norm(b.conv(b.input(2, 4, 8, 8)), 4, numbers)
    return [b.norm(b.conv(b.node("Relu", y)), 4, numbers)]


@graph()
def conv_read_twice(b: Build) -> list[str]:
    y = b.conv(b.input(2, 4, 6, 6))
    return [b.norm(y, 4), b.node("Relu", y)]


@graph()
def conv_is_an_output(b: Build) -> list[str]:
    y = b.conv(b.input(2, 4, 6, 6))
    return [b.norm(y, 4), y]


@graph()
def norm_output_is_read_and_an_output(b: Build) -> list[str]:
    y = b.norm(b.conv(b.input(2, 4, 6, 6)), 4)
    return [y, b.node("Relu", y)]


@graph()
def weight_may_be_overridden(b: Build) -> list[str]:
    w = b.random(4, 4, 3, 3, name="w")
    b.input(4, 4, 3, 3, name="w")
    return [b.norm(b.conv(b.input(2, 4, 6, 6), w=w), 4)]


@graph()
def scale_may_be_overridden(b: Build) -> list[str]:
    numbers = b.numbers(4)
    b.input(4, name=numbers[0])
    return [b.norm(b.conv(b.input(2, 4, 6, 6)), 4, numbers)]


@graph()
def gemm(b: Build) -> list[str]:
    return [b.norm(b.node("Gemm", b.input(3, 4), b.random(5, 4), b.random(5), transB=1), 5)]


@graph()
def gemm_with_beta(b: Build) -> list[str]:
    return [b.norm(b.node("Gemm", b.input(3, 4), b.random(4, 5), b.random(5), beta=2.0), 5)]


@graph()
def gemm_with_alpha(b: Build) -> list[str]:
    return [b.norm(b.node("Gemm", b.input(3, 4), b.random(4, 5), b.random(5), alpha=0.5), 5)]


@graph()
def gemm_with_a_bias_for_each_row(b: Build) -> list[str]:
    return [b.norm(b.node("Gemm", b.input(5, 4), b.random(4, 5), b.random(5, 1)), 5)]


@graph()
def gemm_without_bias(b: Build) -> list[str]:
    return [b.norm(b.node("Gemm", b.input(3, 4), b.random(4, 5)), 5)]


@graph()
def gemm_transposed(b: Build) -> list[str]:
    return [b.norm(b.node("Gemm", b.input(4, 3), b.random(4, 5), b.random(1), transA=1), 5)]


@graph()
def matmul_add(b: Build) -> list[str]:
    return [b.norm(b.node("Add", b.node("MatMul", b.input(3, 4), b.random(4, 5)), b.random(5)), 5)]


@graph()
def matmul_of_a_square_sequence(b: Build) -> list[str]:
    return [b.norm(b.node("Add", b.node("MatMul", b.input(2, 4, 3), b.random(3, 4)), b.random(4)), 4)]


@graph()
def conv_then_constant(b: Build) -> list[str]:
    return [b.norm(b.node("Add", b.conv(b.input(2, 4, 6, 6)), b.random(4, 1, 1)), 4)]


@graph()
def conv_times_constant(b: Build) -> list[str]:
    return [b.norm(b.node("Mul", b.conv(b.input(2, 4, 6, 6)), b.random(4, 1, 1)), 4)]


@graph()
def sum_of_two(b: Build) -> list[str]:
    x = b.input(2, 4, 6, 6)
    return [b.norm(b.node("Add", b.conv(x), b.conv(x, bias=True)), 4)]


@graph()
def concat_of_two(b: Build) -> list[str]:
    x = b.input(2, 4, 6, 6)
    return [b.norm(b.node("Concat", b.conv(x, outputs=3), b.conv(x, outputs=2), axis=1), 5)]


@graph()
def flatten_between(b: Build) -> list[str]:
    y = b.norm(b.node("Relu", b.input(2, 4, 3, 3)), 4)
    return [b.node("Gemm", b.node("Flatten", y), b.random(36, 5), b.random(5))]


@graph()
def average_between(b: Build) -> list[str]:
    return [b.norm(b.node("AveragePool", b.conv(b.input(2, 4, 6, 6)), kernel_shape=[2, 2]), 4)]


@graph()
def average_over_padding_between(b: Build) -> list[str]:
    y = b.node("AveragePool", b.conv(b.input(2, 4, 6, 6)), kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1)
    return [b.norm(y, 4)]


@graph()
def maximum_between(b: Build) -> list[str]:
    y = b.norm(b.node("Relu", b.input(2, 4, 6, 6)), 4)
    return [b.conv(b.node("MaxPool", y, kernel_shape=[2, 2]))]


@graph()
def pad_between(b: Build) -> list[str]:
    y = b.norm(b.node("Relu", b.input(2, 4, 6, 6)), 4)
    return [b.conv(b.node("Pad", y, b.const(np.array([0, 0, 1, 1, 0, 0, 1, 1]))))]


@graph()
def two_norms(b: Build) -> list[str]:
    return [b.norm(b.norm(b.conv(b.input(2, 4, 6, 6)), 4), 4)]


@graph()
def norm_after_norm_of_an_input(b: Build) -> list[str]:
    return [b.conv(b.norm(b.norm(b.input(2, 4, 6, 6), 4), 4))]


@graph()
def inside_of_branches(b: Build) -> list[str]:
    x, _ = b.input(2, 4, 6, 6), b.input(name="c", kind=TensorProto.BOOL)
    graphs = []
    for n in range(2):
        outer, b.nodes = b.nodes, []
        y = b.norm(b.conv(x), 4)
        graphs.append(helper.make_graph(b.nodes, f"g{n}", [], [helper.make_tensor_value_info(y, b.kind, [2, 4, 4, 4])]))
        b.nodes = outer
    return [b.node("If", "c", then_branch=graphs[0], else_branch=graphs[1])]


@graph(dtype="float16")
def half_that_overflows(b: Build) -> list[str]:
    y = b.node("Conv", b.input(1, 4, 3, 3), b.const(np.full((4, 4, 1, 1), 60000.0)))
    numbers = [b.const(v) for v in (np.full(4, 4.0), np.zeros(4), np.zeros(4), np.ones(4))]
    return [b.node("BatchNormalization", y, *numbers)]


@graph(dtype="float16")
def half(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6)), 4)]


@graph()
def a_tiny_variance(b: Build) -> list[str]:
    y = b.conv(b.input(2, 4, 6, 6))
    numbers = [b.const(v) for v in (np.ones(4), np.zeros(4), np.zeros(4), np.full(4, 1e-12))]
    return [b.node("BatchNormalization", y, *numbers, epsilon=1e-3)]


@graph()
def computed_weight(b: Build) -> list[str]:
    return [b.norm(b.conv(b.input(2, 4, 6, 6), w=b.node("Tanh", b.random(4, 4, 3, 3))), 4)]


def inputs_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return values for every input, those among them that have an initializer too."""
    rng = np.random.default_rng(7)
    made: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        size = 1e-4 if dtype == np.float16 and shape[0] == 1 else 1.0
        made[value.name] = (
            (size * rng.standard_normal(shape)).astype(dtype) if dtype.kind == "f" else np.ones(shape, dtype)
        )
    return made
