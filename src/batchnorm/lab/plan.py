"""The plan of a comparison: everything that decides its numbers."""

import hashlib
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.errors import DataError, OptionError
from batchnorm.lab.arms import ARMS, Arm
from batchnorm.lab.data import ARRAYS, Dataset
from batchnorm.lab.networks import NETWORKS, build, factory_of
from batchnorm.lab.train import Recipe, Task
from batchnorm.lab.verdicts import Margins

__all__ = ["Plan", "at_least", "rates_of", "source_options"]


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a comparison."""

    data: Dataset
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    seeds: range
    recipe: Recipe
    margins: Margins
    threshold: float | None
    source_options: tuple[str, ...]

    @property
    def tasks(self) -> list[Task]:
        """All runs, seeds outermost, so that an interrupted comparison has whole pairs."""
        return [Task(arm, rate, seed) for seed, rate, arm in product(self.seeds, self.rates, self.arms)]

    @property
    def chance(self) -> float:
        """The accuracy of always naming the most frequent class."""
        return float(np.bincount(self.data.y).max() / len(self.data.y))

    def check(self) -> None:
        """Refuse what every run would fail on, before the first one starts."""
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise OptionError(f"threshold must be an accuracy between 0 and 1, got {self.threshold}")
        split = self.data.split(0)
        for arm in self.arms:
            size = arm.batch_size or self.recipe.batch_size
            if len(split.y_train) < size:
                raise DataError(
                    f"{self.data.source}: a batch of arm {arm.name!r} needs {size} training rows, there are "
                    f"{len(split.y_train)} of {len(self.data.y)} rows: choose a smaller --batch-size"
                )
            x = torch.from_numpy(split.x_train[: max(2, size)])
            network = build(self.recipe.model, self.data.shape, len(self.data.classes), arm, 0, x)
            _check_output(network, x, arm, len(self.data.classes), self.recipe.model)

    def identity(self) -> dict[str, Any]:
        """What rows must share to be compared; arms, learning rates and seeds may be added later."""
        return {
            "data": self.data.fingerprint,
            "model": self.recipe.model,
            "model source": _source_of(self.recipe.model),
            "steps": self.recipe.steps,
            "batch_size": self.recipe.batch_size,
            "torch": torch.__version__,
        }

    def command(self, folder: Path) -> str:
        """Return the command line that makes this comparison again; a call in Python where the data came as arrays."""
        arms = [arm.name if ARMS.get(arm.name) == arm else str(arm) for arm in self.arms]
        recipe = self.recipe
        if self.data.source == ARRAYS:
            options = (
                f"model={recipe.model!r}, arms={arms}, learning_rates={list(self.rates)}, seeds={len(self.seeds)}, "
            )
            options += f"steps={recipe.steps}, batch_size={recipe.batch_size}, out={str(folder)!r}"
            return f"bn.compare((x, y), {options}, margins={self.margins}, threshold={self.threshold})"
        words = ["batchnorm", "compare", self.data.source, *self.source_options]
        words += ["--out", str(folder), "--model", recipe.model]
        for arm in arms:
            words += ["--arm", arm]
        words += ["--learning-rates", ",".join(map(str, self.rates)), "--seeds", str(len(self.seeds))]
        words += ["--steps", str(recipe.steps), "--batch-size", str(recipe.batch_size)]
        words += [] if self.threshold is None else ["--threshold", str(self.threshold)]
        words += [] if self.margins == Margins() else ["--margins", f"{self.margins.log_loss},{self.margins.accuracy}"]
        return shlex.join(words)


def source_options(target: str | None, drop: Sequence[str], image_size: tuple[int, int] | None) -> tuple[str, ...]:
    """Return the words of a command line that read the same data."""
    words = [] if target is None else ["--target", target]
    words += ["--drop", ",".join(drop)] if drop else []
    words += [] if image_size is None else ["--image-size", f"{image_size[0]}x{image_size[1]}"]
    return tuple(words)


def rates_of(given: Sequence[float]) -> tuple[float, ...]:
    """Return a grid of learning rates, sorted and each once."""
    rates = tuple(sorted({float(rate) for rate in given}))
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise OptionError(f"learning rates must be positive numbers, got {list(given)}")
    return rates


def at_least(least: int, name: str, value: int) -> int:
    """Return ``value``, which must not be below ``least``."""
    if value < least:
        raise OptionError(f"{name} must be at least {least}, got {value}")
    return value


def _check_output(network: torch.nn.Module, x: torch.Tensor, arm: Arm, classes: int, model: str) -> None:
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


def _source_of(model: str) -> str | None:
    """Return a digest of the file that a user's factory stands in: rows of an older version are not mixed in."""
    if model in NETWORKS:
        return None
    file = getattr(sys.modules.get(factory_of(model).__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
