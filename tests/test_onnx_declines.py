"""Graphs in which folding would be wrong: declined with a reason, every output as it was."""

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm.errors import DataError, OptionError
from batchnorm.fold import fold
from batchnorm.graph import Other, Pool
from batchnorm.onnx.model import OnnxModel
from onnx_graphs import TYPES, Build, feeds_of, folded, ops, reasons

CASES = {}


def case(*words, became="scale and shift", opset=17, ir=None, evaluated=True):
    """Name the words that the reason must hold, and what the norm must have become."""

    def enter(make):
        CASES[make.__name__] = (make, words, became, opset, ir, evaluated)
        return make

    return enter


def conv(b, x, channels=4, outputs=4, kernel=3, bias=False, **attributes):
    constants = [b.random(outputs, channels, kernel, kernel), *(b.random(outputs) for _ in range(bias))]
    return b.node("Conv", x, *constants, name=b.fresh("conv"), **attributes)


def image(b, channels=4):
    return b.input([2, channels, 6, 6])


# -- the layer itself ----------------------------------------------------------------------------------------------


@case("statistics of the batch", became="unchanged", evaluated=False)
def training_mode(b):
    y = b.norm(conv(b, image(b)), 4, training_mode=1)
    return [y]


@case("statistics of the batch", became="unchanged", opset=9, evaluated=False)
def outputs_of_training(b):
    numbers = [b.const(v) for v in (np.ones(4), np.zeros(4), np.zeros(4), np.ones(4))]
    y, *_ = b.node("BatchNormalization", conv(b, image(b)), *numbers, out=5)
    return [y]


@case("each place on its own", became="unchanged", opset=7, evaluated=False)
def each_place_on_its_own(b):
    numbers = [b.const(np.abs(b.rng.standard_normal((4, 4, 4))) + 0.1) for _ in range(4)]
    return [b.node("BatchNormalization", conv(b, image(b)), *numbers, spatial=0)]


@case("not finite", became="unchanged", evaluated=False)
def a_scale_that_is_not_finite(b):
    return [b.norm(conv(b, image(b)), 4, gamma=[1, np.inf, 1, 1])]


@case("negative", became="unchanged", evaluated=False)
def a_negative_variance(b):
    numbers = [b.const(v) for v in (np.ones(4), np.zeros(4), np.zeros(4), np.array([1, 1, -1.0, 1]))]
    return [b.node("BatchNormalization", conv(b, image(b)), *numbers)]


@case("scale is infinite", became="unchanged", evaluated=False)
def a_variance_of_zero(b):
    numbers = [b.const(v) for v in (np.ones(4), np.zeros(4), np.zeros(4), np.array([1, 0, 1.0, 1]))]
    return [b.node("BatchNormalization", conv(b, image(b)), *numbers, epsilon=0.0)]


@case("is computed by Exp", became="unchanged")
def a_computed_scale(b):
    numbers = [b.const(v) for v in (np.zeros(4), np.zeros(4), np.ones(4))]
    return [b.node("BatchNormalization", conv(b, image(b)), b.node("Exp", b.random(4)), *numbers)]


@case("gamma is an input of the model", "unchanged", became="unchanged")
def a_scale_from_outside(b):
    numbers = [b.const(v) for v in (np.zeros(4), np.zeros(4), np.ones(4))]
    return [b.node("BatchNormalization", conv(b, image(b)), b.input([4], "gamma"), *numbers)]


@case("which a caller may override", became="unchanged")
def a_scale_that_may_be_overridden(b):
    y = b.norm(conv(b, image(b)), 4)
    b.inputs.append(helper.make_tensor_value_info("bn_g", TYPES[b.dtype], [4]))
    return [y]


@case("its input is a constant", became="unchanged")
def a_normalized_weight(b):
    return [b.node("Conv", image(b), b.norm(b.random(4, 4, 3, 3), 4))]


# -- the weights beside it -----------------------------------------------------------------------------------------


@case("which a caller may override")
def a_weight_that_may_be_overridden(b):
    w = b.random(4, 4, 3, 3, name="w")
    b.inputs.append(helper.make_tensor_value_info("w", TYPES[b.dtype], [4, 4, 3, 3]))
    return [b.norm(b.node("Conv", image(b), w), 4)]


@case("which a caller may override")
def a_bias_that_may_be_overridden(b):
    w, c = b.random(4, 4, 3, 3), b.random(4, name="c")
    b.inputs.append(helper.make_tensor_value_info("c", TYPES[b.dtype], [4]))
    return [b.norm(b.node("Conv", image(b), w, c), 4)]


@case("w is an input of the model")
def a_weight_from_outside(b):
    return [b.norm(b.node("Conv", image(b), b.input([4, 4, 3, 3], "w")), 4)]


@case("is computed by Tanh")
def a_computed_weight(b):
    return [b.norm(b.node("Conv", image(b), b.node("Tanh", b.random(4, 4, 3, 3))), 4)]


@case("is computed by Cast")
def a_cast_weight(b):
    w = b.const(b.rng.standard_normal((4, 4, 3, 3)), dtype="float16")
    return [b.norm(b.node("Conv", image(b), b.node("Cast", w, to=TYPES[b.dtype])), 4)]


@case("is computed by Neg")
def a_computed_bias(b):
    return [b.norm(b.node("Conv", image(b), b.random(4, 4, 3, 3), b.node("Neg", b.random(4))), 4)]


@case("Conv", "BatchNormalization")
def weights_made_by_another_norm(b):
    w = b.norm(b.node("Abs", b.input([4, 4, 3, 3], "w")), 4, "inner")
    return [b.node("Conv", image(b), w)]


@case("not one number for each output")
def a_bias_for_each_row(b):
    y = b.node("Gemm", b.input([3, 4]), b.random(4, 5), b.random(3, 1))
    return [b.norm(y, 5)]


@case("not one number for each output")
def a_bias_for_each_place(b):
    return [b.norm(b.node("Gemm", b.input([3, 4]), b.random(4, 5), b.random(3, 5)), 5)]


@case("without rounding")
def a_factor_that_rounds(b):
    return [b.norm(b.node("Gemm", b.input([3, 4]), b.random(4, 5), b.random(5), alpha=0.1, beta=0.3), 5)]


@case("neither linear")
def a_product_of_two_inputs(b):
    return [b.norm(b.node("MatMul", b.input([2, 5, 4]), b.input([2, 4, 6], "z")), 5)]


@case("neither linear")
def a_matrix_for_each_sample(b):
    return [b.norm(b.node("MatMul", b.input([2, 5, 4]), b.random(2, 4, 6)), 5)]


@case("another axis")
def the_axis_of_a_sequence(b):
    # as many places as channels
    return [b.norm(b.node("MatMul", b.input([2, 4, 3]), b.random(3, 4)), 4)]


@case("is used by", "too")
def a_convolution_that_is_read_twice(b):
    y = conv(b, image(b))
    return [b.norm(y, 4), b.node("Relu", y)]


@case("is used by", "too")
def two_norms_of_one_convolution(b):
    y = conv(b, image(b))
    return [b.norm(y, 4, "one"), b.norm(y, 4, "two")]


@case("output of the model")
def a_convolution_that_is_an_output(b):
    y = conv(b, image(b))
    return [b.norm(y, 4), y]


@case("output of the model")
def a_norm_that_is_an_output(b):
    y = b.norm(b.node("Relu", image(b)), 4)
    return [conv(b, y), y]


# -- what is between -----------------------------------------------------------------------------------------------


@case("pads with zeros")
def into_a_padded_convolution(b):
    return [conv(b, b.norm(b.node("Relu", image(b)), 4), pads=[1, 0, 0, 0])]


@case("pads with zeros")
def into_an_automatically_padded_convolution(b):
    return [conv(b, b.norm(b.node("Relu", image(b)), 4), auto_pad="SAME_UPPER")]


@case("pads with zeros")
def into_a_convolution_that_would_pad_other_sizes(b):
    # 6 places by 2: nothing is padded here, an odd size would be
    return [conv(b, b.norm(b.node("Relu", image(b)), 4), kernel=2, auto_pad="SAME_LOWER", strides=[2, 2])]


@case("transposed convolution")
def a_shift_into_a_transposed_convolution(b):
    y = b.norm(b.node("Relu", image(b)), 4)
    return [b.node("ConvTranspose", y, b.random(4, 3, 2, 2), strides=[2, 2])]


@case("nothing but a positive scale")
def behind_a_relu(b):
    return [b.norm(b.node("Relu", conv(b, image(b))), 4)]


@case("sigmoid", "neither linear nor commutes")
def behind_a_sigmoid(b):
    return [b.norm(b.node("Sigmoid", conv(b, image(b))), 4)]


@case("nothing but a positive scale")
def behind_a_multiplication(b):
    return [b.norm(b.node("Mul", conv(b, image(b)), b.random(4, 1, 1)), 4)]


@case("Mul")
def behind_a_product(b):
    y = conv(b, image(b))
    return [b.norm(b.node("Mul", y, b.node("Sigmoid", y)), 4)]


@case("Mul")
def a_constant_that_widens(b):
    y = b.node("Conv", b.input([1, 4, 6, 6]), b.random(4, 4, 6, 6))
    return [b.norm(b.node("Mul", y, b.random(1, 4, 3, 3)), 4)]


@case("Div")
def a_constant_by_the_data(b):
    return [b.norm(b.node("Div", b.random(4, 1, 1), b.node("Exp", conv(b, image(b)))), 4)]


@case("PRelu")
def a_slope_from_outside(b):
    return [b.norm(b.node("PRelu", conv(b, image(b)), b.input([4, 1, 1], "slope")), 4)]


@case("nothing but a positive scale")
def behind_a_leaky_relu(b):
    return [b.norm(b.node("LeakyRelu", conv(b, image(b)), alpha=0.3), 4)]


@case("positive scales only")
def a_negative_scale_and_a_maximum(b):
    y = b.node("MaxPool", b.norm(b.node("Relu", image(b)), 4), kernel_shape=[2, 2])
    return [conv(b, y)]


@case("MaxPool")
def a_maximum_with_its_place(b):
    y, places = b.node("MaxPool", conv(b, image(b)), out=2, kernel_shape=[2, 2])
    return [b.norm(y, 4, signs=False), b.node("Cast", places, to=TYPES[b.dtype])]


@case("clip", "neither linear")
def a_maximum_of_nothing_but_padding(b):
    y = b.node("MaxPool", conv(b, image(b)), kernel_shape=[2, 2], dilations=[5, 5], pads=[1, 1, 1, 1])
    return [b.norm(b.node("Clip", y, b.const(np.array(-9.0))), 4, signs=False)]


@case("averages zeros from outside")
def an_average_over_padding(b):
    y = conv(b, image(b))
    y = b.node("AveragePool", y, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    return [b.norm(y, 4)]


@case("averages zeros from outside", opset=19)
def an_average_over_a_ragged_edge(b):
    y = conv(b, image(b))
    y = b.node("AveragePool", y, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1)
    return [b.norm(y, 4)]


@case("Resize")
def a_cubic_interpolation(b):
    y = b.node("Resize", conv(b, image(b)), "", b.const(np.array([1, 1, 2, 2.0]), dtype="float32"), mode="cubic")
    return [b.norm(y, 4)]


@case("Resize")
def an_interpolation_with_an_outside(b):
    box = b.const(np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5]), dtype="float32")
    scales = b.const(np.array([1, 1, 2, 2.0]), dtype="float32")
    how = "tf_crop_and_resize"
    return [b.norm(b.node("Resize", conv(b, image(b)), box, scales, coordinate_transformation_mode=how), 4)]


@case("works along the axis")
def an_interpolation_of_channels(b):
    scales = b.const(np.array([1, 2, 1, 1.0]), dtype="float32")
    return [b.norm(b.node("Resize", conv(b, image(b)), "", scales), 8)]


@case("pads with a constant")
def a_constant_border(b):
    y = b.node("Pad", conv(b, image(b)), b.const(np.array([0, 0, 1, 1, 0, 0, 1, 1])), b.const(np.array(0.5)))
    return [b.norm(y, 4)]


@case("works along the axis")
def a_border_of_channels(b):
    y = b.node("Pad", conv(b, image(b)), b.const(np.array([0, 1, 0, 0, 0, 0, 0, 0])), mode="reflect")
    return [b.norm(y, 5)]


@case("Pad")
def a_border_from_outside(b):
    x, amounts = image(b), b.input([8], "amounts", dtype="int64")
    return [b.norm(b.node("Pad", conv(b, x), amounts), 6)]


@case("works along the axis")
def a_mean_over_channels(b):
    y = b.node("ReduceMean", b.norm(b.node("Relu", image(b)), 4), axes=[1, 2], keepdims=0)
    return [b.node("MatMul", y, b.random(6, 3))]


@case("another axis")
def a_norm_of_what_were_columns(b):
    y = b.node("ReduceMean", conv(b, image(b)), axes=[1, 2], keepdims=0)
    return [b.node("Relu", b.norm(y, 4))]


@case("another axis")
def a_reshape_that_mixes_channels(b):
    y = b.norm(b.node("Relu", b.input([2, 4, 3])), 4)
    y = b.node("Reshape", y, b.const(np.array([2, 2, 6])))
    return [b.node("MatMul", y, b.random(6, 5))]


@case("another axis")
def a_transposed_product(b):
    y = b.norm(b.node("Relu", b.input([2, 4, 3])), 4)
    return [b.node("MatMul", y, b.random(3, 5))]


@case("not scaled")
def into_a_sum(b):
    x = image(b)
    y = b.node("Add", b.norm(b.node("Relu", x), 4), b.node("Sigmoid", x))
    return [conv(b, y)]


@case("nothing of the model comes before")
def behind_a_sum_with_a_constant(b):
    return [b.norm(b.node("Add", conv(b, image(b)), b.random(2, 4, 4, 4)), 4)]


@case("Add")
def behind_a_sum_that_broadcasts(b):
    x = image(b)
    small = b.node("GlobalAveragePool", conv(b, x))
    return [b.norm(b.node("Add", conv(b, x), small), 4)]


@case("reads it twice")
def a_concatenation_with_itself(b):
    y = b.norm(b.node("Relu", image(b)), 4)
    return [conv(b, b.node("Concat", y, y, axis=1), channels=8)]


@case("nothing of the model comes before")
def behind_a_concatenation_with_a_constant(b):
    y = b.node("Concat", conv(b, image(b)), b.random(2, 2, 4, 4), axis=1)
    return [b.node("Relu", b.norm(y, 6))]


@case("used by", "too")
def a_branch_of_a_concatenation(b):
    y = conv(b, image(b))
    return [b.norm(b.node("Concat", y, b.node("Relu", y), axis=1), 8)]


@case("Softmax")
def behind_a_softmax(b):
    return [b.norm(b.node("Softmax", conv(b, image(b)), axis=1), 4)]


@case("Dropout")
def behind_a_dropout_that_is_on(b):
    y = b.node("Dropout", conv(b, image(b)), b.const(np.array(0.0)), b.const(np.array(True)))
    return [b.norm(y, 4)]


@case("Cast")
def behind_a_cast(b):
    y = b.node("Cast", conv(b, image(b)), to=TensorProto.FLOAT)
    return [b.norm(b.node("Cast", y, to=TYPES[b.dtype]), 4)]


@case("Split")
def behind_a_split(b):
    y, z = (
        b.node("Split", conv(b, image(b)), out=2, axis=1, num_outputs=2)
        if b.opset > 17
        else b.node("Split", conv(b, image(b)), out=2, axis=1)
    )
    return [b.norm(y, 2), z]


@case("Slice")
def behind_a_slice(b):
    bounds = [b.const(np.array([n])) for n in (1, 3, 1)]
    return [b.norm(b.node("Slice", conv(b, image(b)), *bounds), 2)]


@case("InstanceNormalization")
def behind_another_normalization(b):
    return [b.norm(b.node("InstanceNormalization", conv(b, image(b)), b.random(4), b.random(4)), 4)]


@pytest.mark.parametrize("form", ["initializer", "Constant"])
@pytest.mark.parametrize("name", CASES)
def test_declined(name, form):
    make, words, became, opset, ir, evaluated = CASES[name]
    if "overridden" in name:
        form = "initializer"
    b = Build("float32" if "rounds" in name else "float64", opset=opset, ir=ir, form=form)
    model = b.model(*make(b), check=True)
    feeds = feeds_of(model)
    if "amounts" in feeds:
        feeds["amounts"] = np.array([0, 1, 0, 0, 0, 1, 0, 0])
    if evaluated:
        result = folded(model, feeds, feeds=feeds, bound=1e-11 if b.dtype == "float64" else 1e-5)
    else:
        result = fold(model, feeds)
    assert all(word in reasons(result) for word in words), reasons(result)
    assert became in {k.became for k in result.kept}, reasons(result)
    left = "BatchNormalization" in ops(result.model)
    assert left == (became == "unchanged")


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "how",
    [
        {"dilations": [5, 5], "pads": [1] * 4},
        {"dilations": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [3, 3], "ceil_mode": 1},
        {"strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 0, 0]},
    ],
)
def test_windows_that_may_hold_nothing_but_padding(op, how):
    b = Build("float32", opset=19)
    model = b.model(b.node(op, b.input([2, 4, 4, 4]), kernel_shape=[2, 2], **how))
    (node,) = OnnxModel(model).graph(None).nodes
    assert node.operation in (Other("MaxPool"), Pool("average", (2, 3), counted_padding=True))


def test_there_is_a_case_for_each_kind_of_word():
    assert len(CASES) > 60


# -- look-alikes of the above that do fold --------------------------------------------------------------------------


def shuffled(b):
    y = b.node("Reshape", conv(b, image(b)), b.const(np.array([2, 2, 2, 4, 4])))
    return b.node("Reshape", b.node("Transpose", y, perm=[0, 2, 1, 3, 4]), b.const(np.array([2, 4, 4, 4])))


def flat_and_back(b):
    return b.node("Unsqueeze", b.node("Flatten", conv(b, image(b), kernel=6)), b.const(np.array([2])))


def averaged(**how):
    return lambda b: b.node("AveragePool", conv(b, image(b)), kernel_shape=[3, 3], **how)


def interpolated(b):
    return b.node("Resize", conv(b, image(b)), "", "", b.const(np.array([2, 4, 9, 9])), mode="linear")


def bordered(*amounts, value=(), **how):
    return lambda b: b.node("Pad", conv(b, image(b)), b.const(np.array(amounts)), *map(b.const, value), **how)


def a_size_that_is_read(b):
    y = conv(b, image(b))
    return b.node("Reshape", y, b.node("Shape", y))


ACCEPTED = {
    "a shuffle of channels": shuffled,
    "flat and back": flat_and_back,
    "a mean over places": lambda b: b.node("ReduceMean", conv(b, image(b)), axes=[2, 3], keepdims=0),
    "an average without padding": averaged(count_include_pad=1),
    "an average that leaves out padding": averaged(pads=[1] * 4),
    "an average with a ragged edge": averaged(strides=[2, 2], ceil_mode=1),
    "a linear interpolation": interpolated,
    "a reflected border": bordered(0, 0, 1, 2, 0, 0, 3, 1, mode="reflect"),
    "dropout": lambda b: b.node("Dropout", conv(b, image(b)), b.const(np.array(0.5))),
    "a sum": lambda b: b.node("Sum", conv(b, image(b)), conv(b, "x"), conv(b, "x")),
    "a concatenation": lambda b: b.node("Concat", conv(b, image(b), outputs=3), conv(b, "x", outputs=1), axis=-3),
    "a sum with a constant vector": lambda b: b.node("Add", conv(b, image(b)), b.random(4, 1, 1)),
    "a size that is read": a_size_that_is_read,
    "automatic padding": lambda b: conv(b, image(b), auto_pad="SAME_LOWER"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    b = Build("float64", opset=17)
    y = ACCEPTED[name](b)
    result = folded(b.model(b.norm(y, 4)), bound=1e-11)
    assert not result.kept, reasons(result)


def test_a_cut_passes():
    b = Build("float32")
    model = b.model(b.norm(bordered(0, 0, -1, 0, 0, 0, -1, 0, value=[np.array(7.0)])(b), 4))
    # the stock evaluator can't cut
    result = fold(model)
    assert not result.kept
    assert not result.error.note
    got, want = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, feeds_of(model)
        )[0]
        for m in (result.model, model)
    )
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_a_positive_scale_passes_a_relu_and_a_maximum():
    b = Build("float64")
    y = b.node("Relu", conv(b, image(b)))
    y = b.norm(b.node("MaxPool", y, kernel_shape=[2, 2]), 4, signs=False, shift=False)
    assert not folded(b.model(b.node("Sigmoid", y))).kept


def test_a_shift_free_scale_passes_a_padded_convolution():
    b = Build("float64")
    y = conv(b, b.norm(b.node("Sigmoid", image(b)), 4, shift=False), pads=[1] * 4)
    assert not folded(b.model(y)).kept


# -- functions, old versions, odd examples -------------------------------------------------------------------------


def test_a_norm_inside_of_a_function():
    b = Build("float64")
    y = b.node("Conv", image(b), b.random(4, 4, 3, 3))
    numbers = [b.random(4) for _ in range(3)] + [b.const(np.ones(4))]
    model = b.model(b.norm(y, 4))
    call = helper.make_node("MyNorm", [y, *numbers], ["out"], domain="own")
    model.graph.node[-1].CopyFrom(call)
    model.graph.output[0].name = "out"
    inner = helper.make_node("BatchNormalization", list("xgbmv"), ["y"], name="inside")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.opset_import.extend(imports[1:])
    model.functions.append(helper.make_function("own", "MyNorm", list("xgbmv"), ["y"], [inner], imports[:1]))
    result = folded(model)
    assert "in the function MyNorm: call onnx.inliner.inline_local_functions" in reasons(result)
    assert not folded(onnx.inliner.inline_local_functions(model)).kept


def test_operators_of_another_domain():
    b = Build("float32")
    b.nodes.append(
        helper.make_node(
            "FusedConv", [image(b), b.random(4, 4, 3, 3)], ["y"], "fused", domain="com.microsoft", activation="Relu"
        )
    )
    y = b.norm("y", 4)
    graph = helper.make_graph(
        b.nodes, "g", b.inputs, [helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 4, 4, 4])], b.held
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    result = fold(model)
    assert "FusedConv" in reasons(result)
    assert "not measured in float64" in str(result.error)


def test_an_opset_that_means_something_else():
    b = Build("float32")
    model = b.model(b.norm(conv(b, image(b)), 4))
    model.opset_import[0].version = 6
    del model.graph.node[1].attribute[:]
    with pytest.raises((OptionError, DataError), match=r"opset 7 or later, got 6|must be valid ONNX"):
        fold(model)


def small():
    b = Build("float32")
    return b.model(b.norm(conv(b, b.input(["n", 4, "h", 6])), 4))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"y": np.zeros((2, 4, 6, 6))}, r"for each of the inputs \['x'\], got \['y'\]"),
        ((np.zeros((2, 4, 6, 6)),) * 2, r"for each of the inputs \['x'\], got 2 of them"),
        (np.zeros((2, 3, 6, 6)), r"input 'x' must have the shape \(n, 4, h, 6\), got \(2, 3, 6, 6\)"),
        (np.zeros((2, 4, 6)), r"must have the shape \(n, 4, h, 6\), got \(2, 4, 6\)"),
        (np.zeros((2, 4, 6, 6), np.int64), "input 'x' must be of float32, got int64"),
        (np.array([["a"]]), "input 'x' must be of float32, got <U1"),
    ],
)
def test_examples_that_do_not_fit(example, words):
    with pytest.raises(OptionError, match=words):
        fold(small(), example)


def test_made_up_inputs_that_do_not_fit():
    b = Build("float32")
    y = b.node("Flatten", b.norm(conv(b, b.input([1, 4, "h", "w"])), 4))
    model = b.model(y)
    model.graph.node.append(helper.make_node("Gemm", [y, "w2"], ["end"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((64, 3), "f"), "w2"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("end", TensorProto.FLOAT, [1, 3]))
    with pytest.raises(OptionError, match="give an example"):
        fold(model)
    assert not fold(model, np.zeros((1, 4, 6, 6))).kept


def test_inputs_too_large_to_make():
    b = Build("float32")
    model = b.model(b.norm(conv(b, b.input([2**20, 4, 2**20, 6])), 4))
    with pytest.raises(OptionError, match="too large to be made"):
        fold(model)
    b = Build("float32")
    y = b.norm(conv(b, b.input([2, 4, 6, 6])), 4)
    model = b.model(b.node("Expand", y, b.const(np.array([2**20, 2**20, 1, 1, 1, 1]))))
    with pytest.raises(OptionError, match="too large to be computed"):
        fold(model)
