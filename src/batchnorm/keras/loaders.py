"""The sizes of the batches of a loader that a Keras model is trained with."""

from typing import Any

import keras

from batchnorm.errors import OptionError
from batchnorm.keras.internals import tensorflow_data, told
from batchnorm.keras.measuring import entering
from batchnorm.states import BatchSizes

__all__ = ["batch_sizes"]


def batch_sizes(model: Any, loader: Any) -> BatchSizes:
    """Return the sizes of batches; of a loader that does not tell them the first and the last batch are read.

    Args:
        model: takes the batches.
        loader: ``(samples, batch_size)`` as ``fit`` cuts arrays, a ``PyDataset``, a ``tf.data.Dataset``, a ``DataLoader`` of
            torch, a sequence of batches, or what can be iterated over again and again.

    Raises:
        OptionError: anything else, or a loader that gives no batch.
    """
    if isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(n, int) for n in loader):
        return _cut(*loader, drop_last=False)
    if all(hasattr(loader, name) for name in ("batch_size", "dataset", "drop_last")):
        return _of_torch(loader)
    if hasattr(loader, "shape") or isinstance(loader, str | bytes | dict) or hasattr(loader, "__next__"):
        raise _unknown(loader)
    try:
        return _looked_at(model, loader) if tensorflow_data(loader) is None else _of_tensorflow(model, loader)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"the loader must give its batches, but it failed: {told(error)}") from error


def _cut(samples: int, batch_size: int, *, drop_last: bool) -> BatchSizes:
    """Return the sizes of the batches that so many samples make."""
    least = batch_size if drop_last else 1
    if batch_size < 1 or samples < least:
        raise OptionError(f"a loader must give at least one batch, got {samples} samples in batches of {batch_size}")
    rest = 0 if drop_last else samples % batch_size
    return BatchSizes(
        min(samples, batch_size), rest or min(samples, batch_size), samples - drop_last * (samples % batch_size)
    )


def _of_torch(loader: Any) -> BatchSizes:
    size = loader.batch_size if loader.batch_size is not None else getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise OptionError("a DataLoader must tell its batch_size: give (samples, batch_size) for one that does not")
    try:
        samples = len(loader.sampler)
    except (AttributeError, TypeError):
        # a stream, whose end nobody knows
        return BatchSizes(size, size if loader.drop_last else None)
    return _cut(samples, size, drop_last=bool(loader.drop_last))


def _of_tensorflow(model: Any, data: Any) -> BatchSizes:
    """Ask a ``tf.data.Dataset``; where it does not tell, read its first batch, and its last where that can be read alone."""
    count = int(data.cardinality())
    if count == 0:
        raise OptionError("a loader must give at least one batch, it has a length of 0")
    leaves = keras.tree.flatten(entering(model, data.element_spec))
    size = next((leaf.shape[0] for leaf in leaves if leaf.shape.rank), None)
    if size is not None:
        return BatchSizes(size, size, size * count if count > 0 else None)
    first = next((_size(model, batch) for batch in data), None)
    if first is None:
        raise OptionError("a loader must give at least one batch, it gave none")
    last = None if count < 0 else _last(model, data, count)
    return BatchSizes(first, last, None if last is None else (count - 1) * first + last)


def _last(model: Any, data: Any, count: int) -> int | None:
    known: Any = tensorflow_data(data)
    try:
        return _size(model, known.experimental.at(data, count - 1))
    except Exception:
        # one that is read from its beginning only
        return None


def _looked_at(model: Any, loader: Any) -> BatchSizes:
    """Read the first batch, and the last where there is a way to it."""
    indexed = hasattr(loader, "__getitem__") and hasattr(loader, "__len__")
    count = loader.num_batches if isinstance(loader, keras.utils.PyDataset) else len(loader) if indexed else None
    if count == 0:
        raise OptionError("a loader must give at least one batch, it has a length of 0")
    if indexed or isinstance(loader, keras.utils.PyDataset):
        first = _size(model, loader[0])
        if count is None:
            return BatchSizes(first)
        last = _size(model, loader[count - 1])
        return BatchSizes(first, last, (count - 1) * first + last)
    if not hasattr(loader, "__iter__"):
        raise _unknown(loader)
    for batch in loader:
        return BatchSizes(_size(model, batch))
    raise OptionError("a loader must give at least one batch, it gave none")


def _size(model: Any, batch: Any) -> int:
    leaves = keras.tree.flatten(entering(model, batch))
    sizes = [int(leaf.shape[0]) for leaf in leaves if len(getattr(leaf, "shape", ())) > 0]
    if not sizes:
        raise OptionError(f"a loader must give batches of arrays, got a {type(batch).__name__}")
    return sizes[0]


def _unknown(loader: Any) -> OptionError:
    return OptionError(
        "a loader must tell the sizes of its batches: give (samples, batch_size), a PyDataset, a tf.data.Dataset, a DataLoader "
        f"or a list of batches, got a {type(loader).__name__}"
    )
