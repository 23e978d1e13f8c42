"""What every test shares: one thread, a seed for each test, and the list of hard inputs."""

import importlib.util
import os
import random
import sys

# Keras takes TensorFlow where nobody says otherwise
os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

ON_TENSORFLOW = os.environ["KERAS_BACKEND"] == "tensorflow" and importlib.util.find_spec("tensorflow") is not None
collect_ignore = [] if ON_TENSORFLOW else ["backends/test_tensorflow_page.py"]


def pytest_report_header():
    """Say what this environment can't run."""
    if not ON_TENSORFLOW:
        return "docs/tensorflow.md: not run here, it needs KERAS_BACKEND=tensorflow and TensorFlow"
    return None


def pytest_report_header():
    backend = keras.backend.backend()
    return f"keras: {keras.__version__} on {backend} {sys.modules[backend].__version__}"


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def rng():
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
