"""What holds for the whole library: its names, what importing it costs, its errors, its docstrings."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import batchnorm as bn
import batchnorm.keras
import batchnorm.torch
from batchnorm import errors

NAMES = {
    "batchnorm": [
        "Affine",
        "BatchNormError",
        "Moments",
        "check",
        "compare",
        "fold",
        "functional",
        "observe",
        "prune",
        "recalibrate",
        "strip_bias",
        "summary",
        "transfer",
        "translate",
    ],
    "batchnorm.functional": [
        "Gradients",
        "Normalized",
        "Renorm",
        "batch_norm_backward",
        "batch_norm_example_inference",
        "batch_norm_inference",
        "batch_norm_inference_backward",
        "batch_norm_train",
        "batch_normalization",
        "batch_normalization_test",
        "batch_normalization_train",
        "ghost_batches",
        "moments",
        "update_running",
    ],
    "batchnorm.keras": ["BatchNormalization", "Monitor", "ScaleShift", "convert", "revert"],
    "batchnorm.torch": [
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "Monitor",
        "RenormSchedule",
        "accumulate",
        "add_domains",
        "convert",
        "domain",
        "explain",
        "force",
        "freeze",
        "keep_memory",
        "param_groups",
        "recompute",
        "revert",
        "sync",
        "unfreeze",
        "unsync",
    ],
}
PUBLIC = [(room, name) for room, names in NAMES.items() for name in names]

HEAVY = [
    "torch",
    "keras",
    "tensorflow",
    "jax",
    "flax",
    "onnx",
    "onnxruntime",
    "triton",
    "sklearn",
    "scipy",
    "matplotlib",
]


def fresh_python(code):
    """Run code in an interpreter of its own and return what it printed; on any error, the error."""
    source = str(Path(bn.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code):
    """Return which of the heavy packages are loaded after the code."""
    report = f"\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    return json.loads(fresh_python(code + report))


@pytest.mark.parametrize("room", ["functional", "keras", "torch"])
def test_the_public_names_of_a_room_are_these(room):
    module = getattr(batchnorm, room)
    public = [name for name, v in vars(module).items() if not name.startswith("_") and not isinstance(v, ModuleType)]
    assert sorted(public) == NAMES[f"batchnorm.{room}"]


def test_the_public_names_of_the_library_are_these():
    assert sorted(bn.__all__) == NAMES["batchnorm"]
    assert set(NAMES["batchnorm"]) <= set(dir(bn))


def test_an_unknown_name_is_answered_with_the_known_ones():
    text = "module 'batchnorm' has no attribute 'normalise'; it has Affine, BatchNormError, Moments, check, compare, "
    with pytest.raises(AttributeError, match=re.escape(text)):
        _ = bn.normalise
    assert not hasattr(bn, "normalise")


@pytest.mark.parametrize(
    "code",
    [
        "import batchnorm",
        "import batchnorm as bn; bn.Moments, bn.Affine, bn.BatchNormError",
        "import batchnorm as bn; bn.functional.batch_norm_train",
        "import batchnorm as bn; bn.summary",
        "import batchnorm as bn; dir(bn); hasattr(bn, 'nothing')",
        "import numpy as np, batchnorm as bn; bn.functional.batch_norm_train(np.ones((3, 2)))",
    ],
    ids=["import", "types", "definition", "summary", "dir", "a batch"],
)
def test_no_framework_is_loaded_before_it_is_needed(code):
    assert loaded_by(code) == []


@pytest.mark.parametrize("package", ["torch", "jax", "scipy"])
def test_the_check_above_sees_a_package_that_is_loaded(package):
    assert package in loaded_by(f"import batchnorm, {package}")


def test_the_check_above_sees_what_a_wing_loads():
    assert "torch" in loaded_by("import batchnorm.torch")


@pytest.mark.parametrize(
    "code",
    [
        "import batchnorm.summary",
        "import batchnorm.summary, batchnorm as bn; bn.summary",
        "from batchnorm.summary import summary",
        "import batchnorm as bn; bn.summary; import batchnorm.summary",
        "import importlib; importlib.import_module('batchnorm.summary')",
    ],
)
def test_importing_the_file_of_a_verb_leaves_the_verb(code):
    check = "\nimport batchnorm\nprint(type(batchnorm.summary).__name__, batchnorm.summary.__name__)"
    assert fresh_python(code + check) == "function summary\n"


STANDARD = {
    "ChannelError": RuntimeError,
    "OptionError": ValueError,
    "ShapeError": ValueError,
    "DataError": ValueError,
    "DistributedError": RuntimeError,
    "FusionError": RuntimeError,
    "OutputError": OSError,
    "KernelError": RuntimeError,
    "RecomputeError": RuntimeError,
    "NonFiniteError": ArithmeticError,
    "NotInvertibleError": ArithmeticError,
    "MissingDependencyError": ImportError,
    "TransformError": RuntimeError,
    "VerificationError": RuntimeError,
    "WorkerError": RuntimeError,
}


def test_every_error_is_listed_here_and_there():
    assert sorted(errors.__all__) == sorted([*STANDARD, "BatchNormError", "BatchNormWarning"])
    defined = [name for name, v in vars(errors).items() if inspect.isclass(v)]
    assert sorted(defined) == sorted(errors.__all__)


@pytest.mark.parametrize(("name", "standard"), STANDARD.items(), ids=STANDARD)
def test_every_error_is_caught_as_ours_and_as_the_standard_one(name, standard):
    error = getattr(errors, name)
    assert error.__bases__ == (bn.BatchNormError, standard)
    assert str(error("a sentence")) == "a sentence"
    assert error.__doc__.endswith(".")


def test_the_parent_of_all_errors_is_no_special_exception():
    assert errors.BatchNormError.__bases__ == (Exception,)


@pytest.mark.parametrize(("room", "name"), PUBLIC, ids=[f"{room}.{name}" for room, name in PUBLIC])
def test_every_public_name_shows_an_example(room, name):
    thing = getattr(bn if room == "batchnorm" else getattr(batchnorm, room.split(".")[1]), name)
    if isinstance(thing, ModuleType):
        assert thing.__doc__
        return
    # not inspect.getdoc, which would take the docstring of a base class
    documentation = inspect.cleandoc(thing.__doc__ or "")
    example = re.search(r"^Example:\n((?: {4}.*\n?|\n)+)", documentation, re.MULTILINE)
    assert example, f"{room}.{name} has no section 'Example:'"
    assert "    >>> " in example[1]
