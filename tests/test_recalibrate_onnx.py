"""Statistics of whole data sets in ONNX models, held against the stock evaluator and NumPy."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models import save
from onnx_graphs import LATEST, Build, run


def network(opset=17, dtype="float32", form="initializer", ir=None):
    """Return two normalized convolutions and a normalized dense layer, and the names of what the norms read."""
    b = Build(dtype=dtype, opset=opset, form=form, ir=ir)
    x = b.node("Conv", b.input(["n", 3, 6, 6]), b.random(4, 3, 3, 3, name="w1"))
    y = b.node("Relu", b.norm(x, 4, "one"))
    y = b.node("Conv", y, b.random(4, 4, 3, 3, name="w2"))
    z = b.node("Relu", b.norm(y, 4, "two"))
    z = b.node("Flatten", z)
    z = b.node("MatMul", z, b.random(16, 5, name="w3"))
    return b.model(b.norm(z, 5, "three")), (x, y, z)


def batches(sizes=(7, 1, 12), mean=0.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, 3, 6, 6)) + mean).astype(dtype) for n in sizes]


def numbers(model, name):
    """Return mean and variance of a norm, as they stand in the file."""
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    constants = [n for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]
    held |= {n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in constants}
    node = next(node for node in model.graph.node if node.name == name)
    return [held[key].astype(np.float64) for key in node.input[3:5]]


def population(arrays):
    values = np.concatenate([np.moveaxis(a.astype(np.float64), 1, 0).reshape(a.shape[1], -1) for a in arrays], 1)
    return values.mean(1), values.var(1)


def seen(model, names, data):
    """Return what the norms read in evaluation, by the stock evaluator."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    found = [run(shown, {"x": batch}) for batch in data]
    return [[arrays[i] for arrays in found] for i in range(len(names))]


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 17, 18, LATEST])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_first_norm_holds_the_population(opset, mean):
    (model, names), data = network(opset), batches(mean=mean)
    expected = population(seen(model, names[:1], data)[0])
    found = bn.recalibrate(model, data, progress=False)
    onnx.checker.check_model(model)
    # at 1e4 the convolution itself is that much off in float32
    for got, want in zip(numbers(model, "one"), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6 if mean == 0 else 3e-4, atol=1e-6)
    assert [m.layer for m in found.moved] == ["one", "two", "three"]
    assert (found.samples, found.batches) == (20, 3)


def test_a_norm_that_comes_first_is_exact_at_any_mean():
    b = Build()
    model = b.model(b.norm(b.input(["n", 3, 6, 6]), 3, "first"))
    data = batches(mean=1e4)
    bn.recalibrate(model, data, progress=False)
    mean, var = population(data)
    np.testing.assert_allclose(numbers(model, "first")[0], mean, rtol=1e-7)
    np.testing.assert_allclose(numbers(model, "first")[1], var, rtol=1e-6)


def test_sequential_holds_what_evaluation_sees():
    (model, names), data = network(), batches()
    found = bn.recalibrate(model, data, method="sequential", progress=False)
    assert found.settled
    for name, arrays in zip(("one", "two", "three"), seen(model, names, data), strict=True):
        for got, want in zip(numbers(model, name), population(arrays), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_pass_is_that_of_the_torch_model_it_was_exported_from(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.9),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
    ).eval()
    path, data = tmp_path / "net.onnx", batches((7, 2, 12))
    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "optimize": False}
    torch.onnx.export(net, (torch.randn(2, 3, 6, 6),), path, dynamo=True, verbose=False, **options)
    model = onnx.load(path)
    norms = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == 2
    bn.recalibrate(model, data, progress=False)
    bn.recalibrate(net, data, progress=False)
    for name, layer, count in zip(norms, (net[1], net[6]), (21 * 16, 21), strict=True):
        mean, var = numbers(model, name)
        np.testing.assert_allclose(mean, layer.running_mean, rtol=1e-5, atol=1e-6)
        # the standard's variance is biased, torch's is not
        np.testing.assert_allclose(var * count / (count - 1), layer.running_var, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_dtypes_are_measured_in_float64(dtype):
    b = Build(dtype=dtype)
    model = b.model(b.norm(b.input(["n", 3, 6, 6]), 3, "first"))
    data = batches(dtype=np.float64 if dtype == "float64" else np.float32)
    rounded = [
        a.astype(onnx.helper.tensor_dtype_to_np_dtype(getattr(TensorProto, dtype.upper(), TensorProto.DOUBLE)))
        for a in data
    ]
    bn.recalibrate(model, data, progress=False)
    mean, var = population(rounded)
    rtol = {"float16": 1e-3, "bfloat16": 1e-2, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(numbers(model, "first")[0], mean, rtol=rtol, atol=rtol / 10)
    np.testing.assert_allclose(numbers(model, "first")[1], var, rtol=rtol)


def test_numbers_that_norms_share_are_kept_apart():
    b = Build()
    x = b.input(["n", 3, 6, 6])
    shared = [b.const(v, n) for n, v in (("g", np.ones(3)), ("b", np.ones(3)), ("m", np.zeros(3)), ("v", np.ones(3)))]
    y = b.node("BatchNormalization", x, *shared, name="one")
    model = b.model(b.node("BatchNormalization", b.node("Relu", y), *shared, name="two"))
    bn.recalibrate(model, batches(), progress=False)
    onnx.checker.check_model(model)
    assert np.abs(numbers(model, "one")[0] - numbers(model, "two")[0]).min() > 0.1


def test_names_that_are_taken_are_not_taken_again():
    b = Build()
    x = b.norm(b.input(["n", 3, 6, 6], name="measured0_mean"), 3, "measured0_variance")
    model = b.model(b.norm(x, 3, "measured_least"))
    data = [{"measured0_mean": x} for x in batches()]
    bn.recalibrate(model, data, progress=False)
    np.testing.assert_allclose(numbers(model, "measured0_variance")[0], population(batches())[0], rtol=1e-6, atol=1e-7)


def test_constants_become_new_ones():
    (model, _), data = network(form="node"), batches()
    bn.recalibrate(model, data, progress=False)
    onnx.checker.check_model(model)
    assert "one" in str(bn.recalibrate(model, data, progress=False))


def _subgraph():
    b = Build()
    x, inner = b.input(["n", 3, 6, 6]), Build()
    inner.nodes.append(helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["out"], "inside"))
    for name, v in (("g", np.ones(3)), ("b", np.zeros(3)), ("m", np.zeros(3)), ("v", np.ones(3))):
        b.const(v, name)
    branch = helper.make_graph(inner.nodes, "then", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["or"])],
        "else",
        [],
        [helper.make_tensor_value_info("or", TensorProto.FLOAT, None)],
    )
    y = b.node("If", b.const(np.array(True), "yes"), then_branch=branch, else_branch=other)
    return b.model(b.norm(b.node("Add", x, y), 3, "outside"), check=False)


def _given():
    b = Build()
    x, mean = b.input(["n", 3, 6, 6]), b.input([3], "mean")
    rest = [b.const(np.ones(3)) for _ in range(3)]
    y = b.node("BatchNormalization", x, rest[0], rest[1], mean, rest[2], name="given")
    return b.model(b.norm(y, 3, "free"))


def _training():
    b = Build()
    x = b.input(["n", 3, 6, 6])
    rest = [b.const(np.ones(3)) for _ in range(4)]
    y = b.node("BatchNormalization", x, *rest, out=3, name="batch", training_mode=1)[0]
    return b.model(b.norm(y, 3, "free"), check=False)


@pytest.mark.parametrize(
    ("make", "layer", "words"),
    [
        (_subgraph, "inside", "inside of a subgraph"),
        (_given, "given", "given by the caller"),
        (_training, "batch", "of the batch"),
    ],
)
def test_what_can_not_be_measured_is_named(make, layer, words):
    model = make()
    data = batches((8,)) if layer != "given" else [(batches((8,))[0], np.zeros(3, np.float32))]
    found = bn.recalibrate(model, data, progress=False)
    assert [m.layer for m in found.moved] == ["free" if layer != "inside" else "outside"]
    assert [left.layer for left in found.left] == [layer]
    assert words in found.left[0].reason


BAD = {
    "empty": (list, "at least one batch"),
    "sizes": (lambda: [np.zeros((2, 5, 6, 6), np.float32)], "input 'x' must have the shape"),
    "words": (lambda: ["one"], "input 'x' must"),
    "nan": (lambda: [batches()[0] * np.float32("nan")], "'one' must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_leaves_the_model_as_it_was(name):
    make, words = BAD[name]
    model, _ = network()
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(BatchNormError, match=words):
        bn.recalibrate(model, make(), progress=False)
    assert model.SerializeToString(deterministic=True) == before


def test_options_of_other_frameworks_are_refused():
    for options in ({"forward": lambda model, batch: None}, {"device": "cpu"}):
        with pytest.raises(OptionError, match="run by onnxruntime"):
            bn.recalibrate(network()[0], batches(), progress=False, **options)


def test_batches_by_name_with_labels_and_as_tensors():
    expected, _ = network()
    bn.recalibrate(expected, batches(), progress=False)
    for form in (
        [{"x": x, "label": np.zeros(len(x))} for x in batches()],
        [(x, np.zeros(len(x))) for x in batches()],
        [torch.from_numpy(x) for x in batches()],
    ):
        model, _ = network()
        bn.recalibrate(model, form, progress=False)
        assert model == expected


def test_a_path_gives_a_model_to_save(tmp_path):
    path = tmp_path / "net.onnx"
    save(network()[0], path, None)
    found = bn.recalibrate(str(path), batches(), progress=False)
    save(found.model, tmp_path / "new.onnx", None)
    assert onnx.load(tmp_path / "new.onnx") == found.model
    assert onnx.load(path) == network()[0]


def test_the_prior_counts_as_samples():
    b = Build()
    model = b.model(b.norm(b.input(["n", 3, 6, 6]), 3, "first"))
    (mean, var), data = numbers(model, "first"), batches()
    bn.recalibrate(model, data, prior=20, progress=False)
    new_mean, new_var = population(data)
    np.testing.assert_allclose(numbers(model, "first")[0], (mean + new_mean) / 2, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(numbers(model, "first")[1], (var + new_var) / 2 + (mean - new_mean) ** 2 / 4, rtol=1e-6)
