"""The measurement of the Keras layer: tables are made of what was recorded, and a part runs on one backend."""

import keras
import pytest

from batchnorm.bench import keras as bench
from batchnorm.bench import keras_fit, keras_variance
from batchnorm.errors import OptionError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def test_variance_is_measured_and_ours_is_the_exact_one():
    found = keras_variance.measure(quick=True)
    for row in found["rows"]:
        (run,) = row["runs"]
        assert run["ours"]["variance"] <= 2 * run["two-pass"]["variance"]
    assert keras.backend.backend() == "torch"
    told = keras_variance.shown({"torch": {"ran": "torch 1, Keras 3", **found}})
    assert told.count("torch 1, Keras 3") == 12


def test_fit_is_told_in_ratios():
    seconds = {"Keras": [1.0, 2.0, 1.0], "ours": [1.1, 2.2, 1.1], "Keras again": [1.0, 2.0, 2.0]}
    one = {"ran": "jax 1", "clock": seconds, "processor": seconds, "accuracy": dict.fromkeys(seconds, 0.5)}
    told = keras_fit.shown({"jax": one})
    assert "1.100 (1.100 to 1.100)" in told
    assert "1.000 (1.000 to 1.500)" in told


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(OptionError, match="the parts of bench keras are variance, fit, applications, got speed"):
        bench.run(tmp_path, "speed")
