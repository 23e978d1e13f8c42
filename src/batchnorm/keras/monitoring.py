"""Look at the batch normalization of a Keras model while it is trained, on any backend, compiled or not."""

from pathlib import Path
from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.history import History, check_every
from batchnorm.keras.internals import as_array
from batchnorm.keras.linear import linear_before
from batchnorm.keras.naming import names_of, norms_of, numbers_of
from batchnorm.keras.rates import rates
from batchnorm.observed import NOISE, divergence, json_ready, rounding
from batchnorm.protocol import Pair

__all__ = ["Monitor"]


class Monitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Observe the batch normalization of a model in every so many-th batch that it is trained on.

    The batch's mean and variance are read from how far it has moved the moving statistics, so that nothing has to be put into
    the model and compiled training is observed as well. With the momentum a, and v before and v' after the batch::

        batch = (v' - a · v) / (1 - a)

    They are held against the moving statistics as they stand before the batch. Training is not changed.

    Numbers of each layer: ``distance`` (KL divergence of the batch from the moving statistics, nats a channel), ``dead``
    (share of channels without variance), ``gamma`` (mean |γ|). Of each linear layer whose output reaches a layer (of all, where
    there is none): ``effective_rate``, lr / ‖w‖². What needs the inputs of layers is not known here: ``observe`` tells it for a
    data set.

    Args:
        log_dir: a folder for TensorBoard: all numbers as scalars, and as histograms γ, β, moving mean and variance; ``None`` to
            write nothing. Needs ``pip install 'batchnorm[monitor]'``.
        every: observe each so many-th batch, the first one included.

    Attributes:
        history: a dict for each observed batch: ``step``, ``layers`` and ``weights``, each with numbers by name.

    Raises:
        OptionError: at the start of the training, where several batches are run at once (``steps_per_execution``).
        MissingDependencyError: ``log_dir`` is given, and what writes it is not installed.

    Example:
        >>> monitor = Monitor(every=2)
        >>> monitor.history
        []
    """

    def __init__(self, log_dir: str | Path | None = None, every: int = 50) -> None:
        super().__init__()
        self.every = check_every(every)
        self._kept = History(log_dir)
        self._step = 0
        self._before: dict[str, Pair] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records so far."""
        return self._kept.records

    def to_dict(self) -> dict[str, Any]:
        """Return the history, ready for JSON."""
        return {"every": self.every, "history": [dict(record) for record in self.history]}

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that batches can be told apart."""
        if getattr(self.model, "steps_per_execution", 1) != 1:
            raise OptionError(
                "steps_per_execution must be 1, to tell one batch from another: compile the model with that"
            )

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Read the moving statistics before a batch that is observed."""
        if self._step % self.every == 0 and self.model.built:
            self._before = {name: _statistics(layer) for layer, name in self._norms().items()}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Read them again, and keep what has changed."""
        if self._before is not None:
            self._keep(self._before)
            self._before = None
        self._step += 1

    def on_train_end(self, logs: Any = None) -> None:
        """Write what is left."""
        self._kept.close()

    def _norms(self) -> dict[Any, str]:
        # JAX keeps them elsewhere while it trains
        getattr(self.model, "jax_state_sync", lambda: None)()
        return {layer: name for layer, name in norms_of(self.model).items() if layer.trainable and layer.momentum < 1}

    def _keep(self, before: dict[str, Pair]) -> None:
        norms = self._norms()
        layers, histograms = {}, {}
        for layer, name in norms.items():
            mean, variance, gamma, beta = numbers_of(layer)
            assert mean is not None  # noqa: S101
            assert variance is not None  # noqa: S101
            layers[name] = _numbers(layer, before[name], (mean, variance), gamma)
            histograms[name] = {
                "gamma_of_channels": gamma,
                "beta_of_channels": beta,
                "moving_mean": mean,
                "moving_variance": variance,
            }
        self._kept.add(self._step, layers, histograms)
        names = names_of(self.model)
        linear = [names[one] for one in map(linear_before, norms) if one in names]
        found = rates(self.model, self.model.optimizer, tuple(linear))
        self._kept.add_weights(self._step, {one.layer: {"effective_rate": json_ready(one.effective)} for one in found})


def _statistics(layer: Any) -> Pair:
    mean, variance, *_ = numbers_of(layer)
    assert mean is not None  # noqa: S101
    assert variance is not None  # noqa: S101
    return mean, variance


def _kept(layer: Any) -> float:
    """Return the weight of the past in the step that a layer has made last; a debiased one starts with none."""
    momentum, updates = float(layer.momentum), getattr(layer, "updates", None)
    if updates is None:
        return momentum
    return (
        momentum * (1 - momentum ** (step - 1)) / (1 - momentum**step)
        if (step := int(as_array(updates.value))) > 1
        else 0.0
    )


def _numbers(layer: Any, before: Pair, after: Pair, gamma: np.ndarray | None) -> dict[str, float | None]:
    kept = _kept(layer)
    with np.errstate(all="ignore"):
        mean, variance = ((new - kept * old) / (1.0 - kept) for new, old in zip(after, before, strict=True))
        # the difference of two numbers that were rounded
        noise = NOISE * rounding(str(layer.moving_variance.dtype)) * before[1] / (1.0 - kept)
        dead = variance <= noise
        kl = divergence((mean, np.where(dead, 0.0, variance)), before, float(layer.epsilon))
    return {
        "distance": json_ready(float(kl.mean())),
        "dead": float(dead.mean()),
        "gamma": None if gamma is None else json_ready(float(np.abs(gamma).mean())),
    }
