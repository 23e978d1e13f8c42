"""The same inputs for two networks whose channels may be on other axes, and how far their outputs are apart."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.errors import BatchNormError, OptionError, VerificationError
from batchnorm.graph import Graph
from batchnorm.models import framework_of
from batchnorm.protocol import Model

__all__ = ["Agreement", "Meeting", "agree", "meet"]

EXACT = 1e-9
"""Relative difference in float64: the numbers are the same, only sums are taken in another order, layer after layer."""
ROUNDED_EPS = 1e-6
"""The same with ONNX, which holds eps in float32: a relative error of 6e-8 beside a variance that may be smaller than eps."""
UNJUDGED = 4096
"""Roundings that are allowed to models that can't be run in float64."""
ROUNDINGS = 256
"""The same where the numbers of one network were rounded to the dtype of the other."""
_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_LAST = ("keras",)


@dataclass(slots=True)
class Meeting:
    """Two networks with one example.

    Args:
        graphs: their pictures on it.
        examples: what each is called with.
        axes: of the channels in the inputs of each; ``None`` where both have the same.
    """

    graphs: tuple[Graph, Graph]
    examples: tuple[Any, Any]
    axes: tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Agreement:
    """The largest difference between the outputs of two networks, relative to the largest output.

    Args:
        precision: the dtype that both computed in.
        relative: the difference.
        bound: what it was held against.
    """

    precision: str
    relative: float
    bound: float

    def __float__(self) -> float:
        return self.relative

    def __str__(self) -> str:
        return f"{self.precision}: outputs differ by {self.relative:.2g} of the largest (bound {self.bound:.2g})"


def meet(source: Model, target: Model, example: Any | None) -> Meeting:
    """Draw both networks on one example; channels first and channels last are told apart by what each of them takes.

    Args:
        source: knows what to do with the example.
        target: gets the same, with its channels on its own axis.
        example: an input of the source; ``None`` where one of the networks knows its shapes.

    Raises:
        OptionError: no example, or one that the target can't be called with.
    """
    if example is not None:
        return _meet(source, target, example)
    if (own := source.inputs(None, None)) is not None:
        return _meet(source, target, own)
    # a torch module does not know the shapes of its inputs
    if (theirs := target.inputs(None, None)) is not None:
        turned = _meet(target, source, theirs)
        return Meeting(turned.graphs[::-1], turned.examples[::-1], turned.axes[::-1])
    raise OptionError(
        "an example input of the source must be given, neither model knows the shapes of its own: transfer(source, target, "
        "torch.randn(2, 3, 224, 224)), or --input 2,3,224,224"
    )


def _meet(source: Model, target: Model, example: Any) -> Meeting:
    graph = source.graph(example)
    arrays = _arrays(source.inputs(example, None))
    reasons = []
    for move, axes in _moves(source, target, arrays):
        theirs = _called(target, [move(array) for array in arrays])
        try:
            return Meeting((graph, target.graph(theirs)), (example, theirs), axes)
        except BatchNormError as error:
            reasons.append(str(error))
    raise OptionError(
        f"both models must run on one example, but {framework_of(target.model)} takes it neither as it is nor with its "
        f"channels on the other side: {reasons[0]}"
    )


def _moves(
    source: Model, target: Model, arrays: list[np.ndarray]
) -> Iterator[tuple[Any, tuple[int | None, int | None]]]:
    """Yield how an input of one network may become one of the other, the likely way first, with the axes of the channels."""
    last = [framework_of(model.model) in _LAST for model in (source, target)]
    ndim = max((array.ndim for array in arrays), default=0)
    if last[0] != last[1] and ndim > 2:
        yield (_to_first, (ndim - 1, 1)) if last[0] else (_to_last, (1, ndim - 1))
    yield (lambda array: array), (None, None)
    if last[0] != last[1] and ndim > 2:
        yield (_to_last, (1, ndim - 1)) if last[0] else (_to_first, (ndim - 1, 1))


def _to_first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim > 2 else array


def _to_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if array.ndim > 2 else array


def _arrays(tree: Any) -> list[np.ndarray]:
    """Return the arrays of an example of any framework."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, tuple | list):
        return [array for item in tree for array in _arrays(item)]
    if tree is None:
        return []
    tree = tree.detach().cpu() if hasattr(tree, "detach") else tree
    return [np.asarray(tree.float() if str(getattr(tree, "dtype", "")) == "torch.bfloat16" else tree)]


def _called(view: Model, arrays: list[np.ndarray]) -> Any:
    """Return what a network is called with on arrays."""
    example: Any = arrays[0] if len(arrays) == 1 else tuple(arrays)
    return view.example_of(example) if framework_of(view.model) == "torch" else example


def agree(source: Model, target: Model, meeting: Meeting, uncarried: list[str]) -> Agreement:
    """Run both networks on the same inputs, in float64 where both can, and raise where their outputs differ.

    Args:
        source: the one that the numbers are from.
        target: the one that has them now.
        meeting: what they are called with.
        uncarried: names of layers with other numbers, for the message.

    Raises:
        VerificationError: outputs of other shapes, or other values than rounding explains.
    """
    move: Any = {None: lambda array: array, 1: _to_last}.get(meeting.axes[0], _to_first)
    runs = []
    for seed in (None, 1):
        inputs = source.inputs(meeting.examples[0], seed)
        runs.append((inputs, target.inputs(_called(target, [move(array) for array in _arrays(inputs)]), None)))
    found = _compared(source, target, runs)
    if not found.relative <= found.bound:
        others = f"; numbers of other layers are not carried: {', '.join(uncarried[:8])}" if uncarried else ""
        raise VerificationError(
            f"both models must compute the same with the same numbers, but in {found.precision} their outputs differ by "
            f"{found.relative:.3g} of the largest, allowed are {found.bound:.3g}{others}. Nothing was returned: do padding, "
            "activations and pooling agree?"
        )
    return found


def _compared(source: Model, target: Model, runs: list[tuple[Any, Any]]) -> Agreement:
    kinds = {source.precision, target.precision}
    # whether they can be cast, too, is found out by a run
    own = [(source.outputs(ours), target.outputs(theirs)) for ours, theirs in runs]
    coarsest = max(_EPS[kind] for kind in kinds)
    wide = source.cast("float64"), target.cast("float64")
    if wide[0] is None or wide[1] is None:
        return Agreement(target.precision, max(_distance(*pair) for pair in own), UNJUDGED * coarsest)
    distance = max(_distance(wide[0].outputs(ours), wide[1].outputs(theirs)) for ours, theirs in runs)
    onnx = "onnx" in (framework_of(source.model), framework_of(target.model))
    rounded = ROUNDINGS * coarsest if len(kinds) > 1 else 0.0
    return Agreement("float64", distance, max(ROUNDED_EPS if onnx else EXACT, rounded))


def _distance(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    if len(expected) != len(actual):
        return np.inf
    return max((_relative(e, a) for e, a in zip(expected, actual, strict=True)), default=np.inf)


def _relative(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the difference of two outputs, whichever side their channels are on."""
    laid = [moved for move in (lambda v: v, _to_first, _to_last) if (moved := move(actual)).shape == expected.shape]
    e = expected.astype(np.float64)
    size = float(np.abs(e).max(initial=0.0))
    if not np.isfinite(size):
        return np.inf
    differences = [float(np.abs(moved.astype(np.float64) - e).max(initial=0.0)) for moved in laid]
    return min((d if d == d else np.inf for d in differences), default=np.inf) / (size or 1.0)
