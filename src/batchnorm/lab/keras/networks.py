"""The networks of Keras that are compared: the same for every arm but for what the arm declares."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization
from batchnorm.keras.internals import as_array, fresh_names, leaving_random, quietly
from batchnorm.lab import factories
from batchnorm.lab.arms import Arm
from batchnorm.lab.factories import Factory
from batchnorm.lab.keras.heads import PutBack, take_off
from batchnorm.moments import Moments

__all__ = ["NETWORKS", "PREFIX", "Network", "build", "factory_of", "hidden"]

PREFIX = "keras:"
VALUES_AT_ONCE = 2**14


@dataclass(frozen=True)
class Network:
    """A model of Keras from raw rows, channels last, to logits.

    Args:
        model: a ``keras.Model``.
        put_back: makes a model of it that ends as the factory's; ``None`` where that gave logits itself.
        variables: all that training or a seed may change.
        again: builds the same network once more.
    """

    model: Any
    put_back: PutBack | None
    variables: tuple[Any, ...]
    again: Callable[[], "Network"]

    def fill(self, other: "Network") -> None:
        """Take over the variables of another network of the same kind."""
        for own, given in zip(self.variables, other.variables, strict=True):
            # a copy: JAX gives the memory of variables away in each step
            own.assign(np.array(as_array(given.value)))

    def copy(self) -> "Network":
        """Return a network with the same variables, which shares none of them."""
        twin = self.again()
        twin.fill(self)
        return twin

    def finished(self) -> Any:
        """Return the model as the factory ends it."""
        return self.model if self.put_back is None else self.put_back(self.model)


def hidden(arm: Arm, linear: Any) -> list[Any]:
    """Return a linear layer of Keras with the normalization and activation of an arm, in the arm's order.

    Where nothing stands between the two, the activation is that of the linear layer.

    Args:
        arm: the arm.
        linear: a new ``Dense`` or ``Conv2D`` layer without an activation; channels come last.

    Example:
        >>> import keras
        >>> from batchnorm.lab import ARMS
        >>> [type(layer).__name__ for layer in hidden(ARMS["before"], keras.layers.Dense(3, use_bias=False))]
        ['Dense', 'BatchNormalization', 'Activation']
        >>> [type(layer).__name__ for layer in hidden(ARMS["after"], keras.layers.Dense(3))]
        ['Dense', 'BatchNormalization']
    """
    images = isinstance(linear, keras.layers.Conv2D)
    norm = _norm(arm, linear.filters if images else linear.units, images)
    if norm is not None and arm.place == "before":
        return [linear, norm, keras.layers.Activation(arm.activation)]
    linear.activation = keras.activations.get(arm.activation)
    return [linear] if norm is None else [linear, norm]


def dense(shape: tuple[int, ...], classes: int, arm: Arm) -> Any:
    """Two hidden layers of 300 and 100 units, and a softmax."""
    layers: list[Any] = []
    for width in (300, 100):
        layers += hidden(arm, keras.layers.Dense(width, use_bias=arm.linear_bias, kernel_initializer="he_normal"))
    return keras.Sequential([*layers, _outputs(classes)])


def cnn(shape: tuple[int, ...], classes: int, arm: Arm) -> Any:
    """Two 3×3 convolutions, each halving the image, and a dense layer with a softmax."""
    if len(shape) != 3 or min(shape[:2]) < 4:
        raise OptionError(
            f"the model keras:cnn needs images of at least 4×4 pixels, the data has rows of shape {shape}"
        )
    layers: list[Any] = []
    for channels in (16, 32):
        layers += hidden(arm, _conv(channels, arm.linear_bias))
        layers.append(keras.layers.MaxPooling2D(2, data_format="channels_last"))
    return keras.Sequential([*layers, keras.layers.Flatten(data_format="channels_last"), _outputs(classes)])


NETWORKS: dict[str, Factory] = {"dense": dense, "cnn": cnn}
"""The networks that have a name."""

_FLAT = ("dense",)


def build(model: str, shape: tuple[int, ...], classes: int, arm: Arm, seed: int, x_train: np.ndarray) -> Network:
    """Build the network of an arm; equal seeds give equal linear weights in every arm.

    Args:
        model: what follows ``keras:``.
        shape: of one row, channels last.
        classes: how many.
        arm: the arm.
        seed: of the weights.
        x_train: rows to be standardized by, ``(N, features)`` or ``(N, H, W, C)``.

    Raises:
        OptionError: an unknown model, or a factory that fails.
    """
    factory, said = factory_of(model), PREFIX + model
    with leaving_random(), quietly():
        fresh_names()
        _seed(seed)
        flat = [keras.layers.Flatten(data_format="channels_last")] if model in _FLAT and len(shape) > 1 else []
        rows = x_train.reshape(len(x_train), -1) if flat else x_train
        entry = [*flat, *_input(arm, rows)]
        body = factories.called(factory, said, shape, classes, arm, "a model of Keras")
        if not isinstance(body, keras.Model):
            raise OptionError(f"{said} must return a keras.Model, it returned a {type(body).__name__}")
        try:
            # a softmax at the end of a graph, before that graph is a part of another; or of a list of layers, once it is built
            body, put_back = take_off(body)
            logits, put_back = (
                (_joined(shape, entry, body), put_back) if put_back else take_off(_joined(shape, entry, body))
            )
        except Exception as error:
            raise OptionError(f"{said} with arm {arm.name!r} must take rows of shape {shape}: {error}") from error
    variables = tuple(logits.variables)
    return Network(logits, put_back, variables, lambda: build(model, shape, classes, arm, seed, x_train[:2]))


def factory_of(model: str) -> Factory:
    """Return the factory ``(shape, classes, arm) -> keras.Model`` of a named network or of ``package.module:factory``.

    Raises:
        OptionError: no such network, module or factory, or one that does not take these arguments.
    """
    return factories.factory_of(model, NETWORKS, PREFIX)


def _seed(seed: int) -> None:
    """Fix what new layers draw: Keras's initializers and dropout from ``random``, a user's own from NumPy or torch."""
    random.seed(seed)
    np.random.seed(seed)
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(seed)


def _joined(shape: tuple[int, ...], entry: list[Any], body: Any) -> Any:
    """Return one model: flat where the body is a plain list of layers, so that what is shipped reads as it was written."""
    if not entry and body.built:
        return body
    is_list = type(body) is keras.Sequential
    names = [layer.name for layer in (*entry, *body.layers)] if is_list else []
    inner = body.layers if is_list and len(set(names)) == len(names) else [body]
    return keras.Sequential([keras.Input(shape), *entry, *inner])


def _input(arm: Arm, rows: np.ndarray) -> list[Any]:
    if arm.input == "standardized":
        return [_standardize(rows)]
    return [BatchNormalization()] if arm.input == "norm" else []


def _standardize(x: np.ndarray) -> Any:
    """Return a layer that subtracts the mean of the training rows and divides by their deviation: frozen, and foldable."""
    axes = tuple(range(x.ndim - 1))
    step = max(1, VALUES_AT_ONCE // x[0].size)
    parts = (Moments.of(x[i : i + step].astype(np.float64), axes) for i in range(0, len(x), step))
    measured = Moments.empty().merge(*parts)
    variance = np.where(measured.variance == 0, 1.0, measured.variance)
    layer = keras.layers.BatchNormalization(center=False, scale=False, epsilon=0.0, trainable=False, name="standardize")
    layer.build((None, *x.shape[1:]))
    layer.moving_mean.assign(measured.mean)
    layer.moving_variance.assign(variance)
    return layer


def _norm(arm: Arm, features: int, images: bool) -> Any | None:
    if arm.norm == "batch":
        return BatchNormalization()
    if arm.norm == "group":
        return keras.layers.GroupNormalization(8 if features % 8 == 0 else math.gcd(features, 10))
    if arm.norm == "layer":
        return keras.layers.GroupNormalization(1) if images else keras.layers.LayerNormalization()
    return None


def _outputs(classes: int) -> Any:
    return keras.layers.Dense(classes, activation="softmax", kernel_initializer="he_normal")


def _conv(channels: int, bias: bool) -> Any:
    return keras.layers.Conv2D(
        channels, 3, padding="same", use_bias=bias, kernel_initializer="he_normal", data_format="channels_last"
    )
