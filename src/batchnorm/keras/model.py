"""A Keras model, seen through the `Model` protocol."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from batchnorm.affine import Affine
from batchnorm.errors import OptionError
from batchnorm.graph import Graph, Norm, Weights
from batchnorm.keras import examples, loaders, optimizers, states
from batchnorm.keras.internals import (
    as_array,
    calls,
    graph_of,
    in_float64,
    leaving_random,
    named,
    own_variables,
    parts,
    standardized,
    told,
    untraced,
)
from batchnorm.keras.measuring import batches_of, entering, measuring, stored, write
from batchnorm.keras.naming import names_of
from batchnorm.keras.picture import Key, Path, Picture, draw
from batchnorm.keras.rates import rates
from batchnorm.keras.rebuilding import Edits, rebuilt
from batchnorm.keras.rehearsal import train_once
from batchnorm.protocol import Changes, Layer, Measure, Pair, Statistics, random_arrays
from batchnorm.reach import dropout
from batchnorm.states import BatchSizes, Mend, NormState, Optimization, Rate, Rehearsal

__all__ = ["KerasModel"]

_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class KerasModel:
    """The `Model` protocol for Sequential and functional ``keras.Model``, and models of them inside of each other.

    The model is never changed: Keras has no sound way to edit a graph in place. `changed` and `change` build a new one from
    the configs of the layers, with the same names, the same structure of inputs and outputs, and copies of the weights. The
    new model is not compiled. A class with a constructor of its own becomes a plain ``keras.Model``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._wide = False
        self._is_copy = False

    # -- what is there ---------------------------------------------------------------------------------------------

    def layers(self, example: Any | None) -> list[Layer]:
        """List the layers in the order of their calls; a layer that is made of layers counts as one.

        Raises:
            OptionError: the model fails on ``example``.
        """
        found: dict[Any, tuple[Path, tuple[int | None, ...] | None]] = {}
        functional = graph_of(self.model)
        if functional is not None and example is not None:
            found.update(self._picture(example).layers)
        elif functional is not None:
            _list_calls(functional, (), found)
        else:
            names = names_of(self.model)
            found.update({layer: ((names[layer],), None) for layer in parts(self.model)[1:] if not layer._layers})
        counted: set[int] = set()
        return [_layer(".".join(path), layer, shape, counted) for layer, (path, shape) in found.items()]

    def graph(self, example: Any | None) -> Graph:
        """Return the picture of the model in evaluation on ``example``.

        Raises:
            OptionError: a model that computes in a ``call`` of its own, is not built, or fails on ``example``.
        """
        return self._picture(example).graph

    def _picture(self, example: Any | None) -> Picture:
        functional, inputs = self._functional(), self.inputs(example, None)
        with in_float64(self._wide), untraced():
            try:
                tensors = standardized(functional, examples.packed(functional, inputs))
                return draw(self.model, functional, tensors)
            except OptionError as error:
                if example is not None:
                    raise
                raise OptionError(f"{error}; no example was given, so one was made up: give one") from error

    def _functional(self) -> Any:
        found = graph_of(self.model)
        if found is not None:
            return found
        name = type(self.model).__name__
        if isinstance(self.model, keras.Sequential) and type(self.model) is keras.Sequential:
            raise OptionError(
                f"the model {self.model.name} must be built, so that it has weights: call it once, or start it with "
                "keras.Input(shape)"
            )
        raise OptionError(
            f"a Keras model must be Sequential or functional to be seen through, got a {name}, which computes in its own "
            "call(): build it as keras.Model(inputs, outputs)"
        )

    # -- running it ------------------------------------------------------------------------------------------------

    def example(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Any | None:
        """Return random inputs of these names (empty: by position) and shapes; ``None`` for none."""
        return random_arrays(shapes)

    def inputs(self, example: Any | None, seed: int | None) -> list[np.ndarray]:
        """Return the arrays of ``example`` in the order of the model's inputs, or random ones of the same shapes.

        Raises:
            OptionError: arrays that the model has no input for, or of other shapes.
        """
        functional = self._functional()
        if example is None:
            return examples.ready_made(functional, seed)
        arrays = examples.given(functional, example)
        return arrays if seed is None else examples.random_like(arrays, seed)

    def outputs(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Run in evaluation and return all output arrays, flattened as Keras does it.

        Raises:
            OptionError: the model fails on ``inputs``.
        """
        with in_float64(self._wide), untraced():
            try:
                results = self.model(examples.packed(self._functional(), inputs), training=False)
            except Exception as error:
                raise OptionError(f"the model must run on the example, but it failed: {told(error)}") from error
            return [as_array(array) for array in keras.tree.flatten(results)]

    @property
    def precision(self) -> str:
        """The coarsest floating dtype that the model stores weights or computes in."""
        with in_float64(self._wide):
            stored = {variable.dtype for variable in self.model.weights}
            computing = {layer.compute_dtype for layer in parts(self.model) if own_variables(layer)}
            # which Keras narrows on most backends
            dtypes = {keras.backend.result_type(dtype) for dtype in stored | computing if dtype in _EPS}
        return max(dtypes, key=_EPS.__getitem__, default="float32")

    # -- changing it -----------------------------------------------------------------------------------------------

    def changed(self, changes: Changes) -> "KerasModel":
        """Return a copy with all changes made; it is not compiled.

        Raises:
            OptionError: a layer that can't be copied, or channels that shall go.
        """
        if changes.channels or changes.gammas:
            raise OptionError("channels of a Keras model can't be taken out: prune the model in torch or as ONNX")
        # constants of layers, too, stay as they were made
        edits = Edits(dtype="float64" if self._wide else None)
        for norm, replacement in changes.norms.items():
            assert replacement is None or isinstance(replacement, Affine)  # noqa: S101
            edits.norms[id(self._find(norm))] = replacement
        for weights, (weight, bias) in changes.weights.items():
            edits.weights.setdefault(id(self._find(weights)), {})[weights.key.kernel] = weight, bias
        edits.biasless = {id(self._find(weights)) for weights in changes.biasless}
        edits.means = {id(self._find(norm)): mean for norm, mean in changes.means.items()}
        edits.numbers = {id(self._find(norm)): taken for norm, taken in changes.numbers.items()}
        return self._rebuilt(edits, self._wide)

    def change(self, changes: Changes) -> None:
        """Put a changed copy in the place of a copy that `cast` or `changed` has made.

        Raises:
            OptionError: this is the user's own model.
        """
        if not self._is_copy:
            raise OptionError("a Keras model can't be changed in place: leave inplace out and use result.model")
        self.model = self.changed(changes).model

    def statistics(self) -> list[Statistics]:
        """List the moving statistics of all layers."""
        return stored(self.model)

    def batches(self, data: Any) -> Any:
        """Return what yields the batches of a ``PyDataset``; anything else as it is."""
        return batches_of(data)

    def measuring(
        self, statistics: list[Statistics], forward: Any | None, device: Any, *, watch: bool = False
    ) -> AbstractContextManager[Measure]:
        """Run the model in evaluation and measure the inputs of layers."""
        return measuring(self.model, statistics, forward, device, every=watch)

    def write(self, statistics: Mapping[Statistics, Pair], batches: int) -> None:
        """Assign new moving statistics in the model itself, all or none."""
        write(statistics)

    # -- how its normalization stands ------------------------------------------------------------------------------

    @property
    def training(self) -> bool | None:
        """``None``: Keras has no modes, each call says how it is meant."""
        return None

    @property
    def learns(self) -> bool:
        """Whether any weight of the model is trained."""
        return bool(self.model.trainable_weights)

    def states(self) -> list[NormState]:
        """List the layers in the order in which the model holds them, also of a model that can't be seen through."""
        return states.states(self.model)

    def example_of(self, batch: Any) -> Any:
        """Return the inputs in a batch, which is ``(inputs, targets, weights)`` or only inputs."""
        return entering(self.model, batch)

    def rehearse(self, example: Any) -> Rehearsal:
        """Make one step of training in a copy, and look for dropout in the picture.

        Raises:
            OptionError: a model that can't be seen through or copied, or fails on the example.
        """
        graph = self.graph(example)
        with leaving_random():
            copy = rebuilt(self.model, Edits())
            seen = train_once(self.model, copy, examples.packed(graph_of(copy), self.inputs(example, None)))
        return Rehearsal(seen.twice, dropout(graph), seen.calls)

    def batch_sizes(self, loader: Any) -> BatchSizes:
        """Return the sizes of the batches of a loader, or of ``(samples, batch_size)``."""
        return loaders.batch_sizes(self.model, loader)

    def optimization(self, optimizer: Any) -> Optimization:
        """Return what an optimizer and the penalties of the layers do to γ and β."""
        return optimizers.optimization(self.model, optimizer)

    def mend(self, mends: Mapping[str, Mend]) -> None:
        """Set momenta, constants and ``trainable`` of layers, all or none."""
        states.mend(self.model, mends)

    def spare(self, optimizer: Any) -> int:
        """Exclude γ and β from weight decay, beside what is excluded already."""
        return optimizers.spare(self.model, optimizer)

    def rates(self, optimizer: Any, layers: Sequence[str]) -> list[Rate]:
        """Return how fast an optimizer turns the kernels of linear layers."""
        return rates(self.model, optimizer, layers)

    # -- copies ----------------------------------------------------------------------------------------------------

    def cast(self, precision: str) -> "KerasModel | None":
        """Return a copy that computes in ``precision`` throughout; ``None`` where a layer does not."""
        if any(part.quantization_mode is not None for part in parts(self.model)):
            return None
        try:
            copy = self._rebuilt(Edits(dtype=precision), precision == "float64")
        except OptionError:
            return None
        symbols = [symbol.dtype for call in calls(graph_of(copy.model)) for symbol in call.outputs]
        throughout = all(dtype == precision for dtype in symbols if dtype in _EPS)
        return copy if throughout and copy.precision == precision else None

    def _rebuilt(self, edits: Edits, wide: bool) -> "KerasModel":
        self._functional()
        with in_float64(wide):
            copy = KerasModel(rebuilt(self.model, edits))
        copy._wide, copy._is_copy = wide, True
        return copy

    def _find(self, found: Norm | Weights) -> Any:
        """Return the layer of this model that has the path of a layer of its picture."""
        layer = self.model
        key: Key = found.key
        for name in key.path:
            layer = named(layer, name)
        return layer


def _list_calls(functional: Any, path: Path, found: dict[Any, Any]) -> None:
    """Note the layers of a graph, and of the models inside of it, with the shapes of their last outputs."""
    for call in calls(functional):
        own, inner = (*path, call.operation.name), graph_of(call.operation)
        if inner is not None:
            _list_calls(inner, own, found)
        elif isinstance(call.operation, keras.layers.Layer):
            shape = tuple(call.outputs[0].shape) if len(call.outputs) == 1 else None
            found[call.operation] = found.get(call.operation, (own,))[0], shape


def _layer(name: str, layer: Any, shape: tuple[int | None, ...] | None, counted: set[int]) -> Layer:
    """Count the numbers of a layer, but for those that an earlier layer shares with it."""
    trainable = frozen = statistics = 0
    norm = _norm_numbers(layer, counted)
    for part in parts(layer):
        moved = _statistics(part)
        for variable in own_variables(part):
            size = int(np.prod(variable.shape)) if id(variable) not in counted else 0
            counted.add(id(variable))
            statistics += size if id(variable) in moved else 0
            trainable += size if variable.trainable and id(variable) not in moved else 0
            frozen += size if not variable.trainable and id(variable) not in moved else 0
    batchless = None if shape is None else (None, *shape[1:])
    moves = bool(getattr(layer, "trainable", True))
    return Layer(name, type(layer).__name__, batchless, trainable, frozen, statistics, norm, moves)


_SAID = {
    "gamma": "γ",
    "beta": "β",
    "moving_mean": "mean",
    "moving_variance": "variance",
    "moving_stddev": "deviation",
    "renorm_mean": "mean of renormalization",
    "renorm_stddev": "deviation of renormalization",
}


def _norm_numbers(layer: Any, counted: set[int]) -> dict[str, int]:
    """Return what a batch normalization layer holds, by the field's names, but for what an earlier layer shares with it."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return {}
    own = [v for v in own_variables(layer) if id(v) not in counted]
    return {_SAID.get(v.name, v.name): int(np.prod(v.shape)) for v in own}


def _statistics(layer: Any) -> set[int]:
    """Return the `id` of the variables that a forward pass of the layer moves."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return set()
    return {id(variable) for variable in own_variables(layer)} - {id(layer.gamma), id(layer.beta)}
