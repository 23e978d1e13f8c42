"""Swap the batch normalization of a whole model: Keras's layers for ours, and back, in a new model."""

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from batchnorm.errors import BatchNormWarning, OptionError
from batchnorm.keras import options
from batchnorm.keras.internals import graph_of
from batchnorm.keras.naming import names_of, norms_of
from batchnorm.keras.normalization import BatchNormalization
from batchnorm.keras.rebuilding import Edits, rebuilt

__all__ = ["convert", "revert"]

_KERAS = keras.layers.BatchNormalization
_NAMES = {"class_name", "module", "registered_name", "config"}


def convert(model: Any, **given: Any) -> Any:
    """Return a model with our layers in the places of Keras's ``BatchNormalization``.

    Names, weights, ``trainable`` flags and the structure of inputs and outputs are kept, and layers that are shared are shared
    again. The model itself stays as it is; the new one shares nothing with it and is not compiled. A subclass of Keras's layer
    is left as it is, with a warning.

    Args:
        model: Sequential or functional, built, with such models inside; or a single layer.
        given: options of every layer that is put in, as in `BatchNormalization`; layers that are ours already get them too.

    Returns:
        The new model.

    Raises:
        OptionError: a model that can't be seen through, a layer that can't be copied, or an option that a layer can't have.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
        >>> type(convert(model, virtual_batch_size=32).get_layer("norm")).__module__
        'batchnorm.keras.normalization'
    """
    unknown = sorted(set(given) - {*options.DEFAULTS, "synchronized"})
    if unknown:
        known = ", ".join((*options.DEFAULTS, "synchronized"))
        raise OptionError(f"unknown option {', '.join(unknown)}: what our layers have beside Keras's is {known}")

    def ours(cls: type, config: Any) -> Any:
        changed = {**config, **given} if cls in (_KERAS, BatchNormalization) else config
        return _inside(changed, "BatchNormalization", BatchNormalization, given)

    norms = _seen(model)
    for layer, name in norms.items():
        if type(layer) in (_KERAS, BatchNormalization):
            _try(name, layer, given)
        else:
            warnings.warn(
                f"layer {name!r} is a {type(layer).__name__}, with a class of its own: it was left as it is",
                BatchNormWarning,
                stacklevel=2,
            )
    return _swapped(model, Edits(configs=ours, classes={_KERAS: BatchNormalization}), norms)


def revert(model: Any) -> Any:
    """Return a model with Keras's ``BatchNormalization`` in the places of our layers; the reverse of `convert`.

    Args:
        model: as in `convert`.

    Returns:
        The new model. Its files are read without this library.

    Raises:
        OptionError: a layer has an option that Keras's can't have, or the model can't be seen through.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((3,)), BatchNormalization(name="norm")])
        >>> type(revert(model).get_layer("norm")).__module__
        'keras.src.layers.normalization.batch_normalization'
    """
    norms = _seen(model)
    for layer, name in norms.items():
        if isinstance(layer, BatchNormalization):
            _check_reversible(name, layer)

    def keras_own(cls: type, config: Any) -> Any:
        return _inside(config, "batchnorm>BatchNormalization", _KERAS, {})

    return _swapped(model, Edits(configs=keras_own, classes={BatchNormalization: _KERAS}), norms)


def _seen(model: Any) -> dict[Any, str]:
    """Return the batch normalization layers of a model that can be built again.

    Raises:
        OptionError: it can't.
    """
    if graph_of(model) is None and not isinstance(model, _KERAS):
        raise OptionError(
            f"the model must be Sequential or functional, and built, so that it can be made again with other layers, got a "
            f"{type(model).__name__}: put the layers of a subclassed model in by hand, batchnorm.keras.BatchNormalization "
            "takes the same arguments"
        )
    return {model: model.name} if isinstance(model, _KERAS) else norms_of(model)


def _swapped(model: Any, edits: Edits, norms: Mapping[Any, str]) -> Any:
    if not isinstance(model, _KERAS):
        new = rebuilt(model, edits)
        left = [name for layer, name in names_of(new).items() if type(layer) in edits.classes]
        if left:
            raise OptionError(
                f"layer {left[0]!r} is made by the class of the layer around it, which can't be seen through: change it there"
            )
        return new
    assert edits.configs is not None  # noqa: S101 - both callers give them
    cls: Any = edits.classes.get(type(model), type(model))
    layer = cls.from_config(edits.configs(type(model), model.get_config()))
    if model.built:
        layer.build_from_config(model.get_build_config())
        store: dict[str, Any] = {}
        model.save_own_variables(store)
        layer.load_own_variables(store)
    return layer


def _inside(config: Any, name: str, cls: type, given: Mapping[str, Any]) -> Any:
    """Return a config in which layers inside of the layer are of another class."""
    if isinstance(config, list | tuple):
        return type(config)(_inside(v, name, cls, given) for v in config)
    if not isinstance(config, dict):
        return config
    if set(config) >= _NAMES and (config["registered_name"] or config["class_name"]) == name:
        inner = keras.saving.serialize_keras_object(cls(name="inner"))
        return {**config, **{key: inner[key] for key in _NAMES}, "config": {**config["config"], **given}}
    return {key: _inside(v, name, cls, given) for key, v in config.items()}


def _try(name: str, layer: Any, given: Mapping[str, Any]) -> None:
    try:
        options.check({**vars(layer), **{key: getattr(layer, key, v) for key, v in options.DEFAULTS.items()}, **given})
    except OptionError as error:
        raise OptionError(f"layer {name!r}: {error}") from None


def _check_reversible(name: str, layer: Any) -> None:
    for option, v in options.changed(layer).items():
        raise OptionError(
            f"layer {name!r} has {option}={v!r}, which Keras's layer can't have: revert where every layer does what "
            "Keras's would"
        )
    if layer.synchronized and keras.backend.backend() != "tensorflow":
        raise OptionError(
            f"layer {name!r} has synchronized=True, which Keras's layer can't have on the backend {keras.backend.backend()}: "
            "set layer.synchronized = False first"
        )
