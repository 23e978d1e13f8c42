"""What every test shares: one thread, a seed for each test, and the list of hard inputs."""

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
