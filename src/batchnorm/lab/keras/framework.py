"""Keras, as a comparison asks for a framework."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras.internals import as_array, quietly, told, untraced
from batchnorm.lab.arms import Arm
from batchnorm.lab.data import Dataset
from batchnorm.lab.factories import digest_of
from batchnorm.lab.keras import deploying, training
from batchnorm.lab.keras.heads import are_probabilities, bare
from batchnorm.lab.keras.networks import NETWORKS, PREFIX, Network, build, factory_of
from batchnorm.lab.keras.watching import score
from batchnorm.lab.shipping import Deployed, Saved
from batchnorm.lab.tasks import Recipe, Row, Scores, Task
from batchnorm.summary import Summary, summary

__all__ = ["FRAMEWORK", "Keras"]

_TRAINING = ("jax", "tensorflow", "torch")


class Keras:
    """The `Framework` protocol: a network in training is a `Network`, one that is shipped is a ``keras.Model``."""

    def versions(self) -> dict[str, str]:
        """Return the versions of Keras and of its backend."""
        backend = keras.backend.backend()
        return {"keras": keras.__version__, "backend": f"{backend} {_version(backend)}"}

    def environment(self) -> dict[str, str]:
        """Return what gives processes the same backend, and TensorFlow one thread in each."""
        one = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        backend = keras.backend.backend()
        return {"KERAS_BACKEND": backend} | (one if backend == "tensorflow" else {})

    def source_of(self, model: str) -> str | None:
        """Return a digest of the file of a user's factory."""
        name = model.removeprefix(PREFIX)
        return None if name in NETWORKS else digest_of(factory_of(name))

    def check(self, model: str, data: Dataset, arm: Arm, x: np.ndarray) -> None:
        """Build the network of an arm and run it on rows."""
        if keras.backend.backend() not in _TRAINING:
            raise OptionError(
                f"Keras must run on a backend that trains, one of {', '.join(_TRAINING)}, got {keras.backend.backend()}: "
                "set KERAS_BACKEND"
            )
        rows = training.channels_last(x)
        with training.alone():
            network = build(model.removeprefix(PREFIX), rows.shape[1:], len(data.classes), arm, 0, rows)
            _check_output(network, rows, arm, len(data.classes), model)

    def alone(self) -> AbstractContextManager[None]:
        """Run on the CPU, with one thread where that can be said."""
        return training.alone()

    def train(self, task: Task, recipe: Recipe, data: Dataset) -> tuple[Network, Row]:
        """Train one network and return it with its row."""
        return training.train_network(task, recipe, data)

    def score(self, network: Any, x: np.ndarray, y: np.ndarray) -> Scores:
        """Return mean log-loss in nats and accuracy."""
        rows = training.channels_last(x)
        if isinstance(network, Network):
            return score(network.model, rows, y)
        with bare(network) as logits:
            return score(logits, rows, y)

    def deploy(self, network: Network, x_train: np.ndarray, x_check: np.ndarray) -> Deployed:
        """Recompute statistics, fold, verify."""
        return deploying.deploy(network, training.channels_last(x_train), training.channels_last(x_check))

    def save(self, deployed: Deployed, folder: Path, x: np.ndarray, about: dict[str, Any]) -> Saved:
        """Write ``model.keras``, which tells about itself, and ``model.onnx`` where the backend can."""
        return deploying.save(deployed, folder, training.channels_last(x))

    def summary(self, network: Network, x: np.ndarray) -> Summary:
        """Return layers and parameters."""
        with quietly():
            return summary(network.model, training.channels_last(x))


FRAMEWORK = Keras()


def _version(backend: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in (backend, f"{backend}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of an unknown version"


def _check_output(network: Network, x: np.ndarray, arm: Arm, classes: int, model: str) -> None:
    try:
        with untraced():
            outputs = network.model(keras.ops.convert_to_tensor(x), training=True)
            found = [as_array(outputs)] if hasattr(outputs, "shape") else None
    except Exception as error:
        raise OptionError(
            f"{model} with arm {arm.name!r} must run on rows of shape {tuple(x.shape[1:])}: {told(error)}"
        ) from error
    if found is None or found[0].shape != (len(x), classes):
        got = type(outputs).__name__ if found is None else found[0].shape
        raise OptionError(
            f"{model} must return one logit or probability for each class, {(len(x), classes)}, got {got}"
        )
    if network.put_back is None and are_probabilities(found[0]):
        raise OptionError(
            f"{model} must end in a softmax that can be seen, or return logits: its outputs are probabilities, but its last "
            "layer is no softmax and has none as its activation"
        )
