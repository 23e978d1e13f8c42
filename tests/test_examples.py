"""Every script of ``examples/`` runs from any folder, says something, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_the_examples_are_found():
    assert "by_hand.py" in [example.name for example in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_runs_from_any_folder_and_leaves_nothing_behind(example, tmp_path):
    here, temporary = tmp_path / "here", tmp_path / "tmp"
    here.mkdir()
    temporary.mkdir()
    # what libraries leave of their own: torch a cache, onnxruntime an identifier for its reports
    libraries = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, example],
        cwd=here,
        env=os.environ | {"TMPDIR": str(temporary)} | libraries,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(here.iterdir()) == []
    assert list(temporary.iterdir()) == []
