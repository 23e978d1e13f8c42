"""Keras models with statistics that are no initial ones, and the judge of folding them: Keras itself in float64."""

import contextlib
import json
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers as L  # noqa: N812
from keras.src.backend.common import dtypes as keras_dtypes

from batchnorm.fold import fold
from batchnorm.keras import ScaleShift

BN = L.BatchNormalization
BACKEND = keras.backend.backend()


@contextlib.contextmanager
def wide():
    """Keras narrows every result to float32, by a table; here it does not."""
    before, floatx = keras_dtypes.BIT64_TO_BIT32_DTYPE["float64"], keras.config.floatx()
    keras_dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")
    try:
        if BACKEND == "jax":
            import jax

            with jax.enable_x64(True):
                yield
        else:
            yield
    finally:
        keras_dtypes.BIT64_TO_BIT32_DTYPE["float64"] = before
        keras.config.set_floatx(floatx)


def widened(model):
    """Return a float64 copy: what Keras makes of the model's own config, with another dtype written into it."""
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)).replace('"float32"', '"float64"'))
    config.pop("compile_config", None)
    customs = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
    with wide():
        copy = keras.saving.deserialize_keras_object(config, custom_objects=customs)
        assert len(copy.weights) == len(model.weights)
        for old, new in zip(model.weights, copy.weights, strict=True):
            assert tuple(old.shape) == tuple(new.shape)
            new.assign(numbers(old).astype("float64"))
    return copy


def numbers(variable):
    value = getattr(variable, "value", variable)
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def run(model, inputs):
    return [numbers(y) for y in keras.tree.flatten(model(inputs, training=False))]


def apart(expected, actual):
    assert [e.shape for e in expected] == [a.shape for a in actual]
    pairs = [(e.astype("float64"), a.astype("float64")) for e, a in zip(expected, actual, strict=True)]
    return max(float(np.abs(a - e).max() / max(np.abs(e).max(), 1e-300)) for e, a in pairs)


def norms_in(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, BN)]


def example_for(model, seed=1):
    rng = np.random.default_rng(seed)

    def draw(x):
        return rng.standard_normal((2, *(n or 7 for n in x.shape[1:]))).astype("float32")

    return draw(model.inputs[0]) if isinstance(model, keras.Sequential) else keras.tree.map_structure(draw, model.input)


def folded(model, x=None, **kwargs):
    """Fold, and hold the result against Keras in both dtypes: float64 to 1e-12, float32 to four times its own error."""
    x = example_for(model) if x is None else x
    result = fold(model, x, **kwargs)
    truth_model = widened(model)
    x64 = keras.tree.map_structure(lambda v: v.astype("float64"), x)
    with wide():
        folded64 = fold(truth_model, x64).model
        truth = run(truth_model, x64)
        assert all(y.dtype == np.float64 for y in truth)
        assert apart(truth, run(folded64, x64)) <= 1e-12
    own = apart(truth, run(model, x))
    assert apart(truth, run(result.model, x)) <= 4 * own + 32 * 2.0**-23
    assert len(norms_in(result.model)) == sum(kept.became == "unchanged" for kept in result.kept)
    return result


def gone(model, into=None, how=None, x=None):
    """Fold a model of which every norm must go, and leave nothing."""
    result = folded(model, x)
    assert not result.kept, str(result)
    assert not any(isinstance(layer, ScaleShift) for layer in result.model._flatten_layers())
    if into is not None:
        assert [f.into for f in result.folded] == [tuple(names.split()) for names in into]
    if how is not None:
        assert {f.how for f in result.folded} == {how}
    return result


def kept(model, *words, x=None, became="scale and shift"):
    """Fold a model of which the only norm must stay, and return the result."""
    result = folded(model, x)
    assert not result.folded, str(result)
    (entry,) = result.kept
    assert entry.became == became
    for word in words:
        assert word in entry.reason, entry.reason
    return result


# -- models --------------------------------------------------------------------------------------------------------


def randomize(model, seed=0, positive=False):
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        for v in (*layer._trainable_variables, *layer._non_trainable_variables):
            shape = tuple(v.shape)
            if "int" in str(v.dtype):
                continue
            value = 0.5 * rng.standard_normal(shape)
            if v is getattr(layer, "moving_variance", None):
                value = rng.uniform(0.3, 2.0, shape)
            if v is getattr(layer, "gamma", None):
                value = rng.uniform(0.5, 1.5, shape)
                if not positive:
                    value *= rng.choice([-1.0, 1.0], shape)
                    value[..., :1] = 0.0
            v.assign(value.astype(str(v.dtype)))
    return model


def chain(shape, *stack, positive=False):
    return randomize(keras.Sequential([keras.Input(shape), *stack]), positive=positive)


def graph(inputs, outputs, positive=False, **kwargs):
    return randomize(keras.Model(inputs, outputs, **kwargs), positive=positive)
