"""What a comparison asks of a framework, and which framework a model is of. Only that one is loaded."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from batchnorm.errors import OptionError
from batchnorm.lab.arms import Arm
from batchnorm.lab.data import Dataset
from batchnorm.lab.shipping import Deployed, Saved
from batchnorm.lab.tasks import Recipe, Row, Scores, Task
from batchnorm.models import choose_backend
from batchnorm.rooms import require
from batchnorm.summary import Summary

__all__ = ["KERAS", "Framework", "framework_of"]

KERAS = "keras:"
"""What the names of models of Keras begin with."""


class Framework(Protocol):
    """Builds, trains and ships networks. Rows of data come as `Dataset` has them; what a network is, is its own affair."""

    def versions(self) -> dict[str, str]:
        """Return what rows must share to be compared, by name."""

    def environment(self) -> dict[str, str]:
        """Return variables that processes need that train."""

    def source_of(self, model: str) -> str | None:
        """Return a digest of the file of a user's factory; ``None`` for a named network."""

    def check(self, model: str, data: Dataset, arm: Arm, x: np.ndarray) -> None:
        """Build the network of an arm and run it on rows.

        Raises:
            OptionError: an unknown model, a factory that fails, or outputs of another shape.
        """

    def alone(self) -> AbstractContextManager[None]:
        """Give each run one thread where that can be said: parallel runs share the cores without fighting for them."""

    def train(self, task: Task, recipe: Recipe, data: Dataset) -> tuple[Any, Row]:
        """Train one network and return it with its row."""

    def score(self, network: Any, x: np.ndarray, y: np.ndarray) -> Scores:
        """Return mean log-loss in nats and accuracy, in evaluation."""

    def deploy(self, network: Any, x_train: np.ndarray, x_check: np.ndarray) -> Deployed:
        """Recompute statistics over training rows, fold, and verify; the network is left as it was."""

    def save(self, deployed: Deployed, folder: Path, x: np.ndarray, about: dict[str, Any]) -> Saved:
        """Write what can be loaded again, all or nothing."""

    def summary(self, network: Any, x: np.ndarray) -> Summary:
        """Return layers and parameters."""


def framework_of(model: str) -> Framework:
    """Return the framework of a model by its name.

    Raises:
        MissingDependencyError: it is not installed.
        OptionError: Keras has a backend that does not exist, or can't train.
    """
    if not model.startswith(KERAS):
        return require("batchnorm.lab.pytorch", "lab").FRAMEWORK  # type: ignore[no-any-return]
    choose_backend()
    try:
        room = require("batchnorm.lab.keras.framework", "keras")
    except ValueError as error:
        raise OptionError(f"Keras must have a backend, set by KERAS_BACKEND, but it says: {error}") from error
    return room.FRAMEWORK  # type: ignore[no-any-return]
