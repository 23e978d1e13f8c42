"""What every test shares: one thread, a seed for each test, and what is slow to make."""

import copy
import functools
import gc
import importlib.util
import os
import random
import sys
from importlib import metadata

import pytest

# Keras takes TensorFlow where nobody says otherwise
os.environ.setdefault("KERAS_BACKEND", "torch")

ON_TENSORFLOW = os.environ["KERAS_BACKEND"] == "tensorflow" and importlib.util.find_spec("tensorflow") is not None
collect_ignore = [] if ON_TENSORFLOW else ["backends/test_tensorflow_page.py"]


def pytest_configure(config):
    """Load the frameworks where tests run; a process that hands them out would wait for that."""
    if config.getoption("dist", "no") == "no":
        import keras  # noqa: F401
        import torch

        torch.set_num_threads(1)


def pytest_runtestloop():
    """Leave what is there before the first test out of each collection of garbage: a million objects, which all stay."""
    gc.collect()
    gc.freeze()


def pytest_report_header():
    """Say what runs, and what this environment can't run."""
    backend = os.environ["KERAS_BACKEND"]
    (distribution, *_) = metadata.packages_distributions()[backend]
    said = [f"keras: {metadata.version('keras')} on {backend} {metadata.version(distribution)}"]
    if not ON_TENSORFLOW:
        said.append("docs/tensorflow.md: not run here, it needs KERAS_BACKEND=tensorflow and TensorFlow")
    return said


@pytest.fixture(autouse=True)
def _seeded():
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _operators_are_read_once():
    """Keep the exporter's table: each export to ONNX reads the sources of 500 operators, most of its time."""
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    if exporter and "once" not in vars(exporter):
        exporter.once = functools.cache(exporter.ONNXRegistry.from_torchlib)

        def copied(*arguments, **options):
            table = copy.copy(exporter.once(*arguments, **options))
            table.functions = {operator: list(found) for operator, found in table.functions.items()}
            return table

        exporter.ONNXRegistry.from_torchlib = staticmethod(copied)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own to work in; modules that were imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
