"""The inputs of a functional Keras model: those of an example, checked, or random ones."""

from typing import Any

import keras
import numpy as np

from batchnorm.errors import OptionError
from batchnorm.keras.internals import as_array

__all__ = ["given", "packed", "random_like", "ready_made"]

BATCH, PLACES = 2, 32
"""Sizes of an example that is made up where the model leaves them open."""


def given(functional: Any, example: Any) -> list[np.ndarray]:
    """Return the arrays of an example in the order of the model's inputs.

    Args:
        functional: the graph behind a model.
        example: an array, a tuple or list of them, or a dict by the names of the inputs.

    Raises:
        OptionError: arrays that the model has no input for, or of other shapes.
    """
    names = [symbol._keras_history.operation.name for symbol in functional.inputs]
    arrays = _by_name(functional, names, example) if isinstance(example, dict) else _in_order(example, len(names))
    if len(arrays) != len(names):
        raise OptionError(
            f"the example must hold an array for each of the {len(names)} inputs {', '.join(names)}, got {len(arrays)}"
        )
    return [_checked(*entry) for entry in zip(names, functional.inputs, arrays, strict=True)]


def _by_name(functional: Any, names: list[str], example: dict[str, Any]) -> list[Any]:
    keys = names
    if isinstance(functional._inputs_struct, dict) and set(example) == set(functional._inputs_struct):
        # flattened as Keras does it, by sorted keys
        keys = sorted(functional._inputs_struct)
    if set(keys) != set(example):
        raise OptionError(
            f"an example that is a dict must name the inputs {', '.join(sorted(names))}, "
            f"got {', '.join(sorted(map(str, example))) or 'nothing'}"
        )
    return [example[key] for key in keys]


def _in_order(example: Any, expected: int) -> list[Any]:
    if isinstance(example, tuple):
        return list(example)
    if isinstance(example, list) and (expected > 1 or (len(example) == 1 and np.ndim(example[0]) > 1)):
        return example
    return [example]


def _checked(name: str, symbol: Any, array: Any) -> np.ndarray:
    try:
        found = as_array(array)
    except Exception as error:
        raise OptionError(f"the example for {name} must be an array, got a {type(array).__name__}: {error}") from error
    if found.dtype.kind not in "fiub" and found.dtype.name != "bfloat16":
        raise OptionError(f"the example for {name} must hold numbers, got an array of dtype {found.dtype}")
    fits = found.ndim == len(symbol.shape)
    if not fits or any(size not in (None, own) for size, own in zip(symbol.shape, found.shape, strict=True)):
        raise OptionError(
            f"the example for {name} must have the shape {tuple(symbol.shape)}, None for any size, got {found.shape}"
        )
    return found


def ready_made(functional: Any, seed: int | None) -> list[np.ndarray]:
    """Return random inputs of shapes that the model can take: 2 samples, 32 in each place that it leaves open."""
    rng = np.random.default_rng([seed is None, seed or 0])
    arrays = []
    for symbol in functional.inputs:
        batch, *others = symbol.shape
        shape = (batch or BATCH, *(size or PLACES for size in others))
        arrays.append(_random(rng, shape, np.zeros(1, "float32" if "float" in symbol.dtype else "int64")))
    return arrays


def random_like(arrays: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Return random arrays of the same shapes and dtypes; integers are drawn from those that are there."""
    rng = np.random.default_rng(seed)
    return [_random(rng, array.shape, array) for array in arrays]


def _random(rng: np.random.Generator, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
    if like.dtype.kind in "iub":
        pool = np.unique(like) if like.any() else np.arange(2).astype(like.dtype)
        return rng.choice(pool, shape).astype(like.dtype)
    return rng.standard_normal(shape).astype(like.dtype)


def packed(functional: Any, arrays: list[np.ndarray]) -> Any:
    """Return arrays in the structure that the model was made with."""
    return keras.tree.pack_sequence_as(functional._inputs_struct, arrays)
