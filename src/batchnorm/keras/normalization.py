"""Keras's batch normalization layer, with statistics that do not cancel, masks, weights, and what else the other wings know."""

import warnings
from typing import Any

import keras
from keras import ops

from batchnorm.errors import BatchNormWarning, ChannelError, OptionError, ShapeError
from batchnorm.keras import options
from batchnorm.keras.backends import at_hand, in_own_words, is_eager_torch, total_over_replicas
from batchnorm.keras.batches import Batch, ghosts_of, measure
from batchnorm.keras.weighing import weights_of

__all__ = ["LONG", "BatchNormalization"]

# the count of steps where statistics came without one: their initial values have long been forgotten
LONG = 2**30


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras's ``BatchNormalization``: same constructor, weights, config and files.

    ::

        training:    y = γ · (x - μ_B) / √(σ²_B + ε) + β         moving = momentum · moving + (1 - momentum) · batch
        otherwise:   y = γ · (x - moving mean) / √(moving variance + ε) + β

    On every backend statistics are taken in float32 or wider, centred, in two passes, and inputs are centred before they are
    scaled. A batch with inf or NaN, or without a value that counts, does not reach the moving statistics. ``trainable = False``
    means inference, as in Keras.

    Args:
        axis: of the channels; inputs may have any rank from 2 on.
        momentum: weight of the past in the moving statistics.
        epsilon: added to the variance under the root.
        center: add β.
        scale: multiply by γ.
        beta_initializer: of β, ``(C,)``.
        gamma_initializer: of γ, ``(C,)``.
        moving_mean_initializer: of the moving mean, ``(C,)``.
        moving_variance_initializer: of the moving variance, ``(C,)``.
        beta_regularizer: of β.
        gamma_regularizer: of γ.
        beta_constraint: of β.
        gamma_constraint: of γ.
        renorm: batch renormalization, towards moving statistics of its own.
        renorm_clipping: its bounds, a dict with keys from ``rmax``, ``rmin``, ``dmax``.
        renorm_momentum: weight of the past in its statistics.
        synchronized: normalize by the statistics of all replicas, exactly, on every backend.
        virtual_batch_size: normalize ghost batches of this many samples each; a single last sample joins its neighbour.
        unbiased: keep the unbiased moving variance, as torch does; False keeps the biased one, as Keras does.
        debias: take the initial values out of the moving statistics, from the first step on. A weight more counts the steps.
        on_single: one value a channel in training has no spread: ``"skip"`` puts out β, ``"running"`` normalizes it by the
            moving statistics, ``"error"`` raises. Statistics stay as they are. Where a compiled step can't know the count, as
            with masks, it is ``"skip"``.
        **layer_options: those of every layer, as ``name`` and ``dtype``.

    Raises:
        OptionError: a value that an option can't have, or options that exclude each other.
        ShapeError: inputs, a mask or weights of a shape that does not fit; one value a channel with ``on_single="error"``.
        ChannelError: inputs with another number of channels than the layer was built for.

    Example:
        >>> import numpy as np
        >>> layer = BatchNormalization(momentum=0.0)
        >>> x = np.array([[1e6 + 1.0], [1e6 + 3.0], [7.0]], "float32")
        >>> y = layer(x, mask=np.array([True, True, False]), training=True)
        >>> float(layer.moving_mean.value[0]), float(layer.moving_variance.value[0])
        (1000002.0, 1.0)

    Reference:
        Ioffe, Szegedy 2015, Algorithms 1 and 2. Renormalization: Ioffe 2017 (arXiv:1702.03275). Ghost batches: Hoffer, Hubara,
        Soudry 2017 (arXiv:1705.08741).
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        debias: bool = False,
        on_single: str = "skip",
        **layer_options: Any,
    ) -> None:
        options.check(
            {
                "axis": axis, "momentum": momentum, "epsilon": epsilon, "renorm": renorm, "renorm_clipping": renorm_clipping,
                "renorm_momentum": renorm_momentum, "synchronized": synchronized, "virtual_batch_size": virtual_batch_size,
                "unbiased": unbiased, "debias": debias, "on_single": on_single,
            }
        )  # fmt: skip
        try:
            super().__init__(
                axis, momentum, epsilon, center, scale, beta_initializer, gamma_initializer, moving_mean_initializer,
                moving_variance_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint,
                renorm, renorm_clipping, renorm_momentum, **layer_options,
            )  # fmt: skip
        except ValueError as error:
            raise OptionError(f"Keras takes no such layer: {error}") from error
        # past Keras, which has it on one backend only
        self.synchronized = synchronized
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.debias = debias
        self.on_single = on_single
        self.updates: Any = None
        self._warned = False

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs of a shape.

        Raises:
            ShapeError: there is no such axis, or its size is not known.
            OptionError: ghost batches along the axis of the channels.
        """
        rank = len(input_shape)
        if rank < 2 or not -rank <= self.axis < rank:
            raise ShapeError(
                f"axis must be one of the axes of inputs that have two of them at least, got axis {self.axis} for inputs of "
                f"shape {tuple(input_shape)}, in layer {self.name!r}"
            )
        if input_shape[self.axis] is None:
            raise ShapeError(
                f"the number of channels must be known, got inputs of shape {tuple(input_shape)} with channels on axis "
                f"{self.axis}, in layer {self.name!r}: give the shape to keras.Input"
            )
        if self.virtual_batch_size is not None and self.axis % rank == 0:
            raise OptionError(
                f"virtual_batch_size cuts axis 0, which holds the channels here: axis {self.axis}, {self.name!r}"
            )
        super().build(input_shape)
        if self.debias:
            self.updates = self.add_weight(
                shape=(), name="updates", initializer="zeros", dtype="int32", trainable=False, autocast=False
            )

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Normalize ``inputs``; see `call` for the arguments.

        Raises:
            ShapeError: inputs of another rank than the layer was built for.
            ChannelError: inputs with another number of channels.
        """
        shape = getattr(inputs, "shape", None)
        if self.built and shape is not None:
            self._check(tuple(shape))
        return super().__call__(inputs, *args, **kwargs)

    def _check(self, shape: tuple[int | None, ...]) -> None:
        rank = self.input_spec.ndim
        if len(shape) != rank:
            raise ShapeError(f"layer {self.name!r} was built for inputs with {rank} axes, got shape {shape}")
        channels = self.moving_mean.shape[0]
        if shape[self.axis] not in (None, channels):
            raise ChannelError(
                f"layer {self.name!r} was built for {channels} channels on axis {self.axis}, got inputs of shape {shape}"
            )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the inputs."""
        return input_shape

    def call(self, inputs: Any, training: Any = None, mask: Any = None, sample_weight: Any = None) -> Any:
        """Normalize a batch.

        Args:
            inputs: any rank, channels on ``axis``.
            training: normalize by the batch, and move the moving statistics, if the layer is trainable.
            mask: the shape of ``inputs`` without the axis of the channels, or its first axes, as ``(N,)`` or ``(N, T)``; true,
                or not zero, where a value counts. Floating numbers are weights, as those of ``sample_weight``. Other places are
                normalized too, as in Keras, but count for nothing.
            sample_weight: of the same shapes; a frequency: weight 2 is the sample twice. A constant for the gradients.
        """
        width = (
            "float64" if "float64" in (keras.backend.standardize_dtype(inputs.dtype), self.compute_dtype) else "float32"
        )
        if mask is None and sample_weight is not None:
            # with two arguments that are tensors, Keras does not look for it
            mask = getattr(inputs, "_keras_mask", None)
        x = ops.cast(inputs, width)
        with in_own_words():
            weight = weights_of(x, self.axis % len(x.shape), mask, sample_weight)
            y = self._train(x, weight) if training and self.trainable else self._evaluate(x)
        return ops.cast(y, self.compute_dtype)

    def _evaluate(self, x: Any) -> Any:
        variance = self._over_channels(self.moving_variance, x)
        scale = ops.rsqrt(variance + self.epsilon)
        scale = scale if self.gamma is None else scale * self._over_channels(self.gamma, x)
        y = (x - self._over_channels(self.moving_mean, x)) * scale
        return y if self.beta is None else y + self._over_channels(self.beta, x)

    def _train(self, x: Any, weight: Any) -> Any:
        axis = self.axis % len(x.shape)
        if weight is None and self._is_plain and is_eager_torch(x) and x.numel() > x.shape[axis]:
            return self._train_on_torch(x, axis)
        batch = measure(
            x,
            tuple(i for i in range(len(x.shape)) if i != axis),
            weight,
            ghosts_of(ops.shape(x)[0], self.virtual_batch_size),
            total_over_replicas() if self.synchronized else None,
        )
        places = batch.places
        known = places if isinstance(places, int) else int(places) if at_hand(places) else None
        if known == 1 and self.on_single == "error":
            raise ShapeError(
                f"training needs more than one value a channel, got inputs of shape {tuple(x.shape)} in layer {self.name!r}: "
                "give a larger batch, or on_single='running' or 'skip' to the layer"
            )
        if known == 1 and self.on_single == "running":
            return self._evaluate(x)
        y = self._normalize(batch, x)
        if known is None or known > 1:
            self._move(batch, known)
        return y

    @property
    def _is_plain(self) -> bool:
        return not (self.renorm or self.synchronized or self.debias) and self.virtual_batch_size is None

    def _train_on_torch(self, x: Any, axis: int) -> Any:
        """Do the same in few calls: for a small layer they cost more than the arithmetic."""
        from batchnorm.keras import on_torch

        gamma, beta = (None if v is None else v.value for v in (self.gamma, self.beta))
        y, mean, variance = on_torch.normalize(x, axis, gamma, beta, self.epsilon)
        if self.unbiased:
            count = x.numel() // x.shape[axis]
            variance *= count / (count - 1)
        moving = (self.moving_mean, self.moving_variance)
        moved = on_torch.moved(moving, (mean, variance), 1.0 - self.momentum)
        if moved is None:
            self._warn()
        else:
            for variable, new in zip(moving, moved, strict=True):
                variable.assign(new)
        return y

    def _normalize(self, batch: Batch, x: Any) -> Any:
        """Return ``γ · (x̂·r + d) + β``; without renormalization r = 1 and d = 0."""
        gamma, beta = (None if v is None else self._over_channels(v, x) for v in (self.gamma, self.beta))
        scale = ops.rsqrt(batch.variance + self.epsilon)
        scale = scale if gamma is None else scale * gamma
        if not self.renorm:
            y = batch.centred * batch.spread(scale)
            return y if beta is None else y + beta
        r, d = self._correction(batch, x)
        shift = d if gamma is None else d * gamma
        y = batch.centred * batch.spread(scale * r) + batch.spread(shift)
        return y if beta is None else y + beta

    def _correction(self, batch: Batch, x: Any) -> tuple[Any, Any]:
        """Return r and d of renormalization, constants."""
        mean, variance = ops.stop_gradient(batch.mean), ops.stop_gradient(batch.variance)
        least = self.epsilon**0.5
        deviation = self._over_channels(self.renorm_stddev, x)
        deviation = ops.where(deviation < least, least * ops.ones_like(deviation), deviation)
        r = ops.sqrt(variance + self.epsilon) / deviation
        d = (mean - self._over_channels(self.renorm_mean, x)) / deviation
        bounds = self.renorm_clipping or {}
        rmin, rmax, dmax = (bounds.get(name) for name in ("rmin", "rmax", "dmax"))
        r = r if rmin is None and rmax is None else ops.clip(r, rmin, rmax)
        return r, d if dmax is None else ops.clip(d, -dmax, dmax)

    def _over_channels(self, v: Any, x: Any) -> Any:
        """Shape a weight of the layer to meet ``x``, in its dtype."""
        shape = [1] * len(x.shape)
        shape[self.axis] = -1
        return ops.reshape(ops.cast(v, x.dtype), shape)

    # -- the moving statistics -----------------------------------------------------------------------------------------

    def _move(self, batch: Batch, known: int | None) -> None:
        """Move the moving statistics by a batch, unless that is not finite, or nothing says that it has two values."""
        moved = [(variable, ops.cast(new, variable.dtype)) for variable, new in self._moved(batch)]
        sound = ops.isfinite(sum(ops.cast(ops.sum(new), "float32") for _, new in moved))
        if at_hand(sound) and known is not None:
            if not bool(sound):
                self._warn()
                return
        else:
            sound = sound if known is not None else ops.logical_and(sound, batch.places > 1)
            moved = [(variable, ops.where(sound, new, variable.value)) for variable, new in moved]
        for variable, new in moved:
            variable.assign(new)

    def _moved(self, batch: Batch) -> list[tuple[Any, Any]]:
        """Return what the weights that hold statistics move to."""
        count, mean, variance = batch.whole()
        mean, variance = ops.reshape(mean, (-1,)), ops.reshape(variance, (-1,))

        def towards(old: Any, new: Any, w: Any) -> Any:
            return ops.cast(old, mean.dtype) * (1.0 - w) + new * w

        w = 1.0 - self.momentum
        if self.renorm:
            deviation, own = ops.sqrt(variance + self.epsilon), 1.0 - self.renorm_momentum
            stddev = towards(self.moving_stddev, deviation, w)
            squared = stddev * stddev - self.epsilon
            return [
                (self.renorm_mean, towards(self.renorm_mean, mean, own)),
                (self.renorm_stddev, towards(self.renorm_stddev, deviation, own)),
                (self.moving_mean, towards(self.moving_mean, mean, w)),
                (self.moving_stddev, stddev),
                (self.moving_variance, ops.where(squared < 0, ops.zeros_like(squared), squared)),
            ]
        steps = []
        if self.debias:
            steps = [(self.updates, self.updates + 1)]
            w = _debiased(self.momentum, ops.cast(self.updates, mean.dtype) + 1.0)
        if not self.unbiased:
            new = towards(self.moving_variance, variance, w)
        elif isinstance(count, int):
            new = towards(self.moving_variance, variance * (count / (count - 1)), w)
        else:
            count = ops.reshape(count, (-1,))
            rest = ops.where(count > 1, count - 1, ops.ones_like(count))
            # a sum of weights of one or less says nothing about it
            new = towards(self.moving_variance, variance * (count / rest), w)
            new = ops.where(count > 1, new, ops.cast(self.moving_variance, new.dtype))
        return [(self.moving_mean, towards(self.moving_mean, mean, w)), (self.moving_variance, new), *steps]

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"layer {self.name!r}: a batch with inf or NaN was left out of the moving statistics (and so will others): "
                "look for what made it, here or in a layer before",
                BatchNormWarning,
                stacklevel=2,
            )

    # -- files -----------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return what is needed to make the layer again; of the options that Keras does not have, those that are used."""
        return {**super().get_config(), **options.changed(self)}

    def load_own_variables(self, store: Any) -> None:
        """Read the weights; statistics that come without a count of steps have long forgotten their initial values."""
        if self.updates is not None and len(store) == len(self.weights) - 1:
            arrays = {key: store[key] for key in store}
            store = {**arrays, str(len(arrays)): LONG}
        super().load_own_variables(store)


def _debiased(momentum: float, step: Any) -> Any:
    """Return the weight ``(1 - a) / (1 - a^t)`` of step t, which is 1 at the first one."""
    if momentum in (0.0, 1.0):
        return 1.0 - momentum
    w = (1.0 - momentum) / (1.0 - ops.power(ops.cast(momentum, step.dtype), step))
    # rounding must not leave a trace of the initial values
    return ops.where(step <= 1, ops.ones_like(w), w)
