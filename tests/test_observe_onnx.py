"""What reaches the normalization of ONNX models, held against the stock evaluator and NumPy."""

import numpy as np
import onnx
import pytest

import batchnorm as bn
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.protocol import PIECE, piece
from onnx_graphs import LATEST, Build, run


def network(opset=17, dtype="float32", bias=0.0):
    """Return two normalized convolutions and a normalized dense layer, and the names of what the norms read."""
    b = Build(dtype=dtype, opset=opset)
    x = b.node("Conv", b.input(["n", 3, 6, 6]), b.random(4, 3, 3, 3, name="w1"))
    y = b.node("Relu", b.norm(x, 4, "one"))
    y = b.node("Conv", y, b.random(4, 4, 3, 3, name="w2"))
    z = b.node("Flatten", b.node("Relu", b.norm(y, 4, "two")))
    z = b.node("MatMul", z, b.random(16, 5, name="w3"))
    return b.model(b.norm(z, 5, "three")), {"one": x, "two": y, "three": z}


def batches(sizes=(7, 1, 12), dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 3, 6, 6)).astype(dtype) for n in sizes]


def numbers(model, name):
    """Return γ, β, mean and variance of a norm, as they stand in the file."""
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == name)
    return [held[key].astype(np.float64) for key in node.input[1:5]]


def seen(model, names, data):
    """Return what the norms read in evaluation, batch by batch, by the stock evaluator."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    found = [run(shown, {"x": batch}) for batch in data]
    return [[np.asarray(arrays[i], np.float64) for arrays in found] for i in range(len(names))]


def columns(x):
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def observe(model, data, **options):
    return bn.observe(model, data, progress=False, **options)


@pytest.mark.parametrize(("opset", "dtype"), [(7, "float32"), (9, "float32"), (17, "float64"), (LATEST, "float32")])
def test_numbers_in_use_are_those_of_evaluation(opset, dtype):
    model, names = network(opset, dtype)
    data = batches(dtype=np.dtype(dtype))
    before = model.SerializeToString(deterministic=True)
    found = observe(model, data, use="running")
    assert model.SerializeToString(deterministic=True) == before
    assert (found.samples, found.batches, found.unreached) == (20, 3, ())
    for name, arrays in zip(names, seen(model, names.values(), data), strict=True):
        one, (gamma, beta, m, v) = found[name], numbers(model, name)
        x = np.concatenate([columns(part) for part in arrays], 1)
        np.testing.assert_allclose(one.mean, x.mean(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.variance, x.var(1), rtol=1e-5)
        own = x.var(1) + one.eps
        kl = 0.5 * (np.log((v + one.eps) / own) + (own + (x.mean(1) - m) ** 2) / (v + one.eps) - 1)
        np.testing.assert_allclose(one.kl, kl, rtol=1e-4)
        assert (one.count, one.values) == (x.shape[1], columns(arrays[1]).shape[1])
        np.testing.assert_allclose(one.inputs, arrays[0], rtol=1e-4, atol=1e-4)
        assert one.inputs.dtype == np.dtype(dtype)
        y = columns(arrays[0])
        y = (y - m[:, None]) / np.sqrt(v[:, None] + one.eps) * gamma[:, None] + beta[:, None]
        assert one.off == pytest.approx((y <= 0).all(1).mean())
        assert one.saturated == pytest.approx((np.abs(y) > 3).mean(), abs=2e-3)
        np.testing.assert_array_equal(one.gamma, gamma)


def test_by_batch_is_as_in_recalibration():
    (model, _), data = network(), batches((9, 11))
    found = observe(model, data)
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    bn.recalibrate(twin, data, progress=False)
    for one in found:
        mean, variance = numbers(twin, one.layer)[2:]
        np.testing.assert_allclose(one.mean, mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one.variance, variance, rtol=1e-6)


def test_a_large_layer_gives_a_piece():
    b = Build()
    model = b.model(b.norm(b.input(["n", 64, "h", "w"]), 64, "wide"))
    x = np.random.default_rng(0).standard_normal((70, 64, 40, 30)).astype(np.float32)
    one = observe(model, [x, x[:3]])["wide"]
    np.testing.assert_array_equal(one.inputs, x[piece(x.shape)])
    np.testing.assert_array_equal(one.inputs[0, 1], x[0, one.channels[1]])
    assert one.inputs.size <= PIECE


def test_what_normalizes_by_the_batch_is_measured_and_what_can_not_be_seen_is_listed():
    b = Build()
    x = b.input(["n", 3, 6, 6])
    rest = [b.const(np.ones(3)) for _ in range(4)]
    y = b.node("BatchNormalization", x, *rest, out=3, name="batch", training_mode=1)[0]
    function = b.model(b.norm(y, 3, "free"), check=False)
    data = batches()
    found = observe(function, data)
    values = np.concatenate([columns(x.astype(np.float64)) for x in data], 1)
    np.testing.assert_allclose(found["batch"].mean, values.mean(1), rtol=1e-6, atol=1e-7)
    assert "of the batch" in found["batch"].fixed
    np.testing.assert_allclose(found["free"].variance, 1.0, rtol=0.1)
    b = Build()
    mean = b.input([3], "mean")
    rest = [b.const(np.ones(3)) for _ in range(3)]
    y = b.node("BatchNormalization", b.input(["n", 3, 6, 6]), rest[0], rest[1], mean, rest[2], name="given")
    given = b.model(b.norm(y, 3, "free"))
    found = observe(given, [{"x": data[0], "mean": np.zeros(3, np.float32)}])
    assert ([one.layer for one in found], found.unreached) == (["free"], ("given",))


BAD = {
    "empty": (list, "at least one batch"),
    "sizes": (lambda: [np.zeros((2, 5, 6, 6), np.float32)], "input 'x' must have the shape"),
    "inf": (lambda: [batches()[0] * np.float32("inf")], "'one' must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_told(name):
    make, words = BAD[name]
    model, _ = network()
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(BatchNormError, match=words):
        observe(model, make())
    assert model.SerializeToString(deterministic=True) == before


def test_an_optimizer_is_refused():
    with pytest.raises(OptionError, match="an ONNX model is not trained"):
        observe(network()[0], batches(), optimizer=object())
