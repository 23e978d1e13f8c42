"""The report in a real browser, in light and dark: it renders, says nothing on the console, asks nothing of a network."""

import numpy as np
import polars as pl
import pytest

import batchnorm as bn
from batchnorm.lab.arms import Arm
from browser import chromium

HOSTILE = "<script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)> & “q\" 'r"


@pytest.fixture(scope="module")
def window():
    with chromium() as window:
        yield window


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A comparison whose every user-supplied name attacks the page."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"a": rng.normal(size=200), "b": rng.normal(size=200), "c": ["<b>x</b>", "<i>y</i>"] * 100})
    path = folder / "<img src=x onerror=alert(3)>.csv"
    table.write_csv(path)
    arms = [Arm(HOSTILE), Arm("$x^2$</svg><h1 id='broken'>", norm="batch")]
    options = {"learning_rates": [0.1], "seeds": 6, "steps": 20, "jobs": 1, "batch_size": 16}
    return bn.compare(path, target="c", arms=arms, out=folder / "out", **options)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["small", "hostile"])
def test_it_renders_and_keeps_to_itself(window, request, which, scheme):
    found = request.getfixturevalue(which)
    file = found.out / "report.html"
    page = window.open(file, scheme, wait_until="networkidle")
    assert window.said == []
    assert window.foreign(file) == []
    assert [page.locator(f"#{figure} svg").count() for figure in ("curves", "rates", "differences", "activations")] == [
        1
    ] * 4
    for box in (page.locator(f"#{figure} svg").bounding_box() for figure in ("curves", "rates")):
        assert box["width"] > 400
        assert box["height"] > 150
    assert page.locator("#broken").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_light_and_dark_can_be_read(window, small):
    """Contrast of text and of every line colour against the paper, by the formula of WCAG 2.2."""
    for scheme in ("light", "dark"):
        page = window.open(small.out / "report.html", scheme)
        names = ["ink", "quiet", "mark", *(f"arm{i}" for i in range(8))]
        value = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
        paper = page.evaluate(f"({value})('paper')")
        for name in names:
            contrast = _contrast(page.evaluate(f"({value})('{name}')"), paper)
            assert contrast >= (4.5 if name in ("ink", "quiet") else 3.0), (scheme, name, contrast)


def test_it_says_what_was_found(window, small):
    page = window.open(small.out / "report.html")
    answer = page.locator("#answer").inner_text()
    assert f"The best network is “{small.best.task.arm.name}”" in answer
    assert all(str(verdict) in answer for verdict in small.verdicts)
    assert page.locator("#arms tbody tr").count() == 3
    assert "batchnorm compare digits" in page.locator("#command").inner_text()
    assert "BatchNorm1d" in page.locator("#summary").inner_text() or small.best.task.arm.norm != "batch"


def test_user_supplied_names_are_shown_as_they_are(window, hostile):
    page = window.open(hostile.out / "report.html")
    assert HOSTILE in page.locator("#arms").inner_text()
    assert "<img src=x onerror=alert(3)>.csv" in page.locator("h1").inner_text()
    drawn = page.locator("#rates svg").text_content()
    assert f"{HOSTILE[:17]}…" in drawn
    assert "$x^2$</svg><h1 id…" in drawn


def _contrast(one, other):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
