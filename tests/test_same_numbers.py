"""Four pages teach batch normalization on the same data: they must show the same numbers."""

import numpy as np
import pytest

from batchnorm import functional
from pages import ROOT, blocks_of

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("numpy", "pytorch", "keras", "tensorflow")]
MARK = "Same numbers: "
EVERYWHERE = {
    "statistics of the first batch",
    "the first batch, normalized",
    "the first batch, scaled and shifted",
    "running statistics after three batches",
    "running variance, unbiased",
    "one row in use",
    "statistics of all rows",
    "one row in use, statistics of all rows",
    "feature maps",
    "512 feature maps",
    "how many",
}
GRADIENTS = {"gradients of the first batch"}


def figures(page):
    """Return the marked output blocks of a page, by their titles."""
    marked = [b for b in blocks_of(page) if b.language == "output" and b.title.startswith(MARK)]
    return {block.title.removeprefix(MARK): block.text for block in marked}


def data_of(page):
    """Return the lines of a page that define the data."""
    code = "\n".join(block.text for block in blocks_of(page) if block.language == "python")
    return code[code.index("batches = [") : code.index("def show(")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_all_the_common_figures(page):
    # Keras has no word for gradients that holds on all its backends
    assert figures(page).keys() == EVERYWHERE | (GRADIENTS if page.stem != "keras" else set())


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_data_and_figures_are_those_of_the_page_on_numpy(page):
    first = figures(PAGES[0])
    assert data_of(page) == data_of(PAGES[0])
    for title, text in figures(page).items():
        assert text == first[title], title


def test_the_figures_are_those_of_the_definition():
    names = {"np": np}
    exec(data_of(PAGES[0]), names)
    x, gamma, beta = names["batches"][0].astype(float), names["gamma"], names["beta"]
    step = functional.batch_norm_train(x, gamma, beta, eps=names["eps"])
    shown = [line.split() for line in figures(PAGES[0])["the first batch, scaled and shifted"].splitlines()]
    assert np.allclose(np.array(shown, float), step.y, atol=6e-4)  # half of the last digit that is shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_lead_to_one_another(page):
    text = page.read_text(encoding="utf-8")
    assert all(f"({other.name})" in text for other in PAGES if other != page)
