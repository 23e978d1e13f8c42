"""What a monitor has seen, step by step: kept, and written to TensorBoard where a folder is given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import OptionError
from batchnorm.rooms import require

__all__ = ["History", "check_every"]


class History:
    """Numbers of layers and weights at steps of a training.

    Args:
        log_dir: folder of event files; ``None`` to write nothing.

    Attributes:
        records: a dict for each step: ``step``, ``layers`` and ``weights``, numbers by name.

    Raises:
        MissingDependencyError: the writer is not installed.
    """

    def __init__(self, log_dir: str | Path | None) -> None:
        self.records: list[dict[str, Any]] = []
        self.log_dir = log_dir
        # said before the training starts
        self._library = None if log_dir is None else require("tensorboardX", "monitor")
        self._writer: Any = None

    def add(
        self,
        step: int,
        layers: Mapping[str, Mapping[str, float | None]],
        histograms: Mapping[str, Mapping[str, np.ndarray | None]],
    ) -> None:
        """Keep the numbers of layers at a step; arrays are only written, as histograms."""
        self.records.append({"step": step, "layers": {name: dict(v) for name, v in layers.items()}, "weights": {}})
        self._write(step, layers)
        for name, arrays in histograms.items():
            for what, array in arrays.items():
                if self._library is not None and array is not None and array.size and np.isfinite(array).all():
                    self._open().add_histogram(f"{what}/{name}", array.ravel(), step)

    def add_weights(self, step: int, weights: Mapping[str, Mapping[str, float | None]]) -> None:
        """Keep the numbers of weights at a step."""
        if not self.records or self.records[-1]["step"] != step:
            self.records.append({"step": step, "layers": {}, "weights": {}})
        self.records[-1]["weights"] = {name: dict(v) for name, v in weights.items()}
        self._write(step, weights)

    def _write(self, step: int, groups: Mapping[str, Mapping[str, float | None]]) -> None:
        if self._library is None:
            return
        for name, numbers in groups.items():
            for what, number in numbers.items():
                if number is not None:
                    self._open().add_scalar(f"{what}/{name}", number, step)

    def _open(self) -> Any:
        assert self._library is not None  # noqa: S101
        if self._writer is None:
            self._writer = self._library.SummaryWriter(str(self.log_dir))
        return self._writer

    def close(self) -> None:
        """Write what is left; another step would open a further file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def check_every(every: Any) -> int:
    """Return a number of steps.

    Raises:
        OptionError: it is none.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise OptionError(f"every must be a whole number of steps, at least 1, got {every!r}")
    return every
