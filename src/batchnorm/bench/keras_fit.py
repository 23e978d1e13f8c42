"""What ``fit`` costs with our layer beside Keras's own: epochs in turns, the same network on real images."""

import time
from statistics import median
from typing import Any

import numpy as np

from batchnorm.tables import table

__all__ = ["measure", "shown"]

ROUNDS, QUICK_ROUNDS, WARM = 15, 3, 2
BATCH = 32
WHO = ("Keras", "ours", "Keras again")


def measure(quick: bool) -> dict[str, Any]:
    """Return seconds of each epoch, on the clock and of the processor."""
    import keras

    from batchnorm.keras import BatchNormalization

    if keras.backend.backend() == "torch":
        import torch

        # more threads cost such small layers more than they give
        torch.set_num_threads(1)
    x, y = _images()
    peer = keras.layers.BatchNormalization
    models = {who: _network(BatchNormalization if who == "ours" else peer) for who in WHO}
    clock: dict[str, list[float]] = {who: [] for who in WHO}
    processor: dict[str, list[float]] = {who: [] for who in WHO}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for number in range(rounds + WARM):
        # who comes first has not always the same neighbour
        for who in WHO[number % 3 :] + WHO[: number % 3]:
            start = time.perf_counter(), time.process_time()
            models[who].fit(x, y, batch_size=BATCH, verbose=0)
            if number >= WARM:
                clock[who].append(time.perf_counter() - start[0])
                processor[who].append(time.process_time() - start[1])
    accuracy = {who: float(model.evaluate(x, y, verbose=0)[1]) for who, model in models.items()}
    return {"samples": len(x), "clock": clock, "processor": processor, "accuracy": accuracy}


def _images() -> tuple[np.ndarray, np.ndarray]:
    """Return scanned digits, scaled from 8×8 to 28×28."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    large = np.kron(digits.images, np.ones((4, 4)))[:, 2:-2, 2:-2]
    return (large / 16).astype("float32"), digits.target


def _network(norm: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    dense = [part for width in (300, 100) for part in (norm(), layers.Dense(width, activation="relu"))]
    last = [norm(), layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.Input((28, 28)), layers.Flatten(), *dense, *last])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def shown(found: dict[str, Any]) -> str:
    """Return ratios to Keras's layer as a table."""
    rows = []
    for one in found.values():
        for who in WHO[1:]:
            ratios = [_ratio(one[kind], who) for kind in ("clock", "processor")]
            epoch = f"{1e3 * median(one['clock'][who]):.0f} ms"
            rows.append((one["ran"], who, epoch, *ratios, f"{100 * one['accuracy'][who]:.1f} %"))
    head = ("Backend", "Layer", "Epoch", "Ratio to Keras's, clock", "Processor time", "Accuracy")
    rounds = len(next(iter(found.values()))["clock"]["ours"])
    note = f"Median of {rounds} interleaved epochs, and half of them lie between; 'Keras again' is the noise."
    return f"{table(head, rows)}\n{note}"


def _ratio(seconds: dict[str, list[float]], who: str) -> str:
    ratios = [own / other for own, other in zip(seconds[who], seconds["Keras"], strict=True)]
    low, high = np.quantile(ratios, [0.25, 0.75])
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"
