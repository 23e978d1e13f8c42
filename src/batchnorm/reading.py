"""Run a model through its data, in every process of a job: what the verbs that measure have in common."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from batchnorm.errors import BatchNormError, DataError, OptionError
from batchnorm.models import gather
from batchnorm.progress import Progress
from batchnorm.protocol import Measure, Measured, Pair, Statistics
from batchnorm.source import Source

__all__ = ["check_reading", "gathered", "of_two", "through"]


def through(
    measure: Measure,
    source: Source,
    use: Mapping[Statistics, Pair] | None,
    *,
    doing: str,
    samples: int | None,
    shown: bool,
) -> Iterator[Measured]:
    """Measure the batches of this process one after the other, until so many samples were read.

    Raises:
        DataError: a batch that fails.
    """
    seen = 0
    with Progress(doing, "batches", source.total, shown=shown) as progress:
        for batch in source:
            measured = measure(batch, use)
            seen += measured.samples
            progress.advance()
            yield measured
            if samples is not None and seen >= samples:
                break


def gathered(doing: str, statistics: list[Statistics], found: dict[str, Any] | BatchNormError) -> list[dict[str, Any]]:
    """Return what all processes of a distributed job have ``found``, in the order of their ranks; alone, one entry.

    Args:
        doing: what needs all processes, for a sentence.
        statistics: of the model of this process.
        found: what can be pickled, with the number of ``"batches"``; or why this process has failed.

    Raises:
        BatchNormError: this process has failed, or another one.
        DataError: no process had a batch.
        OptionError: the models of two processes differ.
    """
    layers = [(one.name, None if one.mean is None else len(one.mean)) for one in statistics]
    parts = gather((layers, str(found) if isinstance(found, BatchNormError) else found))
    if isinstance(found, BatchNormError):
        raise found
    for rank, (theirs, part) in enumerate(parts):
        if isinstance(part, str):
            raise DataError(f"{doing} needs all processes, rank {rank} failed: {part}")
        if theirs != layers:
            raise OptionError(
                f"all processes must hold the same model, that of rank {rank} has other layers: {_some(theirs)}"
            )
    if sum(part["batches"] for _, part in parts) == 0:
        raise DataError("the data must hold at least one batch, it is empty: is the iterator used up?")
    return [part for _, part in parts]


def _some(layers: list[Any]) -> str:
    return ", ".join(f"{name} ({size})" for name, size in layers[:5]) + (", ..." if len(layers) > 5 else "")


def of_two(forward: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return a user's function as one of the model and the batch, whether it asks for the model or not."""
    if forward is None:
        return None
    try:
        inspect.signature(forward).bind(None, None)
    except TypeError:
        return lambda _, batch: forward(batch)
    except ValueError:
        # built in, without a signature
        pass
    return forward


def check_reading(forward: Any, batches: Any, samples: Any) -> None:
    """Check what a user says about the data.

    Raises:
        OptionError: it can't be.
    """
    if forward is not None and not callable(forward):
        raise OptionError(f"forward must be a function of the model and a batch, got {forward!r}")
    for name, limit in (("batches", batches), ("samples", samples)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | np.integer) or limit < 1):
            raise OptionError(f"{name} must be None or a whole number of at least 1, got {limit!r}")
