"""How the normalization of an ONNX model stands, and nodes that are put into their form for inference."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from batchnorm.errors import DataError, OptionError
from batchnorm.fold import fold
from batchnorm.graph import Identity, Other
from batchnorm.onnx.model import OnnxModel
from batchnorm.states import Mend
from onnx_graphs import LATEST, Build, feeds_of, run


def one(opset=17, dtype="float32", form="initializer", **attributes):
    b = Build(opset=opset, dtype=dtype, form=form)
    return b.model(b.norm(b.node("Relu", b.input([2, 3, 4, 4])), 3, "bn", **attributes))


def numbers(b, channels=3, **given):
    values = {
        "g": np.arange(1.0, 1 + channels),
        "b": np.ones(channels),
        "m": np.full(channels, 0.5),
        "v": np.ones(channels),
    }
    return [given.get(key) or b.const(v) for key, v in values.items()]


def in_training(opset=17, outputs=3, read=0, **attributes):
    """Return a model whose norm goes by the batch, of which the first outputs are read."""
    b = Build(opset=opset)
    if opset >= 14:
        attributes["training_mode"] = 1
    made = b.node("BatchNormalization", b.input([8, 3, 4, 4]), *numbers(b), out=outputs, name="bn", **attributes)
    made = [made] if outputs == 1 else made
    y = b.node("Relu", made[0])
    # the reference needs more than Build.model offers here
    outputs = [helper.make_tensor_value_info(y, TensorProto.FLOAT, [8, 3, 4, 4])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in made[1 : 1 + read]]
    graph = helper.make_graph(b.nodes, "g", b.inputs, outputs, b.held)
    graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in made[1 + read :])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=b.ir)
    onnx.checker.check_model(model)
    return model


def branches():
    """Return a model with norms of one name in both branches of an If, and outside."""
    b = Build()
    x, held = b.input([2, 3, 4, 4]), numbers(b)
    made = [helper.make_node("BatchNormalization", ["x", *held], ["y"], "bn") for _ in range(2)]
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4, 4])]
    then, other = (helper.make_graph([node], word, [], ends) for node, word in zip(made, ("then", "else"), strict=True))
    y = b.node("If", b.const(np.array(True)), then_branch=then, else_branch=other, name="choice")
    return b.model(b.norm(b.node("Add", x, y), 3, "outside"), check=False)


def function():
    """Return a model that calls a function with a norm in it."""
    names = ["x", "g", "b", "m", "v"]
    node = helper.make_node("BatchNormalization", names, ["y"], "bn", epsilon=0.25)
    block = helper.make_function("own", "Block", names, ["y"], [node], [helper.make_opsetid("", 17)])
    b = Build()
    x, held = b.input([2, 3, 4, 4]), numbers(b)
    call = helper.make_node("Block", [x, *held], ["z"], "call", domain="own")
    graph = helper.make_graph(
        [call], "g", b.inputs, [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3, 4, 4])], b.held
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[block], ir_version=8)


def state(model, name="bn"):
    return next(s for s in OnnxModel(model).states() if s.name == name)


# -- names ---------------------------------------------------------------------------------------------------------


def unnamed():
    b = Build()
    x = b.node("BatchNormalization", b.input([2, 3, 4, 4]), *numbers(b), name="")
    x = b.node("BatchNormalization", x, *numbers(b), name="same")
    return b.model(b.node("BatchNormalization", x, *numbers(b), name="same"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (one, ["bn"]),
        (unnamed, ["batchnormalization5", "batchnormalization10", "batchnormalization15"]),
        (branches, ["outside", "y", "y_2"]),
        (function, ["bn"]),
        (in_training, ["bn"]),
    ],
)
def test_a_layer_has_one_name_everywhere(make, expected):
    view = OnnxModel(make())
    names = [s.name for s in view.states()]
    assert names == expected
    assert names == [s.name for s in view.statistics()]
    assert sorted(names) == sorted(n.name for n in view.graph(None).norms())
    assert make is function or set(names) <= {layer.name for layer in view.layers(None)}


def test_a_name_that_is_the_output_of_another_is_not_given_twice():
    b = Build()
    x = b.node("BatchNormalization", b.input([2, 3, 4, 4]), *numbers(b), name="")
    model = b.model(b.node("BatchNormalization", x, *numbers(b), name=x))
    assert [s.name for s in OnnxModel(model).states()] == [f"{x}_2", x]


# -- one layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 14, 15, LATEST])
@pytest.mark.parametrize("form", ["initializer", "node"])
def test_what_a_node_stores(opset, form):
    model = one(opset, form=form, epsilon=0.5, momentum=0.75)
    (found,) = OnnxModel(model).states()
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    held |= {
        n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"
    }
    for got, name in zip((found.gamma, found.beta, found.mean, found.variance), "gbmv", strict=True):
        np.testing.assert_array_equal(got, held[f"bn_{name}"].astype(np.float64))
        assert got.dtype == np.float64
    assert (found.kind, found.eps, found.decay, found.updates) == ("BatchNormalization", 0.5, 0.75, None)
    assert (found.by_batch, found.training, found.moves) == (False, False, False)
    assert (found.trainable, found.frozen, found.dtype, found.shared) == (False, True, "float32", ())


def test_what_the_standard_says_where_a_node_does_not():
    found = state(one())
    assert found.decay == 0.9
    assert found.eps == pytest.approx(1e-5, rel=1e-6)
    assert OnnxModel(one()).training is False


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_dtype_of_the_statistics(dtype):
    assert state(one(dtype=dtype)).dtype == dtype


def test_statistics_of_another_dtype_than_the_data():
    b = Build(dtype="float16")
    x = b.input([2, 3, 4, 4])
    wide = [b.const(np.ones(3), dtype="float32") for _ in range(2)]
    model = b.model(b.node("BatchNormalization", x, b.const(np.ones(3)), b.const(np.ones(3)), *wide, name="bn"))
    assert state(model).dtype == "float32"


@pytest.mark.parametrize("make", [in_training, lambda: in_training(LATEST), lambda: in_training(9, outputs=5)])
def test_a_node_that_goes_by_the_batch(make):
    found = state(make())
    assert (found.by_batch, found.training, found.moves, found.frozen) == (True, True, True, False)
    np.testing.assert_array_equal(found.mean, [0.5] * 3)


def test_numbers_that_are_given_or_computed_are_not_known():
    b = Build()
    x, mean = b.input([2, 3, 4, 4]), b.input([3], "mean")
    variance = b.node("Abs", b.input([3], "spread"))
    model = b.model(b.node("BatchNormalization", x, *numbers(b, m=mean, v=variance), name="bn"))
    found = state(model)
    assert (found.mean, found.variance) == (None, None)
    assert found.gamma.tolist() == [1, 2, 3]


def test_a_number_that_a_caller_may_override_is_not_known():
    b = Build()
    x, held = b.input([2, 3, 4, 4]), numbers(b)
    b.input([3], held[2])
    assert state(b.model(b.node("BatchNormalization", x, *held, name="bn"))).mean is None


def test_numbers_for_each_place_are_no_numbers_of_channels():
    b = Build(opset=7)
    x = b.input([2, 3, 4])
    held = [b.const(np.ones((3, 4))) for _ in range(4)]
    y = b.node("BatchNormalization", x, *held, name="bn", spatial=0)
    assert state(b.model(y, check=False)).mean is None


def test_nodes_that_hold_the_same_statistics():
    b = Build()
    x, held = b.input([2, 3, 4, 4]), numbers(b)
    for name in ("one", "two", "three"):
        held = numbers(b) if name == "three" else held
        x = b.node("BatchNormalization", x, *held, name=name)
    assert [s.shared for s in OnnxModel(b.model(x)).states()] == [("two",), ("one",), ()]


def test_what_is_frozen_to_a_product_and_a_sum_is_no_layer():
    b = Build()
    x = b.node("Mul", b.input([2, 3, 4, 4]), b.random(1, 3, 1, 1))
    assert OnnxModel(b.model(b.node("Add", x, b.random(1, 3, 1, 1)))).states() == []


def test_a_norm_in_a_function_tells_what_its_node_says():
    found = state(function())
    assert (found.mean, found.gamma, found.eps, found.frozen) == (None, None, 0.25, True)


def test_a_model_that_is_not_valid_is_refused():
    model = one()
    del model.graph.node[-1].input[3:]
    with pytest.raises(DataError, match="valid ONNX"):
        OnnxModel(model).states()


# -- the rest of the protocol --------------------------------------------------------------------------------------


def test_what_a_batch_calls_the_model_with():
    view, x = OnnxModel(one()), np.zeros((2, 3, 4, 4), np.float32)
    assert view.example_of({"x": x, "label": 1}) == {"x": x}
    assert view.example_of((x, 1)) == (x,)
    assert view.example_of(x) is x


@pytest.mark.parametrize("method", ["rehearse", "batch_sizes", "optimization", "spare"])
def test_an_onnx_model_is_not_trained(method):
    with pytest.raises(OptionError, match="an ONNX model is not trained"):
        getattr(OnnxModel(one()), method)(None)


def test_dropout_in_training_is_nothing_that_is_seen_through():
    for training, expected in ((False, Identity()), (True, Other("Dropout"))):
        b = Build()
        x = b.node("Dropout", b.input([2, 3, 4, 4]), b.const(np.array(0.5)), b.const(np.array(training)))
        nodes = OnnxModel(b.model(b.norm(x, 3))).graph(None).nodes
        assert nodes[0].operation == expected


# -- mending -------------------------------------------------------------------------------------------------------


def inference(model, x, eps=1e-5):
    """Return what the standard says of a norm in inference, behind which is a ReLU."""
    held = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    g, b, m, v = (held[name].reshape(1, -1, 1, 1) for name in model.graph.node[0].input[1:])
    return np.maximum((x - m) / np.sqrt(v + eps) * g + b, 0)


@pytest.mark.parametrize(("opset", "outputs"), [(9, 5), (13, 5), (14, 3), (14, 1), (LATEST, 3)])
def test_a_node_is_put_into_its_form_for_inference(opset, outputs):
    model = in_training(opset, outputs, momentum=0.5)
    kept = list(model.graph.node[0].input)
    OnnxModel(model).mend({"bn": Mend(training=False)})
    onnx.checker.check_model(model, full_check=True)
    node = model.graph.node[0]
    assert (len(node.output), [a.name for a in node.attribute], list(node.input)) == (1, ["momentum"], kept)
    assert not model.graph.value_info
    x = feeds_of(model)["x"]
    np.testing.assert_allclose(run(model, {"x": x})[0], inference(model, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(OnnxModel(model).outputs({"x": x})[0], inference(model, x), rtol=1e-5, atol=1e-6)
    found = state(model)
    assert (found.by_batch, found.frozen, found.mean.tolist()) == (False, True, [0.5] * 3)


def test_a_mended_node_can_be_folded():
    b = Build()
    x = b.node("Conv", b.input([2, 3, 4, 4]), b.random(3, 3, 1, 1))
    y = b.node("BatchNormalization", x, *numbers(b), out=3, name="bn", training_mode=1)[0]
    model = b.model(y, check=False)
    assert fold(model).folded == ()
    OnnxModel(model).mend({"bn": Mend(training=False)})
    assert len(fold(model).folded) == 1


def test_eps_is_set():
    model = one()
    OnnxModel(model).mend({"bn": Mend(eps=0.5)})
    assert state(model).eps == 0.5
    changed = one(epsilon=0.25)
    OnnxModel(changed).mend({"bn": Mend(eps=1e-3)})
    assert state(changed).eps == pytest.approx(1e-3)
    assert len(changed.graph.node[-1].attribute) == 1


def test_a_view_runs_what_was_mended():
    model = one()
    view, x = OnnxModel(model), {"x": np.ones((2, 3, 4, 4), np.float32)}
    before = view.outputs(x)[0]
    view.mend({"bn": Mend(eps=100.0)})
    assert np.abs(view.outputs(x)[0] - before).max() > 0.1


@pytest.mark.parametrize(
    ("make", "mends", "words"),
    [
        (one, {"nothing": Mend()}, "must be one of 'bn', got 'nothing'"),
        (one, {"bn": Mend(training=True)}, "not trained"),
        (one, {"bn": Mend(decay=0.9)}, "not trained"),
        (one, {"bn": Mend(freeze=True)}, "not trained"),
        (one, {"bn": Mend(count_once=True)}, "not trained"),
        (one, {"bn": Mend(wide=True)}, "export the model again with float32"),
        (one, {"bn": Mend(eps=-1.0)}, "eps must be 0 or more"),
        (lambda: in_training(read=2), {"bn": Mend(training=False)}, "is read: export the model in evaluation mode"),
        (function, {"bn": Mend(eps=0.5)}, "inline_local_functions"),
        (branches, {"outside": Mend(eps=0.5), "y": Mend(decay=0.5)}, "'y' can't be mended"),
    ],
)
def test_all_is_mended_or_nothing(make, mends, words):
    model = make()
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(OptionError, match=words):
        OnnxModel(model).mend(mends)
    assert model.SerializeToString(deterministic=True) == before


def test_a_node_in_a_subgraph_is_mended():
    model = branches()
    OnnxModel(model).mend({"y_2": Mend(eps=0.5)})
    assert [s.eps for s in OnnxModel(model).states()] == [pytest.approx(1e-5), pytest.approx(1e-5), 0.5]


def test_nothing_to_do_changes_nothing():
    model = one()
    before = model.SerializeToString(deterministic=True)
    OnnxModel(model).mend({"bn": Mend(training=False)})
    assert model.SerializeToString(deterministic=True) == before
