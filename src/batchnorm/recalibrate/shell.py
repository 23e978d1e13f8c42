"""Recalibrate a model from file to file, for the command line; in the processes of torchrun too."""

from pathlib import Path
from typing import Any

from batchnorm.datafiles import BATCH_SIZE, Share, cut, processes
from batchnorm.errors import OptionError
from batchnorm.models import adapt, check_ending, load, save
from batchnorm.recalibrate.recalibration import recalibrate

__all__ = ["run"]


def run(
    model: str, data: Any, out: Path, *, weights: Path | None = None, batch_size: int = BATCH_SIZE, **options: Any
) -> str:
    """Recalibrate a model, write it to a file, and return the result as text.

    Started by ``torchrun``, each process measures its share of the batches, and the first one writes.

    Args:
        model: a file, or ``package.module:factory``.
        data: what `datafiles.read` returns, or an array ``(N, ...)``.
        out: the file to write, whole or not at all.
        weights: tensors for the model of a factory.
        batch_size: samples of a batch, where the data is arrays.
        options: of `recalibrate`.

    Raises:
        BatchNormError: whatever `models.load`, `recalibrate` or `models.save` raise; then nothing was written.
    """
    if not out.parent.is_dir():
        raise OptionError(f"the result must go into a folder that is there, {out.parent} is not")
    batches = cut(data, batch_size)
    loaded = load(model, weights)
    check_ending(loaded, out)
    # what a factory makes is in training mode
    view = adapt(loaded.eval() if hasattr(loaded, "eval") else loaded)
    with processes() as (rank, ranks):
        found = recalibrate(view.model, Share(batches, rank, ranks), progress=rank == 0, **options)
    if rank > 0:
        return ""
    save(view.model, out, _example(batches))
    return f"{found}\nwritten to {out}"


def _example(batches: Any) -> Any:
    batch = next(iter(batches))
    return batch[0] if isinstance(batch, tuple | list) else batch
