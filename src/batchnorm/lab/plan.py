"""The plan of a comparison: everything that decides its numbers."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import DataError, OptionError
from batchnorm.lab.arms import ARMS, Arm
from batchnorm.lab.data import ARRAYS, Dataset
from batchnorm.lab.frameworks import Framework, framework_of
from batchnorm.lab.tasks import Recipe, Task
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
    def framework(self) -> Framework:
        """What builds and trains the networks."""
        return framework_of(self.recipe.model)

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
            self.framework.check(self.recipe.model, self.data, arm, split.x_train[: max(2, size)])

    def identity(self) -> dict[str, Any]:
        """What rows must share to be compared; arms, learning rates and seeds may be added later."""
        return {
            "data": self.data.fingerprint,
            "model": self.recipe.model,
            "model source": self.framework.source_of(self.recipe.model),
            "steps": self.recipe.steps,
            "batch_size": self.recipe.batch_size,
            **self.framework.versions(),
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
