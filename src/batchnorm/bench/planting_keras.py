"""The same faults in models of Keras: `keras.applications` on small images, the fault at a layer of chance."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

# where nothing else is asked for, as torch is there for the other models
os.environ.setdefault("KERAS_BACKEND", "torch")

import keras

from batchnorm.bench.planting import Plant, UnfitError, choose
from batchnorm.recalibrate import recalibrate
from batchnorm.torch.evaluation import silent

__all__ = ["FAMILIES", "KERAS_PLANTS", "grow_keras", "plant_keras"]

SIDE, ROWS, BATCHES = 32, 16, 4
FAMILIES: dict[str, dict[str, Any]] = {
    "MobileNet": {"alpha": 0.25}, "MobileNetV2": {"alpha": 0.35}, "MobileNetV3Small": {"include_preprocessing": False},
    "EfficientNetB0": {}, "ResNet50V2": {},
}  # fmt: skip
Norm = keras.layers.BatchNormalization
Model = Any
KERAS_PLANTS: dict[str, Callable[[Model, list[Any], np.random.Generator], Plant]] = {}


def grow_keras(name: str, number: int) -> tuple[Model, list[Any]]:
    """Build a model with γ and β of chance and the statistics of its data."""
    rng = np.random.default_rng([number, *name.encode()])
    keras.utils.set_random_seed(number)
    with silent():
        options = {"weights": None, "input_shape": (SIDE, SIDE, 3), "classes": 10}
        model = getattr(keras.applications, name)(**options, **FAMILIES[name])
    for norm in norms_in(model):
        if norm.gamma is not None:
            norm.gamma.assign(rng.uniform(0.5, 1.5, norm.gamma.shape))
    batches = [_images(rng) for _ in range(BATCHES)]
    return settled(model, batches), batches


def _images(rng: np.random.Generator) -> np.ndarray:
    """Return images with contrasts and noise of their own."""
    smooth = np.kron(rng.normal(size=(ROWS, 4, 4, 3)), np.ones((1, SIDE // 4, SIDE // 4, 1)))
    contrast = rng.uniform(0.5, 1.5, (ROWS, 1, 1, 1))
    images: np.ndarray = (contrast * (smooth + 0.5 * rng.normal(size=smooth.shape))).astype(np.float32)
    return images


def settled(model: Model, batches: list[Any]) -> Model:
    """Give all layers the statistics of the data, and return the model."""
    recalibrate(model, batches, progress=False)
    return model


def norms_in(model: Model) -> list[Any]:
    """Return the layers of a model."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, Norm)]


def plant_keras(code: str, model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    """Plant a fault in a copy of a model.

    Raises:
        UnfitError: there is no place for it.
    """
    with silent():
        return KERAS_PLANTS[code](rebuilt(model), batches, rng)


def plants(code: str) -> Callable[[Any], Any]:
    """Enter a function as the one that plants what a rule finds."""

    def enter(make: Any) -> Any:
        KERAS_PLANTS[code] = make
        return make

    return enter


def rebuilt(model: Model, change: Callable[..., Any] | None = None) -> Model:
    """Return a copy, in which layers are called in another way."""
    copy = keras.models.clone_model(
        model, call_function=change or (lambda layer, *args, **kwargs: layer(*args, **kwargs))
    )
    held = {layer.name: layer for layer in model.layers}
    for layer in copy.layers:
        if layer.name in held:
            layer.set_weights(held[layer.name].get_weights())
    return copy


def at(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
    """Return how layers are called when only one is called in another way."""
    return lambda layer, *args, **kwargs: (change if layer.name == name else type(layer).__call__)(
        layer, *args, **kwargs
    )


def pick(model: Model, rng: np.random.Generator) -> Any:
    """Return a layer of chance."""
    return choose(rng, *norms_in(model))


def both(batches: list[Any]) -> dict[str, Any]:
    """Return what a thorough user gives."""
    return {"example": batches[0], "data": batches}


def before(model: Model, norm: Any) -> Any:
    """Return the convolution right before a layer.

    Raises:
        UnfitError: there is none.
    """
    layer = norm.input._keras_history.operation
    if not hasattr(layer, "kernel"):
        raise UnfitError("no convolution before it")
    return layer


# -- what is stored ------------------------------------------------------------------------------------------------------


@plants("BN101")
def _never_updated(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    norm.moving_mean.assign(np.zeros(norm.moving_mean.shape))
    norm.moving_variance.assign(np.ones(norm.moving_mean.shape))
    return Plant("reset", model, (norm.name,), both(batches))


@plants("BN102")
def _not_finite(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    variance = np.array(norm.moving_variance.value.detach().cpu())
    variance[int(rng.integers(len(variance)))] = choose(rng, np.nan, np.inf, -1e-3)
    norm.moving_variance.assign(variance)
    return Plant("variance", model, (norm.name,), both(batches))


@plants("BN103")
def _far_from_data(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    variance = np.array(norm.moving_variance.value.detach().cpu())
    if np.median(variance) < norm.epsilon:
        raise UnfitError("variances below ε")
    norm.moving_variance.assign(variance * choose(rng, 20.0, 0.05))
    return Plant("scaled", model, (norm.name,), both(batches))


@plants("BN110")
def _swapped_momentum(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    norm.momentum = choose(rng, 0.1, 0.01)
    return Plant(f"{norm.momentum}", model, (norm.name,), both(batches))


@plants("BN111")
def _odd_eps(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    norm.epsilon = choose(rng, 0.0, 100 * norm.epsilon, 0.01 * norm.epsilon)
    return Plant(f"{norm.epsilon:g}", model, (norm.name,), both(batches))


@plants("BN205")
def _dead_channels(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    conv = before(model, norm)
    kernel = np.array(conv.kernel.value.detach().cpu())
    if kernel.shape[-1] != norm.moving_mean.shape[0]:
        raise UnfitError("channels are on another axis")
    kernel[..., : max(1, kernel.shape[-1] // 4)] = 0
    conv.kernel.assign(kernel)
    return Plant("zero filters", settled(model, batches), (norm.name,), both(batches))


@plants("BN304")
def _switched_off(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    if norm.gamma is None:
        raise UnfitError("no γ")
    gamma = np.array(norm.gamma.value.detach().cpu())
    gamma[: max(1, len(gamma) // 3)] = choose(rng, 0.0, 1e-6)
    norm.gamma.assign(gamma)
    return Plant("γ", model, (norm.name,), both(batches))


# -- how it is called ----------------------------------------------------------------------------------------------------


@plants("BN108")
def _hard_wired(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    name = pick(model, rng).name
    wired = rebuilt(model, at(name, lambda layer, x, **kwargs: layer(x, training=True)))
    return Plant("training=True", wired, (name,), both(batches))


@plants("BN203")
def _dropout_before(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    name, rate = pick(model, rng).name, float(rng.uniform(0.2, 0.6))
    dropping = rebuilt(model, at(name, lambda layer, x, **kwargs: layer(keras.layers.Dropout(rate, name="planted")(x))))
    return Plant(f"{rate:.2f}", dropping, (name,), {"example": batches[0]})


@plants("BN303")
def _in_a_row(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    name = pick(model, rng).name
    double = rebuilt(model, at(name, lambda layer, x, **kwargs: Norm(name="second")(layer(x))))
    return Plant("second", settled(double, batches), ("second",), both(batches))


@plants("BN105")
def _several_streams(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    name = pick(model, rng).name
    # it is called on another stream beside
    shared = rebuilt(model, at(name, lambda layer, x, **kwargs: 0.5 * layer(x) + 0.5 * layer(3.0 * x + 5.0)))
    return Plant("called twice", settled(shared, batches), (name,), both(batches))


@plants("BN301")
def _redundant_bias(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    name = before(model, pick(model, rng)).name

    def biased(layer: Any) -> Any:
        return type(layer).from_config(layer.get_config() | ({"use_bias": True} if layer.name == name else {}))

    copy = keras.models.clone_model(model, clone_function=biased)
    held = {layer.name: layer.get_weights() for layer in model.layers}
    for layer in copy.layers:
        own = held[layer.name]
        layer.set_weights([*own, rng.normal(size=layer.weights[-1].shape)] if len(layer.weights) > len(own) else own)
    if len(copy.get_layer(name).weights) == len(held[name]):
        raise UnfitError("it has a bias")
    return Plant("bias", settled(copy, batches), (name,), both(batches))


# -- how it is trained ---------------------------------------------------------------------------------------------------


@plants("BN201")
def _few_values(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    size = int(rng.integers(2, 8))
    layers = tuple(norm.name for norm in norms_in(model))
    return Plant(f"batches of {size}", model, layers, both(batches) | {"loader": (8 * size, size)})


@plants("BN107")
def _one_value(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    layers = tuple(norm.name for norm in norms_in(model) if norm.input.shape[1:3] == (1, 1))
    if not layers:
        raise UnfitError("no layer on one place")
    return Plant("last batch", model, layers, both(batches) | {"loader": (65, 16)})


@plants("BN202")
def _decayed(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=float(10 ** rng.uniform(-4, -2)))
    optimizer.build(model.trainable_variables)
    layers = tuple(norm.name for norm in norms_in(model) if norm.trainable_variables)
    return Plant("AdamW", model, layers, both(batches) | {"optimizer": optimizer})


@plants("BN207")
def _useless_synchronization(model: Model, batches: list[Any], rng: np.random.Generator) -> Plant:
    norm = pick(model, rng)
    norm.synchronized = True
    return Plant("synchronized", model, (norm.name,), {"training": True})
