"""The page on TensorFlow is run where TensorFlow is Keras's backend; `tests/conftest.py` says why it is not, elsewhere."""

import pytest

from pages import ROOT, blocks_of, run_blocks

PAGE = ROOT / "docs" / "tensorflow.md"


# tensors are handed to NumPy, which says so
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_code_of_the_page_runs_and_prints_what_is_shown(elsewhere):
    assert sum(block.language == "python" for block in blocks_of(PAGE)) > 15
    run_blocks(PAGE)
