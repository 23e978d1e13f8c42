"""Run a Keras model in evaluation, and see what reaches its batch normalization layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.errors import BatchNormError, DataError, OptionError
from batchnorm.keras.backends import in_own_words
from batchnorm.keras.internals import as_array, graph_of, quietly, tensorflow_data, told, untraced
from batchnorm.keras.linear import linear_before
from batchnorm.keras.naming import names_of, norms_of, numbers_of
from batchnorm.keras.normalization import BatchNormalization
from batchnorm.keras.weighing import weights_of
from batchnorm.moments import Moments
from batchnorm.protocol import Measure, Measured, Pair, Statistics, note, piece

__all__ = ["batches_of", "entering", "measuring", "stored", "write"]

# numbers that are looked at together, in float64
BLOCK = 2**20


def stored(model: Any) -> list[Statistics]:
    """List the moving statistics of every ``BatchNormalization`` layer, each once.

    Raises:
        OptionError: a layer that is not built.
    """
    return [_statistics(layer, name) for layer, name in norms_of(model).items()]


def _statistics(layer: Any, name: str) -> Statistics:
    mean, variance, *_ = numbers_of(layer)
    fixed = "" if layer.trainable else "it is frozen: set trainable = True first if it shall move"
    return Statistics(
        name, mean, variance, float(layer.epsilon), unbiased=getattr(layer, "unbiased", False), fixed=fixed, key=layer
    )


def batches_of(data: Any) -> Any:
    """Return what yields the batches of a ``PyDataset``, which is no iterable, or of a ``tf.data.Dataset``; else ``data``."""
    if isinstance(data, keras.utils.PyDataset):
        return _Indexed(data)
    if tensorflow_data(data) is not None and keras.backend.backend() != "tensorflow":
        return _Arrays(data)
    return data


def entering(model: Any, batch: Any) -> Any:
    """Return what a batch of a data set calls a model with: Keras's own order is inputs, targets, weights."""
    if isinstance(batch, tuple):
        return batch[0] if batch else batch
    graph = graph_of(model)
    several = 0 if graph is None else len(graph.inputs)
    # loaders of torch make lists; a model of several inputs may be given them as one
    return batch[0] if isinstance(batch, list) and batch and len(batch) != several else batch


class _Indexed:
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


class _Arrays:
    """A ``tf.data.Dataset`` whose batches are NumPy arrays, which every backend takes."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data.as_numpy_iterator())


def write(statistics: Mapping[Statistics, Pair]) -> None:
    """Assign new moving statistics, all or none.

    Raises:
        OptionError: a dtype that can't hold them.
    """
    pairs = [
        (one.name, variable, keras.ops.convert_to_tensor(new, dtype=variable.dtype))
        for one, pair in statistics.items()
        for variable, new in zip((one.key.moving_mean, one.key.moving_variance), pair, strict=True)
    ]
    for name, variable, new in pairs:
        if not np.isfinite(as_array(new)).all():
            raise OptionError(
                f"layer {name!r} stores its statistics in {variable.dtype}, which can't hold the new ones"
            )
    for _, variable, new in pairs:
        variable.assign(new)


@contextmanager
def measuring(
    model: Any, statistics: list[Statistics], forward: Callable[..., Any] | None, device: Any, *, every: bool = False
) -> Iterator[Measure]:
    """Yield what runs a batch; meanwhile the moving layers of the model are watched, or with ``every`` all of them.

    Raises:
        OptionError: a ``device``.
    """
    if device is not None:
        raise OptionError("Keras puts batches where it computes: leave device out, or use keras.device")
    watch = _Watch()
    names = names_of(model) if every else {}
    linear = {one: names[before] for one in statistics if (before := linear_before(one.key)) in names}

    def measure(batch: Any, use: Mapping[Statistics, Pair] | None) -> Measured:
        watch.start(use, first=every and not watch.found)
        x = entering(model, batch) if forward is None else batch
        try:
            if forward is None:
                model(x, training=False)
            else:
                forward(model, x)
        except BatchNormError:
            raise
        except Exception as error:
            raise DataError(f"the model must take the batches of the data, but it failed: {told(error)}") from error
        sizes = [array.shape[0] for array in keras.tree.flatten(x) if len(getattr(array, "shape", ())) > 0]
        reached = {one: name for one, name in linear.items() if watch.first and one in watch.found}
        return Measured(int(sizes[0]) if sizes else 1, watch.found, watch.inputs, reached)

    with ExitStack() as stack:
        stack.enter_context(untraced())
        for one in statistics:
            if every or not one.fixed:
                stack.enter_context(watch.layer(one))
        yield measure


class _Watch:
    """Stands before the calls of layers: measures their inputs, and lets them use other statistics."""

    def __init__(self) -> None:
        self.start(None, first=False)

    def start(self, use: Mapping[Statistics, Pair] | None, *, first: bool) -> None:
        """Forget the last batch; keep pieces of the first one."""
        self.use, self.first = use, first
        self.found: dict[Statistics, list[Moments]] = {}
        self.inputs: dict[Statistics, np.ndarray] = {}

    @contextmanager
    def layer(self, one: Statistics) -> Iterator[None]:
        layer = one.key
        call, kept = layer.call, dict(vars(layer))

        def watched(inputs: Any, training: Any = None, mask: Any = None, sample_weight: Any = None) -> Any:
            with in_own_words():
                pair = self._note(one, inputs, *_weighing(layer, inputs, mask, sample_weight))
            variables = (layer.moving_mean, layer.moving_variance)
            mapping = [
                (v, keras.ops.convert_to_tensor(new, dtype=v.dtype)) for v, new in zip(variables, pair, strict=True)
            ]
            with quietly(), keras.StatelessScope(state_mapping=mapping):
                return call(inputs, training=False, mask=mask)

        # past Keras, which would track what is set
        vars(layer)["call"] = watched
        try:
            yield
        finally:
            vars(layer).pop("call")
            if "call" in kept:
                vars(layer)["call"] = kept["call"]

    def _note(self, one: Statistics, inputs: Any, weight: np.ndarray | None, places: int) -> Pair:
        x = as_array(inputs)
        if self.first and one not in self.found and weight is None and x.size:
            part = np.moveaxis(x, one.key.axis, 1)
            self.inputs[one] = np.array(part[piece(part.shape)], np.promote_types(x.dtype, np.float32))
        moments = _moments(x, one.key.axis, weight)
        note(self.found, one, moments)
        # a single value has no variance
        own = one.pair if one.fixed or places < 2 else (moments.mean, moments.variance)
        return own if self.use is None else self.use.get(one, one.pair)


def _weighing(layer: Any, inputs: Any, mask: Any, sample_weight: Any) -> tuple[np.ndarray | None, int]:
    """Return mask times weights of a call, as they meet the inputs, and how many values of a channel count."""
    shape, axis = tuple(inputs.shape), layer.axis % len(inputs.shape)
    if isinstance(layer, BatchNormalization):
        mask = getattr(inputs, "_keras_mask", None) if mask is None else mask
        weight = weights_of(inputs, axis, mask, sample_weight)
    else:
        weight = None if mask is None else keras.ops.expand_dims(keras.ops.cast(mask, "bool"), -1)
    if weight is None:
        return None, int(np.prod(shape)) // max(1, shape[axis])
    array = as_array(weight).astype(np.float64)
    every = np.broadcast_to(array, tuple(array.shape[i] if i == axis else n for i, n in enumerate(shape)))
    places = (every != 0).sum(tuple(i for i in range(len(shape)) if i != axis))
    return every, int(places.max(initial=0))


def _moments(x: np.ndarray, axis: int, weight: np.ndarray | None) -> Moments:
    """Measure the channels on ``axis`` in float64, a few samples at a time."""
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    step = max(1, BLOCK // max(1, x[:1].size))
    total = Moments(0, np.zeros(x.shape[axis]), np.zeros(x.shape[axis]))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        block = Moments.of(x[part].astype(np.float64), axes, None if weight is None else weight[part])
        total = total.merge(Moments(float(np.max(block.count)), block.mean, block.m2))
    return total
