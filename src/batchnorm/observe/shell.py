"""Observe a model from its file, for the command line; in the processes of torchrun too."""

import json
from pathlib import Path
from typing import Any

from batchnorm.datafiles import BATCH_SIZE, Share, cut, processes
from batchnorm.models import adapt, load
from batchnorm.observe.observing import observe

__all__ = ["run"]


def run(
    model: str,
    data: Any,
    *,
    weights: Path | None = None,
    batch_size: int = BATCH_SIZE,
    form: str = "text",
    **options: Any,
) -> str:
    """Observe a model and return the result as text or JSON.

    Started by ``torchrun``, each process reads its share of the batches, and the first one tells.

    Args:
        model: a file, or ``package.module:factory``.
        data: what `datafiles.read` returns, or an array ``(N, ...)``.
        weights: tensors for the model of a factory.
        batch_size: samples of a batch, where the data is arrays.
        form: ``"text"`` or ``"json"``.
        options: of `observe`.

    Raises:
        BatchNormError: whatever `models.load` or `observe` raise.
    """
    batches = cut(data, batch_size)
    view = adapt(load(model, weights))
    with processes() as (rank, ranks):
        found = observe(view.model, Share(batches, rank, ranks), progress=rank == 0, **options)
    if rank > 0:
        return ""
    return json.dumps(found.to_dict(), indent=1) if form == "json" else str(found)
