"""An ONNX model, seen through the `Model` protocol."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from batchnorm.errors import DataError, OptionError
from batchnorm.graph import Graph
from batchnorm.onnx.files import LIMIT, weight_bytes
from batchnorm.onnx.measuring import measuring, selected, stored
from batchnorm.onnx.picture import draw, is_norm
from batchnorm.onnx.rewriting import rewrite
from batchnorm.onnx.running import Runner
from batchnorm.onnx.scopes import Index, Scope
from batchnorm.onnx.shapes import Shapes, feeds, random_feeds, skeleton
from batchnorm.onnx.states import mend, states
from batchnorm.onnx.tensors import FLOATS, check_tensor, rounded, tensors
from batchnorm.onnx.widening import widened
from batchnorm.protocol import Changes, Layer, Measure, Pair, Statistics, random_arrays
from batchnorm.states import BatchSizes, Mend, NormState, Optimization, Rate, Rehearsal

__all__ = ["OnnxModel"]

OLDEST = 7
"""The first opset in which batch normalization means what it means today."""


class OnnxModel:
    """The `Model` protocol for ``onnx.ModelProto``.

    Args:
        model: a ``ModelProto`` with its weights inside (as `onnx.load` returns it).
        wide: whether it is a float64 copy.

    Example:
        >>> import onnx
        >>> x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 3]) for n in "xy")
        >>> relu = onnx.helper.make_node("Relu", ["x"], ["y"])
        >>> model = OnnxModel(onnx.helper.make_model(onnx.helper.make_graph([relu], "relu", [x], [y])))
        >>> [layer.kind for layer in model.layers(None)]
        ['Relu']
    """

    def __init__(self, model: Any, *, wide: bool = False) -> None:
        self._model = model
        self._wide = wide
        self._runner: Runner | None = None
        # outputs that are known already: inputs, outputs
        self._known: list[tuple[Any, list[np.ndarray]]] = []

    @property
    def model(self) -> Any:
        """The ``ModelProto``."""
        return self._model

    @property
    def precision(self) -> str:
        """The narrowest floating dtype that the model keeps tables of numbers in."""
        if self._wide:
            return "float64"
        held = {tensor.data_type for tensor in tensors(self._model) if tensor.dims and math.prod(tensor.dims) > 1}
        # bfloat16 has the larger rounding error of the two small ones
        order = [TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE]
        return next((FLOATS[kind] for kind in order if kind in held), "float32")

    def layers(self, example: Any | None) -> list[Layer]:
        """List the nodes in their order; numbers are those of their initializers, and none of them is trained any more."""
        _check(self._model)
        shapes = Shapes(self._model, None if example is None else self.inputs(example, None))
        index, counted = Index(self._model), set[int]()
        return [
            _layer(shapes, index, scope, node, counted)
            for scope in index.scopes.values()
            for node in scope.graph.node
            if node.output and not index.is_constant(scope, node)
        ]

    def graph(self, example: Any | None) -> Graph:
        """Return the picture of the model on an example; the model is only read.

        Args:
            example: an array, a tuple of arrays or a dict of arrays by name; without one, inputs of the declared sizes are made
                up, with 2 for a batch and 64 for any other dimension without a size.

        Raises:
            DataError: the model is not valid.
            OptionError: an opset before 7, or an example that does not fit.
        """
        opset = _check(self._model)
        arrays, index = self.inputs(example, None), Index(self._model)
        shapes = Shapes(self._model, arrays)
        if missing := shapes.missing(index.main):
            # sizes that are computed from sizes: seen in a run
            for name, array in zip(missing, self._seen(missing, arrays), strict=True):
                if isinstance(array, np.ndarray):
                    shapes.learn(index.main, name, array)
        return draw(index, shapes, opset)

    def _seen(self, names: list[str], arrays: dict[str, np.ndarray]) -> list[Any]:
        copy = type(self._model)()
        copy.CopyFrom(self._model)
        del copy.graph.output[:]
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        try:
            return Runner(copy, evaluated=self._wide).outputs(arrays)
        except OptionError:
            # their sizes stay unknown
            return [None] * len(names)

    def changed(self, changes: Changes) -> "OnnxModel":
        """Return a copy with all changes made."""
        copy = type(self._model)()
        copy.CopyFrom(self._model)
        changed = OnnxModel(copy, wide=self._wide)
        changed.change(changes)
        return changed

    def change(self, changes: Changes) -> None:
        """Make all changes in the model itself."""
        with self._copy() as new:
            rewrite(new, changes, self._elem_types())

    @contextmanager
    def _copy(self) -> Iterator[Any]:
        """Yield a copy to be changed, which takes the place of the model if it is valid then."""
        new = type(self._model)()
        new.CopyFrom(self._model)
        yield new
        _check(new)
        self._model.CopyFrom(new)
        self._runner, self._known = None, []

    def _elem_types(self) -> Any:
        if self._wide:
            return lambda scope, name: TensorProto.DOUBLE
        shapes = Shapes(self._model, None)
        return lambda scope, name: shapes.elem_type(scope, name) or TensorProto.FLOAT

    def example(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Any | None:
        """Return random inputs of these names (empty: by position) and shapes; ``None`` for none."""
        return random_arrays(shapes)

    def inputs(self, example: Any | None, seed: int | None) -> dict[str, np.ndarray]:
        """Return the inputs of ``example`` by name, or random ones of the same shapes; whole numbers are only shuffled."""
        if example is None:
            return random_feeds(self._model, 1 if seed is None else seed)
        given = feeds(self._model, example)
        if seed is None:
            return given
        rng = np.random.default_rng(seed)
        return {name: _like(rng, array) for name, array in given.items()}

    def outputs(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run and return all outputs.

        Raises:
            OptionError: the model does not run on them.
        """
        for known, found in self._known:
            if known is inputs:
                return found
        if self._runner is None:
            self._runner = Runner(self._model, evaluated=self._wide)
        self._known.append((inputs, self._runner(inputs)))
        return self._known[-1][1]

    def statistics(self) -> list[Statistics]:
        """List the running statistics of all batch normalization."""
        _check(self._model)
        return stored(self._model)

    def batches(self, data: Any) -> Any:
        """Return ``data``: whatever can be iterated over."""
        return data

    def measuring(
        self, statistics: list[Statistics], forward: Any | None, device: Any, *, watch: bool = False
    ) -> AbstractContextManager[Measure]:
        """Run a copy of the model and measure the inputs of layers.

        Raises:
            OptionError: a ``forward`` or a ``device``, which onnxruntime has no use for.
        """
        if forward is not None or device is not None:
            raise OptionError(
                "an ONNX model is run by onnxruntime: leave forward and device out, and prepare the batches"
            )
        return measuring(self._model, statistics, every=watch)

    def write(self, statistics: Mapping[Statistics, Pair], batches: int) -> None:
        """Put new statistics into the initializers, all or none.

        Raises:
            OptionError: a dtype that can't hold them.
        """
        for one, pair in statistics.items():
            kinds = self._statistics_kinds(one)
            if not all(np.isfinite(rounded(v, kind)).all() for v, kind in zip(pair, kinds, strict=True)):
                names = " and ".join(dict.fromkeys(FLOATS[kind] for kind in kinds))
                raise OptionError(f"layer {one.name!r} stores its statistics in {names}, which can't hold the new ones")
        means = {one.key: pair[0] for one, pair in statistics.items()}
        variances = {one.key: pair[1] for one, pair in statistics.items()}
        self.change(Changes(means=means, variances=variances))

    def _statistics_kinds(self, one: Statistics) -> list[int]:
        index = Index(self._model)
        scope, node = index.find(one.key.key.site)
        return [c.elem_type for name in node.input[3:5] if (c := index.constant(scope, name)) is not None]

    # -- how its normalization stands ------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """``False``: a file only infers."""
        return False

    @property
    def learns(self) -> bool:
        """``False``: nothing of a file is trained."""
        return False

    def states(self) -> list[NormState]:
        """List the batch normalization, of subgraphs and functions too; not what is frozen to a Mul and an Add."""
        _check(self._model)
        return states(self._model)

    def example_of(self, batch: Any) -> Any:
        """Return what the model takes of a batch: the arrays that have the names of its inputs, or the first ones."""
        return selected(self._model, batch)

    def rehearse(self, example: Any) -> Rehearsal:
        """Decline: an ONNX model is not trained."""
        raise _untrained("the rehearsal")

    def batch_sizes(self, loader: Any) -> BatchSizes:
        """Decline: an ONNX model is not trained."""
        raise _untrained("the loader")

    def optimization(self, optimizer: Any) -> Optimization:
        """Decline: an ONNX model is not trained."""
        raise _untrained("the optimizer")

    def spare(self, optimizer: Any) -> int:
        """Decline: an ONNX model is not trained."""
        raise _untrained("the optimizer")

    def mend(self, mends: Mapping[str, Mend]) -> None:
        """Put nodes into their form for inference, and set their eps; all or none.

        Raises:
            OptionError: anything else.
        """
        with self._copy() as new:
            mend(new, mends)

    def rates(self, optimizer: Any, layers: Sequence[str]) -> list[Rate]:
        """Decline: an ONNX model is not trained."""
        raise _untrained("the optimizer")

    # -- copies ----------------------------------------------------------------------------------------------------

    def cast(self, precision: str) -> "OnnxModel | None":
        """Return a copy that computes in float64; ``None`` for other dtypes, or where an operator can't."""
        if precision != "float64":
            return None
        if self._wide or self.precision == "float64":
            return OnnxModel(self.changed(Changes()).model, wide=True)
        wide = OnnxModel(widened(self._model), wide=True)
        try:
            # what it ran on last tells whether all its operators can
            for inputs, _ in self._known[-1:]:
                wide.outputs(inputs)
        except OptionError:
            return None
        return wide


def _untrained(given: str) -> OptionError:
    return OptionError(
        f"an ONNX model is not trained: leave {given} out, or check the model that it was exported from with it"
    )


def _check(model: Any) -> int:
    """Hold a model against the standard, and return the version of the standard operators.

    Raises:
        DataError: it breaks the standard.
        OptionError: it uses operators of a version that is not understood.
    """
    for tensor in tensors(model):
        check_tensor(tensor)
    try:
        # one message can't hold more, so the checker sees large models without their weights
        onnx.checker.check_model(model if weight_bytes(model) < LIMIT else skeleton(model))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DataError(f"the model must be valid ONNX, the checker says: {text}") from error
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    norms = any(is_norm(node) for node in model.graph.node)
    if opset < OLDEST and norms:
        raise OptionError(f"the model must use opset {OLDEST} or later, got {opset}: use onnx.version_converter first")
    return opset


def _like(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return rng.standard_normal(array.shape).astype(array.dtype)
    # indices stay in the range of their table; what may be a shape or a number of rounds stays as it is
    return rng.permutation(array.ravel()).reshape(array.shape) if array.ndim > 1 else array


def _layer(shapes: Shapes, index: Index, scope: Scope, node: Any, counted: set[int]) -> Layer:
    """Count the numbers of a node, but for those that an earlier one shares with it."""
    frozen = statistics = 0
    for place, name in enumerate(node.input):
        home = scope.home(name) if name else None
        tensor = None if home is None else home.initializers.get(name)
        if tensor is None or tensor.data_type not in FLOATS or id(tensor) in counted:
            continue
        counted.add(id(tensor))
        if is_norm(node) and place > 2:
            statistics += math.prod(tensor.dims)
        else:
            frozen += math.prod(tensor.dims)
    sizes = shapes.open(scope, node.output[0])
    shape = None if sizes is None else (None, *sizes[1:]) if sizes else ()
    return Layer(index.label(scope, node), node.op_type, shape, 0, frozen, statistics)
