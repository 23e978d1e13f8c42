"""For each rule that an ONNX model can break a model that does, and a look-alike that does not."""

from typing import Any

import numpy as np
import onnx
from onnx import helper

import batchnorm as bn
from check_pairs import Case, Pairs
from onnx_graphs import Build

pair = Pairs()


def images(samples: int = 16) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((samples, 3, 8, 8)).astype(np.float32)


def net(**norm: Any) -> Any:
    """Return three normalized convolutions whose statistics are those of their inputs."""
    b = Build(opset=17)
    x = b.input(["n", 3, 8, 8])
    for number in range(3):
        w = b.random(6 if number < 2 else 4, 3 if number == 0 else 6, 3, 3)
        x = b.node("Conv", x, w, pads=[1, 1, 1, 1], name=f"conv{number}")
        x = b.node("Relu", b.norm(x, 6 if number < 2 else 4, f"bn{number}", signs=False, **norm))
    model = b.model(b.node("GlobalAveragePool", x))
    bn.recalibrate(model, np.split(images(64), 2), progress=False)
    return model


def put(model: Any, name: str, places: Any, values: Any) -> None:
    held = next(t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(held).copy()
    array[places] = values
    held.CopyFrom(onnx.numpy_helper.from_array(array, name))


def small(*before: str, dtype: str = "float32", bias: bool = False, **norm: Any) -> Any:
    """Return a convolution, operators of these kinds, and a norm."""
    b = Build(opset=17, dtype=dtype)
    held = [b.random(5, 3, 1, 1), *([b.random(5)] if bias else [])]
    x = b.node("Conv", b.input(["n", 3, 8, 8]), *held, name="conv")
    for kind in before:
        x = b.node(kind, x)
    return b.model(b.norm(x, 5, "bn", signs=False, **norm))


def statistics_of(b: Build, dtype: str | None = None) -> list[str]:
    return [b.const(v, dtype=dtype) for v in (np.full(3, 0.5), np.full(3, 2.0))]


@pair("BN101")
def one_reset(sick: bool) -> Case:
    model = net()
    put(model, "bn1_m", slice(None), 0)
    put(model, "bn1_v", slice(None), 1 if sick else 1.5)
    return Case(model, "bn1")


@pair("BN102")
def negative(sick: bool) -> Case:
    model = net()
    put(model, "bn1_v", 2, -1e-3 if sick else 1e-3)
    return Case(model, "bn1")


@pair("BN102")
def poisoned(sick: bool) -> Case:
    model = net()
    put(model, "bn0_m", 0, np.nan if sick else 100)
    return Case(model, "bn0")


@pair("BN103")
def scaled(sick: bool) -> Case:
    model = net()
    held = next(t for t in model.graph.initializer if t.name == "bn1_v")
    if sick:
        put(model, "bn1_v", slice(None), 25 * onnx.numpy_helper.to_array(held))
    return Case(model, "bn1", {"data": np.split(images(64), 4)})


@pair("BN105")
def one_layer_exported_twice(sick: bool) -> Case:
    b = Build(opset=17)
    x, affine, held = b.input(["n", 3, 8, 8]), [b.const(np.ones(3)), b.const(np.zeros(3))], statistics_of(b)
    y = b.node("BatchNormalization", x, *affine, *held, name="one")
    held = held if sick else statistics_of(b)
    return Case(b.model(b.node("BatchNormalization", b.node("Relu", y), *affine, *held, name="two")), "one")


@pair("BN108")
def exported_in_training(sick: bool) -> Case:
    b = Build(opset=17)
    held = [b.const(np.ones(3)), b.const(np.zeros(3)), *statistics_of(b)]
    options = {"out": 3, "training_mode": 1} if sick else {"training_mode": 0}
    y = b.node("BatchNormalization", b.input([8, 3, 8, 8]), *held, name="bn", **options)
    return Case(b.model(y[0] if sick else y), "bn")


@pair("BN109")
def half(sick: bool) -> Case:
    b = Build(opset=17, dtype="float16")
    affine = [b.const(np.ones(3)), b.const(np.zeros(3))]
    held = statistics_of(b, "float16" if sick else "float32")
    return Case(b.model(b.node("BatchNormalization", b.input(["n", 3, 8, 8]), *affine, *held, name="bn")), "bn")


@pair("BN110")
def torch_momentum(sick: bool) -> Case:
    b = Build(opset=17)
    held = [b.const(np.ones(3)), b.const(np.zeros(3)), *statistics_of(b)]
    # in inference nothing reads it
    options = {"out": 3, "training_mode": 1} if sick else {}
    y = b.node("BatchNormalization", b.input([8, 3, 8, 8]), *held, name="bn", momentum=0.1, **options)
    return Case(b.model(y[0] if sick else y), "bn")


@pair("BN111")
def odd_eps(sick: bool) -> Case:
    model = net(epsilon=1e-3)
    if sick:
        node = next(node for node in model.graph.node if node.name == "bn1")
        (attribute,) = node.attribute
        attribute.CopyFrom(helper.make_attribute("epsilon", 1e-5))
    return Case(model, "bn1")


@pair("BN205")
def dead_channel(sick: bool) -> Case:
    model = net()
    put(model, "bn1_v", 2, 0 if sick else 1e-3)
    return Case(model, "bn1")


@pair("BN301")
def redundant_bias(sick: bool) -> Case:
    # behind a ReLU the bias is no longer one
    return Case(small(*([] if sick else ["Relu"]), bias=True), "conv", {"example": images()})


@pair("BN302")
def foldable(sick: bool) -> Case:
    return Case(small(*([] if sick else ["Sigmoid"])), "bn", {"example": images()})


@pair("BN303")
def in_a_row(sick: bool) -> Case:
    b = Build(opset=17)
    x = b.norm(b.input(["n", 3, 8, 8]), 3, "first")
    return Case(b.model(b.norm(b.node("Identity" if sick else "Relu", x), 3, "second")), "second")


@pair("BN304")
def switched_off(sick: bool) -> Case:
    model = net()
    put(model, "bn1_g", slice(3), [0, 1e-6, -1e-7] if sick else [0.1, 0.02, -0.01])
    return Case(model, "bn1")
