"""What is seen of a network of Keras: its scores, and what flows into its activations while it learns."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.keras.internals import as_array, parts, quietly, untraced
from batchnorm.lab.data import Split
from batchnorm.lab.tasks import (
    CURVE_POINTS,
    CURVE_ROWS,
    PERCENTILE_POINTS,
    PERCENTILES,
    PROBE_ROWS,
    PROBE_UNITS,
    Scores,
    units_of,
)

__all__ = ["Watch", "logits_of", "score"]

ROWS_AT_ONCE = 4096
# layers whose activation is applied to what they compute, once in each call
_WITH_ACTIVATION = (
    keras.layers.Activation,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Dense,
)
# layers that are an activation
_ACTIVATIONS = (keras.layers.ELU, keras.layers.LeakyReLU, keras.layers.PReLU, keras.layers.ReLU)


def logits_of(model: Any, x: np.ndarray) -> np.ndarray:
    """Return the outputs of a model in evaluation, ``(N, classes)``."""
    with quietly():
        parts = [model.predict_on_batch(x[i : i + ROWS_AT_ONCE]) for i in range(0, len(x), ROWS_AT_ONCE)]
    return np.concatenate([np.asarray(part) for part in parts])


def score(model: Any, x: np.ndarray, y: np.ndarray) -> Scores:
    """Return mean log-loss in nats and accuracy of a model that gives logits."""
    logits = logits_of(model, x).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        shifted = logits - logits.max(1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
    return float(losses.mean()), float((logits.argmax(1) == y).mean())


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Records the learning curve, and what flows into the activations, without moving any variable of the model.

    Args:
        split: channels last.
        steps: of the whole run.
    """

    def __init__(self, split: Split, steps: int) -> None:
        super().__init__()
        self.split = split
        self.step, self.diverged = 0, False
        self.curve: list[list[float | None]] = []
        self.curve_every = max(1, steps // CURVE_POINTS)
        self.probe_every = max(1, steps // PERCENTILE_POINTS)
        self.probed: list[tuple[int, list[np.ndarray]]] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Look at the model after a step; the loss is the mean since the last record."""
        self.step += 1
        loss = float((logs or {})["loss"])
        if not math.isfinite(loss):
            self.diverged = self.model.stop_training = True
            return
        if self.step % self.curve_every == 0:
            model = self.model
            val = score(model, self.split.x_val[:CURVE_ROWS], self.split.y_val[:CURVE_ROWS])
            self.curve.append([self.step, *(v if math.isfinite(v) else None for v in (loss, *val))])
            model.reset_metrics()
        if self.step % self.probe_every == 0 or self.step == 1:
            self.probed.append((self.step, _percentiles(self.model, self.split.x_val[:PROBE_ROWS])))

    def units(self) -> list[dict[str, Any]]:
        """Return what the probes have seen, for each activation layer."""
        return units_of(self.probed)


def _percentiles(model: Any, rows: np.ndarray) -> list[np.ndarray]:
    """Return the percentiles of what the first units of each activation receive in training, ``(3, units)``."""
    found: list[np.ndarray] = []

    def note(inputs: Any) -> None:
        values = as_array(inputs).astype(np.float64)
        units = values.reshape(-1, values.shape[-1])[:4096, :PROBE_UNITS]
        with np.errstate(invalid="ignore"):
            found.append(np.quantile(units, PERCENTILES, axis=0))

    with ExitStack() as stack:
        for layer in parts(model):
            stack.enter_context(_noting(layer, note))
        stack.enter_context(untraced())
        model(keras.ops.convert_to_tensor(rows), training=True)
    return found


@contextmanager
def _noting(layer: Any, note: Any) -> Iterator[None]:
    """Let ``note`` see what the activation of a layer receives, if it has one."""
    if isinstance(layer, _ACTIVATIONS):
        name = "call"
    elif isinstance(layer, _WITH_ACTIVATION) and layer.activation is not keras.activations.linear:
        name = "activation"
    else:
        yield
        return
    function, own = getattr(layer, name), dict(vars(layer))

    def noted(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        note(inputs)
        return function(inputs, *args, **kwargs)

    # past Keras, which would track what is set
    vars(layer)[name] = noted
    try:
        yield
    finally:
        vars(layer).pop(name)
        if name in own:
            vars(layer)[name] = own[name]
