"""How exact the variance and the output of a float32 batch are, far from zero: Keras's layer, ours, two passes in float32."""

from statistics import median
from typing import Any

import numpy as np

from batchnorm.tables import table

__all__ = ["measure", "shown"]

MEANS = (1e3, 1e4, 1e5)
SHAPES = {"(4096, 16)": (4096, 16), "(32, 14, 14, 16)": (32, 14, 14, 16)}
SEEDS, EPSILON = 5, 1e-3
WHO = ("Keras", "ours", "two-pass")


def measure(quick: bool) -> dict[str, Any]:
    """Return the largest relative error of the variance, and error of the output, over the channels of each batch."""
    import keras

    from batchnorm.keras import BatchNormalization

    layers = {"Keras": keras.layers.BatchNormalization, "ours": BatchNormalization}
    rows = []
    for name, shape in SHAPES.items():
        for mean in MEANS:
            runs = []
            for seed in range(1 if quick else SEEDS):
                x = (np.random.default_rng(seed).normal(size=shape) + mean).astype("float32")
                found = {who: _by_layer(cls, x) for who, cls in layers.items()}
                runs.append({who: _errors(x, *pair) for who, pair in {**found, "two-pass": _two_pass(x)}.items()})
            rows.append({"shape": name, "mean": mean, "runs": runs})
    return {"rows": rows}


def _by_layer(cls: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import keras

    layer = cls(momentum=0.0, epsilon=EPSILON)
    y = layer(x, training=True)
    return _array(layer.moving_variance.value), _array(keras.ops.stop_gradient(y))


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def _two_pass(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Do it as plainly as it can be said, with the sums of this backend."""
    from keras import ops

    axes, given = tuple(range(x.ndim - 1)), ops.convert_to_tensor(x)
    d = given - ops.mean(given, axes)
    variance = ops.mean(d * d, axes)
    return _array(variance), _array(d * ops.rsqrt(variance + EPSILON))


def _errors(x: np.ndarray, variance: np.ndarray, y: np.ndarray) -> dict[str, float]:
    axes, wide = tuple(range(x.ndim - 1)), x.astype(np.float64)
    exact = wide.var(axes)
    expected = (wide - wide.mean(axes)) / np.sqrt(exact + EPSILON)
    return {
        "variance": float(np.max(np.abs(variance.astype(np.float64) - exact) / exact)),
        "output": float(np.max(np.abs(np.nan_to_num(y.astype(np.float64), nan=np.inf) - expected))),
    }


def shown(found: dict[str, Any]) -> str:
    """Return medians over the seeds as a table."""
    rows = []
    for one in found.values():
        for row in one["rows"]:
            for what in ("variance", "output"):
                errors = [f"{median(run[who][what] for run in row['runs']):.0e}" for who in WHO]
                rows.append((one["ran"], row["shape"], f"{row['mean']:.0e}", what, *errors))
    head = ("Backend", "Batch", "Mean / std", "Error of", "Keras's layer", "Ours", "Two passes in float32")
    seeds = len(next(iter(found.values()))["rows"][0]["runs"])
    return f"{table(head, rows)}\nLargest over channels (variance: relative), median of {seeds} batches."
