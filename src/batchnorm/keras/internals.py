"""The one place that reaches into Keras: the graph behind a model, what kind a layer is, and running without a trace."""

import random
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import dtypes, global_state
from keras.src.models.functional import Functional
from keras.src.saving.serialization_lib import SafeModeScope

from batchnorm.keras.normalization import BatchNormalization

__all__ = [
    "as_array",
    "calls",
    "copied_operation",
    "excluded",
    "forget_compiled",
    "found_class",
    "fresh_names",
    "graph_of",
    "in_float64",
    "inner_optimizers",
    "leave_out",
    "leaving_names",
    "leaving_random",
    "optimizer_of",
    "own_variables",
    "parts",
    "plain_constructor",
    "producers",
    "quietly",
    "run_compiled",
    "safely",
    "standardized",
    "tensorflow_data",
    "told",
    "unsafely",
    "untraced",
]

_COMPUTING = {"__call__", "call", "convolution_op", "kernel", "quantized_call"}
_NARROWED: dict[str, str] = dtypes.BIT64_TO_BIT32_DTYPE
_NAMES = "object_name_uids"


def graph_of(operation: Any) -> Any | None:
    """Return the functional graph that a model computes; ``None`` where it computes in another way, or is no model."""
    if isinstance(operation, keras.Sequential):
        return None if _computes_itself(operation, keras.Sequential) else operation._functional
    if isinstance(operation, Functional):
        return None if _computes_itself(operation, Functional) else operation
    return None


def found_class(layer: Any) -> type | None:
    """Return the class of Keras that decides what a layer computes; ``None`` where a subclass or the object itself does.

    Our own batch normalization layer does in evaluation what Keras's does.
    """
    if type(layer) is BatchNormalization and not _COMPUTING & set(vars(layer)):
        return keras.layers.BatchNormalization  # type: ignore[no-any-return]
    for known in type(layer).__mro__:
        if known.__module__.startswith("keras.src."):
            return None if _computes_itself(layer, known) else known
    return None


def _computes_itself(layer: Any, known: type) -> bool:
    below = type(layer).__mro__[: type(layer).__mro__.index(known)]
    # a kernel may be an attribute of the layer, or a property of its class
    return bool((_COMPUTING - {"kernel"}) & set(vars(layer)) or any(_COMPUTING & set(vars(cls)) for cls in below))


def calls(graph: Any) -> Iterator[Any]:
    """Yield the calls of a functional graph, each after those whose outputs it reads."""
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.operation is not None and not node.is_input:
                yield node


def named(model: Any, name: str) -> Any:
    """Return the layer of a model that has a name."""
    graph: Any = graph_of(model)
    return next(operation for operation in graph.operations if operation.name == name)


def parts(layer: Any) -> list[Any]:
    """Return a layer and all layers inside of it; those of a ``keras.Function``, which is no layer."""
    if isinstance(layer, keras.layers.Layer):
        return list(layer._flatten_layers())
    return [part for inner in getattr(layer, "operations", ()) for part in parts(inner)]


def own_variables(layer: Any) -> list[Any]:
    """Return the weights that a layer holds itself, without those of layers inside of it."""
    found = (*layer._trainable_variables, *layer._non_trainable_variables)
    return list({id(variable): variable for variable in found}.values())


def standardized(graph: Any, inputs: Any) -> list[Any]:
    """Return what a functional graph makes of its inputs first: tensors, in its order, dtypes and ranks."""
    return list(graph._standardize_inputs(inputs))


def copied_operation(operation: Any) -> Any:
    """Return a copy of an operation of ``keras.ops``, with its name, that was not called yet."""
    copy = object.__new__(type(operation))
    copy.__dict__.update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return copy


def producers(layer: Any) -> set[Any]:
    """Return the operations whose outputs a layer was called with, in any functional graph."""
    tensors = [tensor for node in layer._inbound_nodes for tensor in node.input_tensors]
    return {history.operation for tensor in tensors if (history := getattr(tensor, "_keras_history", None)) is not None}


def plain_constructor(model: Any) -> bool:
    """Whether the class of a model is made as a functional or Sequential model is."""
    known = keras.Sequential if isinstance(model, keras.Sequential) else Functional
    below = type(model).__mro__[: type(model).__mro__.index(known)]
    return not any({"__init__", "__new__"} & set(vars(cls)) for cls in below)


# -- optimizers, and what is compiled ------------------------------------------------------------------------------


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that do the work of one that holds others, or the one itself."""
    if hasattr(optimizer, "_inner_optimizers"):
        return list(optimizer._inner_optimizers)
    inner = getattr(optimizer, "inner_optimizer", None)
    return [optimizer] if inner is None else inner_optimizers(inner)


def optimizer_of(optimizer: Any, variable: Any) -> Any:
    """Return which of the optimizers inside of one moves a variable."""
    if hasattr(optimizer, "_optimizer_map"):
        return optimizer._optimizer_map(variable)
    return inner_optimizers(optimizer)[0]


def excluded(optimizer: Any, variable: Any) -> bool:
    """Whether a variable was excluded from weight decay; Keras's own answer would be kept in the optimizer."""
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    by_name = pattern is not None and re.search(pattern, variable.name) is not None
    return by_name or optimizer._var_key(variable) in getattr(optimizer, "_exclude_from_weight_decay", ())


def leave_out(optimizer: Any, variables: list[Any]) -> None:
    """Exclude variables from weight decay, beside those that are excluded: Keras forgets these."""
    before = set(getattr(optimizer, "_exclude_from_weight_decay", ()))
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    optimizer.exclude_from_weight_decay(var_list=variables)
    optimizer._exclude_from_weight_decay = before | set(optimizer._exclude_from_weight_decay)
    optimizer._exclude_from_weight_decay_pattern = pattern


def run_compiled() -> bool:
    """Whether steps are compiled on this backend: what a layer or optimizer held then goes on in them."""
    return bool(keras.backend.backend() != "torch")


def forget_compiled(model: Any) -> None:
    """Let the next ``fit``, ``evaluate`` and ``predict`` compile their steps anew."""
    for step in ("train_function", "test_function", "predict_function"):
        if getattr(model, step, None) is not None:
            setattr(model, step, None)


# -- running without a trace ---------------------------------------------------------------------------------------


def as_array(x: Any) -> np.ndarray:
    """Return an array of any kind as one of NumPy."""
    if hasattr(x, "detach"):
        # Keras does it in a way that NumPy 2 warns of
        x = x.detach().cpu()
        return np.asarray(x.float().numpy() if str(x.dtype) == "torch.bfloat16" else x.numpy())
    return np.asarray(keras.ops.convert_to_numpy(x))


def tensorflow_data(data: Any) -> Any | None:
    """Return ``tf.data`` where ``data`` is a data set of it; ``None`` for anything else."""
    # who holds one has imported TensorFlow
    known = getattr(sys.modules.get("tensorflow"), "data", None)
    return known if known is not None and isinstance(data, known.Dataset) else None


def told(error: Exception) -> str:
    """Return the first line of what an error says; behind what Keras puts before it."""
    lines = [line for line in re.sub(r"\x1b\[\d*m", "", str(error)).strip().split("\n") if line.strip()] or [""]
    wrapped = lines[0].startswith("Exception encountered when calling") and len(lines) > 1
    return " ".join(lines[: 2 if wrapped else 1])[:300]


@contextmanager
def quietly() -> Iterator[None]:
    """Let Keras call what NumPy 2 warns of, and say nothing about a model that it has said when the model was made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        warnings.filterwarnings("ignore", message="The structure of `inputs` doesn't match")
        warnings.filterwarnings("ignore", message="Explicitly requested dtype float64")
        warnings.filterwarnings("ignore", message="When providing `inputs` as a dict")
        warnings.filterwarnings("ignore", message=r"Layer '.*' \(of type .*\) was passed an input with a mask")
        yield


@contextmanager
def untraced() -> Iterator[None]:
    """Run layers without gradients and without a change of any of their variables."""
    with ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            stack.enter_context(torch.no_grad())
        stack.enter_context(quietly())
        stack.enter_context(keras.StatelessScope(collect_losses=True))
        yield


@contextmanager
def leaving_names() -> Iterator[None]:
    """Make layers without a change of the counters that name layers, or of the random numbers of the process."""
    names = dict(global_state.get_global_attribute(_NAMES) or {})
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        counters = global_state.get_global_attribute(_NAMES)
        if counters is not None:
            counters.clear()
            counters.update(names)
        random.setstate(states[0])
        np.random.set_state(states[1])


def fresh_names() -> None:
    """Let the next layers be named as the first ones of a process; inside of `leaving_names` or `leaving_random`."""
    counters = global_state.get_global_attribute(_NAMES)
    if counters is not None:
        counters.clear()


@contextmanager
def leaving_random() -> Iterator[None]:
    """Train a copy of a model without a change of the random numbers of the process."""
    with ExitStack() as stack:
        stack.enter_context(leaving_names())
        if keras.backend.backend() == "torch":
            import torch

            stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def in_float64(wanted: bool) -> Iterator[None]:
    """Compute in float64 where it is wanted.

    But for TensorFlow, Keras narrows the result of every operation to float32 whatever its inputs are, by a table; and JAX has
    float64 only where it is switched on.
    """
    with ExitStack() as stack:
        if wanted and keras.backend.backend() == "jax":
            import jax

            library: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
            stack.enter_context(library.enable_x64(True))
        narrowed = _NARROWED["float64"]
        try:
            if wanted:
                _NARROWED["float64"] = "float64"
            yield
        finally:
            _NARROWED["float64"] = narrowed


def safely() -> Any:
    """Return a scope in which nothing that a file brings along is executed, whatever the process has allowed."""
    return SafeModeScope(True)


def unsafely() -> Any:
    """Return a scope in which functions of a model that is there already may be copied."""
    return SafeModeScope(False)
