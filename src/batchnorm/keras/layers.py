"""Layers of our own that a rewritten Keras model may hold."""

from typing import Any

import keras
from keras import ops

__all__ = ["ScaleShift"]


@keras.saving.register_keras_serializable(package="batchnorm")
class ScaleShift(keras.layers.Layer):  # type: ignore[misc]
    """What is left of a batch normalization layer that nothing could absorb: ``y = scale · x + shift`` for each channel.

    It has two trainable weights of shape ``(C,)`` and no statistics, so it does the same in training and in evaluation. Like
    batch normalization it computes in float32 at least. A ``.keras`` file that holds it is read after
    ``import batchnorm.keras``.

    No layer of Keras says this exactly: ``Normalization`` has positive scales only, ``Rescaling`` follows the global data
    format and has no weights, an ``EinsumDense`` may multiply in TF32 and would be quantized.

    Args:
        axis: of the channels.

    Example:
        >>> layer = ScaleShift(axis=1)
        >>> layer.build((None, 3, 8, 8))
        >>> [(weight.name, weight.shape) for weight in layer.weights]
        [('scale', (3,)), ('shift', (3,))]
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = int(axis)
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for inputs of a shape."""
        size = (input_shape[self.axis],)
        self.scale = self.add_weight(name="scale", shape=size, initializer="ones", autocast=False)
        self.shift = self.add_weight(name="shift", shape=size, initializer="zeros", autocast=False)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={self.axis: size[0]})

    def call(self, inputs: Any) -> Any:
        """Scale and shift the channels."""
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        scale, shift = (ops.reshape(ops.cast(v, dtype), shape) for v in (self.scale, self.shift))
        return ops.cast(ops.cast(inputs, dtype) * scale + shift, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what is needed to make the layer again."""
        return {**super().get_config(), "axis": self.axis}
