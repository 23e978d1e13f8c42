"""What the float64 proof is computed with, held to the stock evaluator and to torch."""

from itertools import product

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from batchnorm.onnx.kernels import KERNELS
from batchnorm.onnx.model import OnnxModel
from batchnorm.onnx.tensors import array, tensor
from onnx_graphs import LATEST, TYPES, Build

CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def both(model, x):
    fast, stock = ReferenceEvaluator(model, new_ops=KERNELS), ReferenceEvaluator(model)
    return fast.run(None, {"x": x})[0], stock.run(None, {"x": x})[0]


def one(op, shape, *weights, dtype="float64", opset=17, **attributes):
    b = Build(dtype, opset=opset)
    x = b.input(shape)
    constants = [w if isinstance(w, str) else b.const(w, dtype=str(w.dtype)) for w in weights]
    return b.model(b.node(op, x, *constants, **attributes))


def near(a, b, bound=1e-13):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(a.astype(float) - b.astype(float)).max(initial=0) <= bound * np.abs(b.astype(float)).max(
        initial=1e-30
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(rng, rank, groups):
    for stride, dilation, pad, bias in product((1, 2), (1, 2), (0, 2), (False, True)):
        x = rng.standard_normal((2, 4, *range(7, 7 + rank)))
        w, b = rng.standard_normal((8, 4 // groups, *[3] * rank)), rng.standard_normal(8)
        geometry = {
            "strides": [stride] * rank,
            "dilations": [dilation] * rank,
            "pads": [pad] * 2 * rank,
            "group": groups,
        }
        got, stock = both(one("Conv", x.shape, w, *[b] * bias, **geometry), x)
        near(got, stock)
        args = torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(b) if bias else None
        near(got, CONVOLUTIONS[rank](*args, stride, pad, dilation, groups).numpy())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolutions(rng, rank, groups):
    for stride, dilation, pad, bias in product((1, 2), (1, 2), (0, 1), (False, True)):
        more = stride - 1
        x = rng.standard_normal((2, 4, *range(5, 5 + rank)))
        w, b = (
            rng.standard_normal((4, 6 // groups if groups < 4 else 3, *[3] * rank)),
            rng.standard_normal(6 if groups < 4 else 12),
        )
        geometry = {
            "strides": [stride] * rank,
            "dilations": [dilation] * rank,
            "pads": [pad] * 2 * rank,
            "group": groups,
            "output_padding": [more] * rank,
        }
        model = one("ConvTranspose", x.shape, w, *[b] * bias, **geometry)
        got = ReferenceEvaluator(model, new_ops=KERNELS).run(None, {"x": x})[0]
        args = torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(b) if bias else None
        near(got, TRANSPOSED[rank](*args, stride, pad, more, groups, dilation).numpy())


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(rng, mode):
    for stride, size in product((1, 2, 3), (6, 7)):
        x = rng.standard_normal((1, 2, size, size + 1))
        w = rng.standard_normal((3, 2, 3, 2))
        near(*both(one("Conv", x.shape, w, auto_pad=mode, strides=[stride] * 2), x))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools(rng, op):
    torch_pool = {"MaxPool": torch.max_pool2d, "AveragePool": torch.nn.functional.avg_pool2d}[op]
    for kernel, stride, pad, up, counted in product((2, 3), (1, 2), (0, 1), (0, 1), (0, 1)):
        x = rng.standard_normal((2, 3, 7, 8))
        more = {"count_include_pad": counted} if op == "AveragePool" else {}
        model = one(
            op, x.shape, opset=19, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, ceil_mode=up, **more
        )
        got = ReferenceEvaluator(model, new_ops=KERNELS).run(None, {"x": x})[0]
        args = (1, bool(up)) if op == "MaxPool" else (bool(up), bool(counted))
        near(got, torch_pool(torch.from_numpy(x), kernel, stride, pad, *args).numpy())


def test_a_dilated_average(rng):
    x = rng.standard_normal((1, 2, 9, 9))
    model = one("AveragePool", x.shape, opset=19, kernel_shape=[2, 3], dilations=[2, 2])
    near(*both(model, x))


@pytest.mark.parametrize("where", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_interpolation(rng, where, mode):
    x = rng.standard_normal((1, 2, 4, 5))
    for sizes, nearest in product(
        ([1, 2, 8, 10], [1, 2, 7, 3], [1, 2, 4, 11]), ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ):
        model = one(
            "Resize",
            x.shape,
            "",
            "",
            np.array(sizes),
            opset=LATEST,
            mode=mode,
            coordinate_transformation_mode=where,
            nearest_mode=nearest,
        )
        near(*both(model, x))
    # with these and aligned corners, the stock evaluator reckons with 7.5 places, onnxruntime with 7
    scales = np.array([1, 1, 2, 2 if where == "align_corners" else 1.5], np.float32)
    model = one("Resize", x.shape, "", scales, opset=13, mode=mode, coordinate_transformation_mode=where)
    near(*both(model, x))


def test_what_is_not_computed_here_is_handed_on(rng):
    x = rng.standard_normal((1, 2, 6, 6))
    near(
        *both(
            one("ConvTranspose", x.shape, rng.standard_normal((2, 3, 3, 3)), auto_pad="SAME_UPPER", strides=[2, 2]), x
        )
    )
    near(*both(one("Resize", x.shape, "", "", np.array([1, 2, 9, 9]), mode="cubic"), x))
    b = Build("float64")
    values, places = b.node("MaxPool", b.input(x.shape), out=2, kernel_shape=[2, 2])
    model = b.model(values, places, types=[onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64])
    got, want = (ReferenceEvaluator(model, new_ops=o).run(None, {"x": x}) for o in (KERNELS, None))
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_bfloat16_is_rounded_to_nearest(rng):
    kind = onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    # the second and third lie in the middle between two
    special = [0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, np.inf, -np.inf, np.nan, 1e-45]
    values = np.array([*special, *rng.standard_normal(1000)], np.float32)
    made = tensor(values, "t", TensorProto.BFLOAT16)
    assert np.array_equal(array(made), values.astype(kind).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_narrow_numbers(rng, dtype):
    x = rng.standard_normal((1, 4, 6, 6)).astype(dtype)
    got, stock = both(one("Conv", x.shape, rng.standard_normal((4, 4, 3, 3)).astype(dtype), dtype=dtype), x)
    near(got, stock, {"float16": 1e-2, "float32": 1e-5}[dtype])


@pytest.mark.parametrize("inside", [False, True])
def test_a_float64_copy_computes_what_a_float64_model_does(rng, inside):
    """Casts, constants, shapes made of floats, subgraphs, and an operator that knows no float64."""
    weights, x = rng.standard_normal((4, 3, 3, 3)).astype("f"), rng.standard_normal((2, 3, 6, 6)).astype("f")
    outputs = []
    for dtype in ("float32", "float64"):
        b = Build(dtype)
        kind = TYPES[dtype]
        y = b.node("Conv", b.input([2, 3, 6, 6]), b.const(weights, form="Constant"))
        whole = b.node("Cast", b.node("Cast", y, to=TensorProto.INT64), to=kind)
        y = b.node("Mul", b.node("Add", y, whole), b.const(np.array(0.3, "f"), form="Constant"))
        scales = b.node("Cast", b.const(np.array([1, 1, 2, 3])), to=TensorProto.FLOAT)
        y = b.node("Resize", y, "", scales)
        if inside:
            then = helper.make_node("LeakyRelu", [y], ["then"], alpha=0.3)
            other = [helper.make_node("Cast", [y], ["other"], to=kind)]
            info = [helper.make_tensor_value_info(n, kind, [2, 4, 8, 12]) for n in ("then", "other")]
            branches = [helper.make_graph(*v) for v in (([then], "a", [], info[:1]), (other, "b", [], info[1:]))]
            y = b.node("If", b.const(np.array(True)), then_branch=branches[0], else_branch=branches[1])
        model = OnnxModel(b.model(b.node("Exp", y)))
        outputs.append(model if dtype == "float64" else model.cast("float64"))
    assert outputs[0].precision == "float64"
    got, want = (model.outputs({"x": x})[0] for model in outputs)
    near(got, want, 1e-15)
