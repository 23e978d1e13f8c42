"""PyTorch, as a comparison asks for a framework."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.lab import deploy, factories, networks, train
from batchnorm.lab.arms import Arm
from batchnorm.lab.data import Dataset
from batchnorm.lab.shipping import Deployed, Saved
from batchnorm.lab.tasks import Recipe, Row, Scores, Task
from batchnorm.summary import Summary, summary

__all__ = ["FRAMEWORK", "PyTorch"]


class PyTorch:
    """The `Framework` protocol: a network is a ``torch.nn.Module``."""

    def versions(self) -> dict[str, str]:
        """Return the version of torch."""
        return {"torch": torch.__version__}

    def environment(self) -> dict[str, str]:
        """Return nothing: processes need to be told nothing."""
        return {}

    def source_of(self, model: str) -> str | None:
        """Return a digest of the file of a user's factory."""
        return None if model in networks.NETWORKS else factories.digest_of(networks.factory_of(model))

    def check(self, model: str, data: Dataset, arm: Arm, x: np.ndarray) -> None:
        """Build the network of an arm and run it on rows."""
        rows = torch.from_numpy(x)
        network = networks.build(model, data.shape, len(data.classes), arm, 0, rows)
        _check_output(network, rows, arm, len(data.classes), model)

    def alone(self) -> AbstractContextManager[None]:
        """Give each run one thread."""
        return train.one_thread()

    def train(self, task: Task, recipe: Recipe, data: Dataset) -> tuple[nn.Module, Row]:
        """Train one network and return it with its row."""
        return train.train_network(task, recipe, data)

    def score(self, network: nn.Module, x: np.ndarray, y: np.ndarray) -> Scores:
        """Return mean log-loss in nats and accuracy."""
        return train.score(network, x, y)

    def deploy(self, network: nn.Module, x_train: np.ndarray, x_check: np.ndarray) -> Deployed:
        """Recompute statistics, fold, verify."""
        return deploy.deploy(network, x_train, x_check)

    def save(self, deployed: Deployed, folder: Path, x: np.ndarray, about: dict[str, Any]) -> Saved:
        """Write ``model.safetensors`` and ``model.onnx``."""
        onnx = deploy.save(deployed, folder, x, about)
        return Saved(("model.safetensors", "model.onnx"), onnx)

    def summary(self, network: nn.Module, x: np.ndarray) -> Summary:
        """Return layers and parameters."""
        return summary(network, torch.from_numpy(x))


FRAMEWORK = PyTorch()


def _check_output(network: nn.Module, x: torch.Tensor, arm: Arm, classes: int, model: str) -> None:
    try:
        with torch.no_grad():
            logits = network(x)
    except Exception as error:
        raise OptionError(
            f"{model} with arm {arm.name!r} must run on rows of shape {tuple(x.shape[1:])}: {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(x), classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise OptionError(f"{model} must return one logit for each class, {(len(x), classes)}, got {got}")
