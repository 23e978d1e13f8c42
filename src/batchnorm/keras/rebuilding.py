"""Build a functional Keras model again, with other layers in the places of some, or in another dtype."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from batchnorm.affine import Affine
from batchnorm.errors import OptionError
from batchnorm.graph import Norm
from batchnorm.keras import linear
from batchnorm.keras.internals import (
    as_array,
    calls,
    copied_operation,
    graph_of,
    leaving_names,
    parts,
    plain_constructor,
    quietly,
    told,
    unsafely,
)
from batchnorm.keras.layers import ScaleShift
from batchnorm.keras.normalization import BatchNormalization

__all__ = ["Edits", "rebuilt"]


@dataclass(slots=True)
class Edits:
    """What becomes of the layers of a model, each by its `id`; those that are not named stay as they are.

    Args:
        norms: what stands in the place of a layer: `None` for nothing, or a scale and shift.
        weights: new kernels and biases.
        biasless: linear layers that lose their bias.
        means: new moving means.
        numbers: batch normalization layers that take the numbers of another.
        configs: what the config of a layer becomes, by a function of it, for layers inside of layers too.
        classes: what becomes of the class of a layer with such a config.
        dtype: of all layers; `None` for the one that each has.
    """

    norms: dict[int, Affine | None] = field(default_factory=dict)
    weights: dict[int, linear.Values] = field(default_factory=dict)
    biasless: set[int] = field(default_factory=set)
    means: dict[int, np.ndarray] = field(default_factory=dict)
    numbers: dict[int, Norm] = field(default_factory=dict)
    configs: Callable[[type, Any], Any] | None = None
    classes: dict[type, type] = field(default_factory=dict)
    dtype: str | None = None


def rebuilt(model: Any, edits: Edits) -> Any:
    """Return a copy of a model with other layers; the model itself, and the state of Keras, stay as they are.

    The copy has the names and the structure of inputs and outputs of the model, and is not compiled.

    Raises:
        OptionError: a layer that can't be copied.
    """
    customs = {type(part).__name__: type(part) for part in parts(model)}
    policy = keras.config.dtype_policy(), keras.config.floatx()
    with leaving_names(), quietly(), unsafely(), keras.saving.custom_object_scope(customs):
        try:
            if edits.dtype is not None:
                keras.config.set_floatx(edits.dtype)
                keras.config.set_dtype_policy(edits.dtype)
            builder = _Builder(edits)
            copy = builder.model(model)
            builder.recompute()
            return copy
        finally:
            keras.config.set_dtype_policy(policy[0])
            keras.config.set_floatx(policy[1])


class _Builder:
    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self.copies: dict[int, tuple[Any, Any]] = {}
        self.filled: set[int] = set()

    def model(self, model: Any) -> Any:
        """Return the copy of a model that can be seen through."""
        copy = self._sequential(model) if isinstance(model, keras.Sequential) else self._functional(model)
        copy.dtype_policy = self.edits.dtype or model.dtype_policy
        return copy

    # -- the two kinds of models -----------------------------------------------------------------------------------

    def _sequential(self, model: Any) -> Any:
        kept = [layer for layer in model.layers if not self._vanishes(layer)]
        last = model.layers[-1]
        if not kept or last.compute_dtype != kept[-1].compute_dtype:
            # so that something is left, and puts out the same dtype
            kept += [last] if self._vanishes(last) else []
        stack = [self._input(model._layers[0].output), *(self._copy(layer) for layer in kept)]
        cls = type(model) if plain_constructor(model) else keras.Sequential
        copy = cls(stack, name=model.name, trainable=model.trainable)
        for layer in kept:
            self._fill(layer)
        return copy

    def _functional(self, model: Any) -> Any:
        inputs = keras.tree.map_structure(self._input, model._inputs_struct)
        symbols = {id(old): new for old, new in zip(model.inputs, keras.tree.flatten(inputs), strict=True)}
        ends = {id(symbol) for symbol in model.outputs}
        for call in calls(model):
            args, kwargs = call.arguments.fill_in(symbols)
            at_the_end = any(id(symbol) in ends for symbol in call.outputs)
            if self._vanishes(call.operation) and not at_the_end:
                results = [symbols[id(call.input_tensors[0])]]
            else:
                results = keras.tree.flatten(self._call(call.operation, args, kwargs, call.input_tensors, symbols))
            symbols.update((id(old), new) for old, new in zip(call.outputs, results, strict=True))
        outputs = keras.tree.map_structure(lambda old: symbols[id(old)], model._outputs_struct)
        cls = type(model) if plain_constructor(model) else keras.Model
        return cls(inputs, outputs, name=model.name, trainable=model.trainable)

    def _call(self, operation: Any, args: Any, kwargs: Any, given: list[Any], symbols: dict[int, Any]) -> Any:
        copy = self._copy(operation)
        if id(operation) in self.edits.norms:
            return copy(symbols[id(given[0])])
        results = copy(*args, **kwargs)
        self._fill(operation)
        return results

    def _input(self, symbol: Any) -> Any:
        layer = symbol._keras_history.operation
        dtype = self.edits.dtype if keras.backend.is_float_dtype(symbol.dtype) else None
        return keras.Input(
            batch_shape=symbol.shape,
            dtype=dtype or symbol.dtype,
            name=layer.name,
            sparse=symbol.sparse,
            optional=getattr(layer, "optional", False),
        )

    def _vanishes(self, operation: Any) -> bool:
        return self.edits.norms.get(id(operation), ...) is None

    # -- one layer -------------------------------------------------------------------------------------------------

    def _copy(self, operation: Any) -> Any:
        """Return the copy of a layer, the same one for each of its calls."""
        if id(operation) not in self.copies:
            self.copies[id(operation)] = operation, self._made(operation)
        return self.copies[id(operation)][1]

    def _made(self, operation: Any) -> Any:
        if graph_of(operation) is not None:
            return self.model(operation)
        if not isinstance(operation, keras.layers.Layer):
            return copied_operation(operation)
        if id(operation) in self.edits.norms:
            return self._replacement(operation)
        try:
            return self._from_config(operation, operation.get_config())
        except Exception as error:
            raise _uncopied(operation, told(error)) from error

    def recompute(self) -> None:
        """Let the copies be computed again in the backward pass where their layers are (`keras.RematScope`)."""
        for old, new in self.copies.values():
            for part, twin in zip(parts(old), parts(new), strict=False):
                twin._remat_mode = part._remat_mode

    def _replacement(self, norm: Any) -> Any:
        affine = self.edits.norms[id(norm)]
        policy = self.edits.dtype or norm.dtype_policy
        if affine is None:
            return keras.layers.Identity(name=norm.name, dtype=policy)
        layer = ScaleShift(norm.axis, name=norm.name, dtype=policy, trainable=norm.trainable)
        layer.build(
            tuple(None if i != norm.axis % n else affine.scale.size for n in [norm.input_spec.ndim] for i in range(n))
        )
        layer.scale.assign(affine.scale)
        layer.shift.assign(affine.shift)
        return layer

    def _from_config(self, layer: Any, config: dict[str, Any]) -> Any:
        if self.edits.dtype is not None:
            config = _retyped(config, self.edits.dtype)
        cls: Any = self.edits.classes.get(type(layer), type(layer))
        if self.edits.configs is not None:
            config = self.edits.configs(type(layer), config)
        config = {**config, **self._entries(layer)}
        if isinstance(layer, keras.layers.Lambda):
            kept = {key: config[key] for key in ("name", "dtype", "trainable") if key in config}
            own = {"output_shape": layer._output_shape, "mask": layer.mask, "arguments": layer.arguments}
            return type(layer)(layer.function, **own, **kept)
        live = {key: getattr(layer, key) for key in ("activation",) if key in config}
        try:
            return cls.from_config(config)
        except (TypeError, ValueError):
            # a function that is not registered has no config
            return cls.from_config({**config, **live})

    def _entries(self, layer: Any) -> dict[str, Any]:
        """Return what the edits change in the config of a layer."""
        entries: dict[str, Any] = {}
        values = self.edits.weights.get(id(layer), {})
        if any(bias is not None for _, bias in values.values()) and linear.bias_of(layer) is None:
            entries |= linear.bias_config(layer)
        if id(layer) in self.edits.biasless:
            entries |= linear.no_bias_config(layer)
        if id(layer) in self.edits.numbers:
            entries |= _norm_config(layer, self.edits.numbers[id(layer)])
        return entries

    def _fill(self, layer: Any) -> None:
        """Give the copy of a layer its weights, once, after its first call has built it."""
        is_leaf = isinstance(layer, keras.layers.Layer) and graph_of(layer) is None
        if id(layer) in self.filled or id(layer) in self.edits.norms or not is_leaf:
            return
        self.filled.add(id(layer))
        pairs = parts(layer), parts(self._copy(layer))
        if [self.edits.classes.get(type(part), type(part)) for part in pairs[0]] != [type(part) for part in pairs[1]]:
            raise _uncopied(layer, "its copy holds other layers")
        for old, new in zip(*pairs, strict=True):
            self._fill_one(old, new, self.edits.weights.get(id(old), {}))

    def _fill_one(self, old: Any, new: Any, values: linear.Values) -> None:
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        if self.edits.dtype is not None:
            # a float64 variable of JAX may hold float32, which Keras would not convert
            store = {key: as_array(value) for key, value in store.items()}
        if values and len(store) < len(new.weights):
            # the bias that the copy has in addition comes last
            store[str(len(store))] = np.zeros(tuple(linear.bias_of(new).shape))
        if id(old) in self.edits.biasless:
            # it comes last
            last = str(len(store) - 1)
            store[last] = np.zeros_like(as_array(store[last]))
            if linear.bias_of(new) is None:
                del store[last]
        try:
            new.load_own_variables(store)
        except Exception as error:
            raise _uncopied(old, f"its copy has other weights: {told(error)}") from error
        if values:
            linear.assign(new, values)
        if id(old) in self.edits.means:
            new.moving_mean.assign(self.edits.means[id(old)])
        if id(old) in self.edits.numbers:
            _take_numbers(new, self.edits.numbers[id(old)])


def _norm_config(layer: Any, norm: Norm) -> dict[str, Any]:
    """Return the entries of its config that a layer takes from another one."""
    config: dict[str, Any] = {"epsilon": norm.eps}
    if norm.decay is not None:
        config["momentum"] = norm.decay
    if norm.unbiased is not None and isinstance(layer, BatchNormalization):
        config["unbiased"] = norm.unbiased
    return config


def _take_numbers(layer: Any, norm: Norm) -> None:
    assert norm.mean is not None  # noqa: S101
    gamma = np.ones_like(norm.mean) if norm.gamma is None else norm.gamma
    beta = np.zeros_like(norm.mean) if norm.beta is None else norm.beta
    pairs = (
        (layer.gamma, gamma),
        (layer.beta, beta),
        (layer.moving_mean, norm.mean),
        (layer.moving_variance, norm.variance),
    )
    for variable, values in pairs:
        if variable is not None:
            variable.assign(values)


def _retyped(config: Any, dtype: str) -> Any:
    """Return a config with another dtype in the place of every floating one, in layers inside of the layer too."""
    if isinstance(config, dict):
        return {key: dtype if key == "dtype" and _floats(v) else _retyped(v, dtype) for key, v in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_retyped(v, dtype) for v in config)
    return config


def _floats(dtype: Any) -> bool:
    if isinstance(dtype, dict):
        dtype = dtype.get("config", {}).get("name") or ""
    return isinstance(dtype, str) and "float" in dtype


def _uncopied(layer: Any, why: str) -> OptionError:
    return OptionError(
        f"the layer {layer.name} of class {type(layer).__name__} must be copied, which needs its get_config() and "
        f"from_config() to make the same layer again, but: {why}"
    )
