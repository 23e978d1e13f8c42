"""Train one network by Keras's own ``fit``: the same task gives the same numbers in every process."""

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import keras
import numpy as np

from batchnorm.errors import BatchNormWarning, NonFiniteError
from batchnorm.keras.internals import quietly
from batchnorm.lab.arms import Arm
from batchnorm.lab.data import Dataset, Split
from batchnorm.lab.factories import digest_of
from batchnorm.lab.keras.networks import PREFIX, Network, build, factory_of
from batchnorm.lab.keras.watching import Watch, score
from batchnorm.lab.tasks import Recipe, Row, Task, batches, row_of

__all__ = ["alone", "channels_last", "threads", "train_network"]


def channels_last(x: np.ndarray) -> np.ndarray:
    """Return images ``(N, C, H, W)`` as ``(N, H, W, C)``, and anything else as it is."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x


def train_network(task: Task, recipe: Recipe, data: Dataset) -> tuple[Network, Row]:
    """Train one network and return it with its row.

    Networks of one arm are built anew for each run, and trained in one compiled model, which takes over their variables: JAX
    and TensorFlow would compile for longer than they train.
    """
    started = time.perf_counter()
    split = _split(data, task.seed)
    kind = recipe.model.removeprefix(PREFIX), split.x_train.shape[1:], len(data.classes), task.arm
    fresh = build(*kind, task.seed, split.x_train)
    network = _compiled(threading.get_ident(), digest_of(factory_of(kind[0])), *kind)
    network.fill(fresh)
    watch = Watch(split, recipe.steps)
    try:
        with _expecting_divergence(), quietly():
            diverged = not _fit(network.model, task, recipe, split, watch)
    except BaseException:
        # it was stopped in the middle of a step, which may hold its variables
        _compiled.cache_clear()
        raise
    row = row_of(
        task,
        diverged=diverged or watch.diverged,
        steps=watch.step,
        val=score(network.model, split.x_val, split.y_val),
        test=score(network.model, split.x_test, split.y_test),
        curve=watch.curve,
        units=watch.units(),
        seconds=time.perf_counter() - started,
        threads=threads(),
    )
    return network, row


def _fit(model: Any, task: Task, recipe: Recipe, split: Split, watch: Watch) -> bool:
    """Train by stochastic gradient descent; False where a layer refuses parameters that are no longer finite."""
    model.optimizer.learning_rate = task.learning_rate
    model.optimizer.iterations.assign(0)
    model.stop_training = False
    stream = batches(len(split.y_train), task.arm.batch_size or recipe.batch_size, task.seed)
    rows = ((split.x_train[i], split.y_train[i]) for i in stream)
    try:
        model.fit(rows, steps_per_epoch=recipe.steps, epochs=1, shuffle=False, verbose=0, callbacks=[watch])
    except NonFiniteError:
        return False
    return True


@lru_cache(maxsize=16)
def _compiled(
    thread: int,
    digest: str | None,
    model: str,
    shape: tuple[int, ...],
    classes: int,
    arm: Arm,
) -> Network:
    network = build(model, shape, classes, arm, 0, np.zeros((2, *shape), np.float32))
    network.model.compile(
        optimizer=keras.optimizers.SGD(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # without it JAX would run step by step, and TensorFlow compiles for longer with it
        jit_compile=keras.backend.backend() == "jax",
    )
    return network


def _split(data: Dataset, seed: int) -> Split:
    split = data.split(seed)
    return Split(
        channels_last(split.x_train),
        split.y_train,
        channels_last(split.x_val),
        split.y_val,
        channels_last(split.x_test),
        split.y_test,
    )


@contextmanager
def alone() -> Iterator[None]:
    """Run on the CPU; with one thread on torch, the one backend where that can be said at any time and taken back."""
    # on torch another name of the same device would mean a copy
    with keras.device("cpu" if keras.backend.backend() == "torch" else "cpu:0"):
        if keras.backend.backend() != "torch":
            yield
            return
        from batchnorm.lab.train import one_thread

        with one_thread():
            yield


def threads() -> int:
    """Return how many threads a run may compute with."""
    if keras.backend.backend() == "torch":
        import torch

        return int(torch.get_num_threads())
    return os.cpu_count() or 1


@contextmanager
def _expecting_divergence() -> Iterator[None]:
    """Say nothing of batches that are not finite: the row says that the run diverged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        yield
