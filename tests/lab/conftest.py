"""Small comparisons that several tests look at."""

import pytest

import batchnorm as bn

SMALL = {"learning_rates": [0.03, 0.3], "seeds": 2, "steps": 40, "jobs": 1}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A comparison of three arms on digits, small but whole."""
    out = tmp_path_factory.mktemp("small") / "out"
    return bn.compare("digits", out=out, **SMALL)
