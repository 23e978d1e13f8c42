"""What the layers and operations of Keras do, in the words of the neutral picture."""

from collections.abc import Callable
from typing import Any

import keras
from keras import activations, layers

from batchnorm.graph import Activation, Add, Concat, Identity, Operation, Other, Pad, Pool, Reshape, Transpose
from batchnorm.keras.internals import found_class

__all__ = ["Chain", "activation", "chain", "merge"]

Shape = tuple[int, ...]
Chain = list[tuple[Operation, Shape]]
"""Operations, one after the other, each with the shape of its output."""

# which average only what they are given where a window reaches over the edge
_HONEST_BACKENDS = ("jax", "numpy", "tensorflow", "torch")
_HOMOGENEOUS = (activations.relu, activations.leaky_relu)
_MONOTONE = (
    activations.elu,
    activations.exponential,
    activations.hard_sigmoid,
    activations.log_sigmoid,
    activations.relu6,
    activations.selu,
    activations.sigmoid,
    activations.softplus,
    activations.softsign,
    activations.tanh,
)
_NEITHER = (activations.gelu, activations.hard_silu, activations.mish, activations.silu)
# operations of `keras.ops`, by the names of their classes
_OPERATIONS: dict[str, Operation] = {
    "Relu": Activation(homogeneous=True, monotone=True),
    "LeakyRelu": Activation(homogeneous=True),
    **dict.fromkeys(("Elu", "HardSigmoid", "Relu6", "Selu", "Sigmoid", "Softplus", "Tanh"), Activation(monotone=True)),
    **dict.fromkeys(("Gelu", "HardSilu", "Silu"), Activation()),
}


def activation(function: Any) -> Operation:
    """Return what an activation function does to each value."""
    if function is None or function is activations.linear:
        return Identity()
    if isinstance(function, layers.Layer):
        found = chain(function, (), (), training=False)
        return found[0][0] if found is not None and len(found) == 1 else Other(type(function).__name__)
    if function in _HOMOGENEOUS:
        return Activation(homogeneous=True, monotone=True)
    if function in _MONOTONE:
        return Activation(monotone=True)
    if function in _NEITHER:
        return Activation()
    return Other(getattr(function, "__name__", type(function).__name__))


def chain(layer: Any, shape: Shape, output: Shape, *, training: bool) -> Chain | None:
    """Return what a layer with one input does; ``None`` if that is not known.

    Args:
        layer: a layer, or an operation of ``keras.ops``.
        shape: of its input.
        output: the shape of its output.
        training: whether it is called with ``training=True``.
    """
    if not isinstance(layer, layers.Layer):
        operation = _OPERATIONS.get(type(layer).__name__) if _is_of_keras(layer) else None
        return None if operation is None else [(operation, output)]
    known = found_class(layer)
    if known is None or not keras.backend.is_float_dtype(layer.compute_dtype):
        return None
    if known in _IDENTITIES or (known in _NOISES and not training):
        return [(Identity(float(getattr(layer, "rate", 0.0))), output)]
    reader = _READERS.get(known)
    return None if reader is None else reader(layer, shape, output)


def merge(layer: Any, shapes: list[Shape], output: Shape) -> Add | Concat | Pool | None:
    """Return what a layer with several inputs does to all of them at once; ``None`` if that is not known.

    An average or a maximum of several arrays is a `Pool` along an axis on which they are laid side by side.
    """
    known = found_class(layer) if isinstance(layer, layers.Layer) else None
    name = type(layer).__name__ if _is_of_keras(layer) else ""
    if known is layers.Concatenate or (known is None and name == "Concatenate"):
        fits = len({len(shape) for shape in shapes}) == 1
        return Concat(layer.axis % len(output)) if fits else None
    if any(shape != output for shape in shapes):
        return None
    if known is layers.Add or (known is None and name == "Add"):
        return Add()
    kind = {layers.Average: "average", layers.Maximum: "max", layers.Minimum: "max"}.get(known)
    return None if kind is None else Pool(kind, (0,))


def _is_of_keras(operation: Any) -> bool:
    return type(operation).__module__.startswith("keras.src.ops.")


# -- one layer -----------------------------------------------------------------------------------------------------


def _places(layer: Any, ndim: int) -> tuple[int, ...]:
    """Return the axes that are neither the batch nor the channels."""
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return tuple(range(2, ndim))
    return tuple(range(1, ndim - 1))


def _activation(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(activation(layer.activation), output)]


def _relu(layer: Any, shape: Shape, output: Shape) -> Chain:
    homogeneous = layer.max_value is None and layer.threshold == 0
    return [(Activation(homogeneous, monotone=layer.negative_slope >= 0 and layer.threshold >= 0), output)]


def _leaky_relu(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Activation(homogeneous=True, monotone=layer.negative_slope >= 0), output)]


def _prelu(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Activation(homogeneous=True), output)]


def _elu(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Activation(monotone=layer.alpha >= 0), output)]


def _max_pool(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Pool("max", _places(layer, len(shape))), output)]


def _average_pool(layer: Any, shape: Shape, output: Shape) -> Chain:
    counted = getattr(layer, "padding", "valid") != "valid" and keras.backend.backend() not in _HONEST_BACKENDS
    return [(Pool("average", _places(layer, len(shape)), counted_padding=counted), output)]


def _global(kind: str) -> Callable[[Any, Shape, Shape], Chain]:
    def read(layer: Any, shape: Shape, output: Shape) -> Chain:
        places = _places(layer, len(shape))
        kept = tuple(1 if axis in places else size for axis, size in enumerate(shape))
        pooled: Chain = [(Pool(kind, places), kept)]
        return pooled if layer.keepdims else [*pooled, (Reshape(), output)]

    return read


def _resize(layer: Any, shape: Shape, output: Shape) -> Chain | None:
    if getattr(layer, "interpolation", "nearest") not in ("nearest", "bilinear"):
        return None
    return [(Pool("average", _places(layer, len(shape))), output)]


def _crop(layer: Any, shape: Shape, output: Shape) -> Chain:
    # each value that is left is an average of itself
    return [(Pool("average", _places(layer, len(shape))), output)]


def _pad(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Identity() if shape == output else Pad(_places(layer, len(shape)), 0.0), output)]


def _flatten(layer: Any, shape: Shape, output: Shape) -> Chain:
    if layer.data_format != "channels_first" or len(shape) < 3:
        return [(Reshape(), output)]
    order = (0, *range(2, len(shape)), 1)
    return [(Transpose(order), tuple(shape[axis] for axis in order)), (Reshape(), output)]


def _reshape(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Reshape(), output)]


def _permute(layer: Any, shape: Shape, output: Shape) -> Chain:
    return [(Transpose((0, *layer.dims)), output)]


def _named(names: str) -> list[Any]:
    """Return the layers of these names that this version of Keras has."""
    return [getattr(layers, name) for name in names.split() if hasattr(layers, name)]


def _ranks(name: str) -> list[Any]:
    return _named(" ".join(f"{name}{rank}D" for rank in (1, 2, 3)))


_IDENTITIES = _named("Identity ActivityRegularization")
_NOISES = [*_named("Dropout GaussianDropout AlphaDropout GaussianNoise"), *_ranks("SpatialDropout")]
_READERS: dict[Any, Callable[[Any, Shape, Shape], Chain | None]] = {
    layers.Activation: _activation,
    layers.ReLU: _relu,
    layers.LeakyReLU: _leaky_relu,
    layers.PReLU: _prelu,
    layers.ELU: _elu,
    layers.Flatten: _flatten,
    layers.Reshape: _reshape,
    layers.Permute: _permute,
    **dict.fromkeys([*_ranks("MaxPooling"), *_ranks("AdaptiveMaxPooling")], _max_pool),
    **dict.fromkeys([*_ranks("AveragePooling"), *_ranks("AdaptiveAveragePooling")], _average_pool),
    **dict.fromkeys(_ranks("GlobalAveragePooling"), _global("average")),
    **dict.fromkeys(_ranks("GlobalMaxPooling"), _global("max")),
    **dict.fromkeys(_ranks("UpSampling"), _resize),
    **dict.fromkeys(_ranks("Cropping"), _crop),
    **dict.fromkeys(_ranks("ZeroPadding"), _pad),
}
