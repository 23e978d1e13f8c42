"""Keras's batch normalization layer, with statistics that do not cancel, masks, weights, and what else the other wings know."""

from typing import Any

import keras

__all__ = ["BatchNormalization"]


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras's ``BatchNormalization``: same constructor, weights, config and files.

    Args:
        virtual_batch_size: normalize ghost batches of this many samples each.
        unbiased: keep the unbiased moving variance, as torch does; False keeps the biased one, as Keras does.
        debias: take the initial mean 0 and variance 1 out of the moving statistics, from the first step on.
        on_single: one value a channel in training is an ``"error"``, is normalized by the ``"running"`` statistics, or by
            itself (``"skip"``); statistics stay as they are.
        synchronized: normalize by the statistics of all replicas, on every backend.
        **keras_options: those of ``keras.layers.BatchNormalization``.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        debias: bool = False,
        on_single: str = "skip",
        synchronized: bool = False,
        **keras_options: Any,
    ) -> None:
        super().__init__(axis, momentum, epsilon, **keras_options)
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.debias = debias
        self.on_single = on_single
        self.synchronized = synchronized
