"""Rewrite a model from file to file, for the command line."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from batchnorm.errors import OptionError
from batchnorm.fold.bias import strip_bias
from batchnorm.fold.folding import fold
from batchnorm.fold.pruning import prune
from batchnorm.models import adapt, check_ending, load, save
from batchnorm.protocol import Model

__all__ = ["check_shapes", "run"]

_VERBS: dict[str, Any] = {"fold": fold, "strip_bias": strip_bias, "prune": prune}
PAIRS, SECONDS = 21, 10.0


def run(
    verb: str,
    model: str,
    out: Path,
    *,
    weights: Path | None = None,
    inputs: list[tuple[str, tuple[int, ...]]],
    **options: Any,
) -> str:
    """Rewrite a model, write it to a file, and return the result as text, with a line of before and after.

    Args:
        verb: ``fold``, ``strip_bias`` or ``prune``.
        model: a file, or ``package.module:factory``.
        out: the file to write, whole or not at all.
        weights: tensors for the model of a factory.
        inputs: name (may be empty) and shape of each input; none where the model knows them.
        options: of the verb.

    Raises:
        BatchNormError: whatever `models.load`, the verb or `models.save` raise; then nothing was written.
    """
    if not out.parent.is_dir():
        raise OptionError(f"the result must go into a folder that is there, {out.parent} is not")
    check_shapes(inputs)
    loaded = load(model, weights)
    check_ending(loaded, out)
    # what a factory makes is in training mode
    original = adapt(loaded.eval() if hasattr(loaded, "eval") else loaded)
    example = original.example(inputs)
    result = _VERBS[verb](original.model, example, **options)
    rewritten = adapt(result.model)
    line = _before_and_after(original, rewritten, example)
    save(result.model, out, example)
    return f"{result}\n{line}\nwritten to {out}"


def check_shapes(inputs: list[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse shapes of inputs that no input has.

    Raises:
        OptionError: such a shape.
    """
    for _, shape in inputs:
        if not shape or min(shape) < 1:
            raise OptionError(
                f"the shape of an input must be positive sizes, got {','.join(map(str, shape)) or 'none'}"
            )


def _before_and_after(before: Model, after: Model, example: Any) -> str:
    """Return layers, parameters and latency in one line; both models run in turns."""
    inputs = before.inputs(example, None)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS
    while len(times) < PAIRS and (len(times) < 3 or time.perf_counter() < end):
        times.append((_seconds(before, inputs), _seconds(after, inputs)))
    ratio = median(a / b for b, a in times)
    layers, numbers = ([_count(model) for model in (before, after)] for _count in (_layers, _numbers))
    return (
        f"layers {layers[0]} → {layers[1]}, parameters {numbers[0]:,} → {numbers[1]:,}, latency × {ratio:.2f} "
        f"({1000 * median(a for _, a in times):.1f} ms, median of {len(times)} pairs)"
    )


def _seconds(model: Model, inputs: Any) -> float:
    start = time.perf_counter()
    model.outputs(inputs)
    return time.perf_counter() - start


def _layers(model: Model) -> int:
    return sum(layer.parameters > 0 for layer in model.layers(None))


def _numbers(model: Model) -> int:
    return sum(layer.parameters for layer in model.layers(None))
