"""For each rule a Keras model that must trigger it, and a look-alike that must not."""

from typing import Any

import keras
import numpy as np
from keras import layers as L  # noqa: N812

import batchnorm as bn
from check_pairs import Case, Pairs

BN = L.BatchNormalization
pair = Pairs()


def images(samples: int = 16, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((samples, size, size, 3)).astype(np.float32)


def rows(samples: int = 64, features: int = 6) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((samples, features)).astype(np.float32)


def sequential(shape: tuple[int, ...], *layers: Any) -> Any:
    return keras.Sequential([keras.Input(shape), *layers])


def trained(model: Any, x: np.ndarray) -> Any:
    """Return a model whose statistics are those of its inputs."""
    bn.recalibrate(model, [x[:32], x[32:]], progress=False)
    return model


def net(**layer: Any) -> Any:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    for number in range(3):
        x = L.Conv2D(6, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = L.ReLU()(BN(name=f"bn{number}", **layer)(x))
    model = keras.Model(image, L.Dense(4)(L.GlobalAveragePooling2D()(x)))
    return trained(model, images(64))


def put(variable: Any, places: Any, values: Any) -> None:
    array = np.asarray(keras.ops.convert_to_numpy(variable)).copy()
    array[places] = values
    variable.assign(array)


@pair("BN101")
def one_reset(sick: bool) -> Case:
    model = net()
    if sick:
        layer = model.get_layer("bn1")
        put(layer.moving_mean, slice(None), 0)
        put(layer.moving_variance, slice(None), 1)
    return Case(model, "bn1")


@pair("BN101")
def all_new(sick: bool) -> Case:
    model = sequential((8, 8, 3), L.Conv2D(6, 3), BN(name="bn"))
    # a new model that is about to be trained is as it should be
    return Case(model, "bn", {"training": not sick})


@pair("BN102")
def negative(sick: bool) -> Case:
    model = net()
    put(model.get_layer("bn1").moving_variance, 2, -1e-3 if sick else 1e-3)
    return Case(model, "bn1")


@pair("BN102")
def poisoned(sick: bool) -> Case:
    model = net()
    put(model.get_layer("bn0").moving_mean, 0, np.nan if sick else 100)
    return Case(model, "bn0")


@pair("BN103")
def scaled(sick: bool) -> Case:
    model = net()
    layer = model.get_layer("bn1")
    if sick:
        layer.moving_variance.assign(layer.moving_variance * 25)
    return Case(model, "bn1", {"data": np.split(images(64), 4)})


@pair("BN103")
def other_data(sick: bool) -> Case:
    return Case(net(), "bn0", {"data": [x * (255 if sick else 1) for x in np.split(images(64), 4)]})


@pair("BN104")
def thawed(sick: bool) -> Case:
    model = net()
    layer = model.get_layer("bn0")
    if sick:
        layer.gamma.trainable = layer.beta.trainable = False
    else:
        layer.trainable = False
    return Case(model, "bn0", {"training": True})


@pair("BN105")
def two_streams(sick: bool) -> Case:
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    tower = sequential((6,), L.Dense(5, use_bias=False), BN(name="bn"), L.ReLU())
    tower.name = "tower"
    other = L.Rescaling(3.0, 2.0)(x) if sick else L.Rescaling(1.0)(x)
    model = trained(keras.Model(x, L.subtract([tower(x), tower(other)])), rows())
    return Case(model, "tower.bn", {"data": np.split(rows(), 4)})


@pair("BN106")
def counted_twice(sick: bool) -> Case:
    with keras.RematScope("full" if sick else None):
        norm = BN(name="bn")
    return Case(sequential((6,), L.Dense(5, use_bias=False), norm, L.ReLU()), "bn", {"example": rows()})


@pair("BN107")
def last_batch(sick: bool) -> Case:
    model = sequential((6,), L.Dense(5, use_bias=False), BN(name="bn"))
    return Case(model, "bn", {"example": rows(), "loader": (65, 16 if sick else 13)})


@pair("BN107")
def one_sample(sick: bool) -> Case:
    model = sequential((8, 8, 3), L.GlobalAveragePooling2D(), BN(name="bn"))
    return Case(model, "bn", {"example": images(1 if sick else 16), "training": True})


@pair("BN108")
def hard_wired(sick: bool) -> Case:
    x = keras.Input((6,))
    # a frozen layer normalizes by its statistics whatever it is called with
    model = keras.Model(x, BN(name="bn", trainable=sick)(x, training=True))
    return Case(trained(model, rows()) if sick else model, "bn")


@pair("BN109")
def half(sick: bool) -> Case:
    policy = "float16" if sick else "mixed_float16"
    return Case(sequential((6,), L.Dense(5, dtype=policy), BN(name="bn", dtype=policy)), "bn", {"training": True})


@pair("BN110")
def torch_momentum(sick: bool) -> Case:
    model = net(momentum=0.9)
    model.get_layer("bn2").momentum = 0.1 if sick else 0.99
    return Case(model, "bn2")


@pair("BN111")
def odd_eps(sick: bool) -> Case:
    model = net(epsilon=1e-3)
    if sick:
        model.get_layer("bn1").epsilon = 1e-5
    return Case(model, "bn1")


@pair("BN201")
def few_values(sick: bool) -> Case:
    model = sequential((8, 8, 3), L.Conv2D(5, 8, use_bias=False), BN(name="bn"))
    return Case(model, "bn", {"example": images(4 if sick else 32), "training": True})


@pair("BN201")
def small_batches(sick: bool) -> Case:
    return Case(net(), "bn0", {"example": images(), "loader": (64, 2 if sick else 32)})


@pair("BN202")
def decayed(sick: bool) -> Case:
    optimizer = keras.optimizers.AdamW(weight_decay=1e-4)
    if not sick:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    return Case(net(), "bn0", {"optimizer": optimizer})


@pair("BN202")
def penalized(sick: bool) -> Case:
    l2 = keras.regularizers.L2(1e-3)
    dense = L.Dense(5, kernel_regularizer=None if sick else l2)
    model = sequential((6,), dense, BN(name="bn", gamma_regularizer=l2 if sick else None))
    return Case(model, "bn", {"optimizer": keras.optimizers.SGD()})


@pair("BN203")
def dropout_before(sick: bool) -> Case:
    norm, drop = BN(name="bn"), L.SpatialDropout2D(0.5)
    order = (drop, norm) if sick else (norm, drop)
    model = sequential((8, 8, 3), L.Conv2D(5, 3, use_bias=False), *order, L.ReLU())
    return Case(model, "bn", {"example": images(4)})


@pair("BN203")
def dropout_of_nothing(sick: bool) -> Case:
    model = sequential((6,), L.Dropout(0.3 if sick else 0.0), L.Reshape((3, 2)), BN(name="bn"))
    return Case(model, "bn", {"example": rows()})


@pair("BN204")
def accumulating(sick: bool) -> Case:
    options = {"gradient_accumulation_steps": 4} if sick else {}
    return Case(net(), "", {"optimizer": keras.optimizers.SGD(**options)})


@pair("BN205")
def dead_channel(sick: bool) -> Case:
    x = rows()
    x[:, 2] = 0.5 if sick else 0.5 + 0.05 * x[:, 1]
    return Case(trained(sequential((6,), BN(name="bn"), L.Dense(2)), x), "bn")


@pair("BN301")
def redundant_bias(sick: bool) -> Case:
    # behind a ReLU the bias is no longer one
    between = () if sick else (L.ReLU(),)
    model = sequential((8, 8, 3), L.Conv2D(5, 3, name="conv"), *between, BN(name="bn"))
    return Case(model, "conv", {"example": images(4)})


@pair("BN302")
def foldable(sick: bool) -> Case:
    between = () if sick else (L.ReLU(),)
    model = trained(sequential((6,), BN(name="bn"), *between, L.Dense(2)), rows())
    return Case(model, "bn", {"example": rows(), "training": False})


@pair("BN303")
def in_a_row(sick: bool) -> Case:
    between = L.Dropout(0.1) if sick else L.ReLU()
    model = sequential((6,), L.Dense(5, use_bias=False), BN(name="first"), between, BN(name="second"))
    return Case(model, "second", {"example": rows()})


@pair("BN304")
def switched_off(sick: bool) -> Case:
    model = net()
    put(model.get_layer("bn1").gamma, slice(3), [0, 1e-6, -1e-7] if sick else [0.1, 0.02, -0.01])
    return Case(model, "bn1")


@pair("BN304")
def starts_at_zero(sick: bool) -> Case:
    # a branch that is switched on by training
    model = sequential((6,), L.Dense(5, use_bias=False), BN(name="bn", gamma_initializer="zeros"))
    return Case(trained(model, rows()) if sick else model, "bn")
