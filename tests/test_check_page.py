"""The page of a check in a real browser: it renders, keeps to itself, can be read, and can be walked with the keyboard."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from batchnorm.check import drawings
from batchnorm.check.page import as_page
from batchnorm.check.report import Finding, Report
from browser import chromium
from check_reports import HOSTILE, Observation, healthy, hostile, names, observed, sick

DEEP = names([3, 8, 36, 3])
PAGES = {
    "small": (sick(), "small.onnx"),
    "deep": (sick(DEEP, kept=False), "nets:resnet152"),
    "healthy": (healthy(), "healthy.keras"),
    "problems": (replace(sick(kept=False), problems=("the loader must tell <b>sizes</b>.",), observation=None), "net.pt2"),
    "hostile": (hostile(), HOSTILE),
    "nothing": (Report(()), "bare.onnx"),
}  # fmt: skip
# text on paper or on a panel, and what is only drawn
TEXT, DRAWN = ("ink", "quiet", "mark", "error", "warning", "note"), ("data",)


@pytest.fixture(scope="module")
def window():
    with chromium() as window:
        yield window


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, (report, model) in PAGES.items():
        (folder / f"{name}.html").write_text(as_page(report, model, f"batchnorm check '{model}'"), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.fixture
def opened(window, files):
    """Opens a page; when it is left nothing was said on the console, and nothing was asked for."""
    shown = []

    def leave():
        for file in shown:
            assert window.said == []
            assert window.foreign(file) == []
        shown.clear()

    def open_page(name, scheme="light", width=1000):
        leave()
        shown.append(files[name])
        return window.open(files[name], scheme, width)

    yield open_page
    leave()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1000), ("dark", 400)])
def test_it_renders_and_fits(opened, name, scheme, width):
    page = opened(name, scheme, width)
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # headings go down one level at a time
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    targets = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href').slice(1))")
    assert set(targets) <= set(ids)


def test_the_verdict_is_a_sentence(opened):
    verdict = "main #answer strong"
    assert opened("small").locator(verdict).inner_text() == (
        "2 errors, 3 warnings and 1 note in 4 of 6 normalization layers and in the model as a whole."
    )
    assert opened("healthy").locator(verdict).inner_text() == "Nothing was found in 3 normalization layers."
    assert opened("nothing").locator(verdict).inner_text() == "Nothing was found in 0 normalization layers."
    problem = opened("problems")
    assert "1 thing that was given could not be used" in problem.locator("#answer").inner_text()
    assert "the loader must tell <b>sizes</b>." in problem.locator("#problems").inner_text()


def test_each_layer_has_a_cell_with_a_colour_and_a_sign(opened):
    page = opened("deep")
    cells = page.locator("#strip a.cell")
    assert cells.count() == len(DEEP) == 151
    labels = cells.evaluate_all("all => all.map(a => a.getAttribute('aria-label'))")
    assert labels[0] == "Layer 1, bn1: warning BN110"
    assert [label.split(", ")[1].split(":")[0] for label in labels] == DEEP
    signs = cells.evaluate_all("all => all.map(a => [a.className.split(' ')[1], a.innerText.trim()])")
    assert {tuple(pair) for pair in signs} == {("error", "✕"), ("warning", "!"), ("ok", "·")}
    # they are told apart by stage, and wrap
    assert page.locator("#strip .stage").all_inner_texts() == ["bn1", "layer1", "layer2", "layer3", "layer4"]
    boxes = cells.evaluate_all("all => all.map(a => a.getBoundingClientRect().right)")
    assert max(boxes) <= 1000


@pytest.mark.parametrize("name", ["small", "deep"])
def test_every_cell_is_reached_by_the_keyboard_and_enter_jumps(opened, name):
    page = opened(name)
    reached = []
    for _ in range(400):
        page.keyboard.press("Tab")
        where = page.evaluate("document.activeElement.closest('#strip') && document.activeElement.title")
        if where:
            reached.append(where)
        elif reached:
            break
    assert reached == list(PAGES[name][0].layers)
    for kind in ("error", "warning", "ok"):
        cell = page.locator(f"#strip a.cell.{kind}").last
        cell.focus()
        page.keyboard.press("Enter")
        target = cell.get_attribute("href")
        assert page.evaluate("location.hash") == target
        assert page.evaluate("'#' + document.activeElement.id") == target
        assert cell.get_attribute("title") in page.locator(target).inner_text()
        top = page.locator(target).evaluate("e => e.getBoundingClientRect().top")
        assert 0 <= top < 800


def test_a_click_jumps_to_the_worst_finding(opened):
    page = opened("small")
    page.locator("#strip a[title='block2.bn1']").click()
    assert "9.2 stored deviations off" in page.locator(":target").inner_text()
    page.locator("#gaps a").nth(4).click()
    assert "2.1 stored deviations off" in page.locator(":target").inner_text()


def test_findings_stand_by_rule_with_message_cure_and_numbers(opened):
    page = opened("small")
    titles = page.locator("article h3").all_inner_texts()
    assert [re.search(r"(error|warning|note) (BN\d+)", title).groups() for title in titles] == [
        ("error", "BN103"), ("warning", "BN110"), ("warning", "BN202"), ("note", "BN301"),
    ]  # fmt: skip
    first = page.locator("article").first
    assert "Cure: Recalibrate the model" in first.inner_text()
    assert first.locator("thead th").all_inner_texts() == [
        "Layer", "What was found", "largest shift", "largest variance ratio", "channels off",
    ]  # fmt: skip
    assert first.locator("tbody tr").first.locator("td.value").all_inner_texts() == ["9.2", "23", "12"]
    # said once, not once for each layer
    assert page.locator("article").nth(1).inner_text().count("the last batch alone") == 1
    assert page.locator("article").nth(1).locator("li").all_inner_texts() == ["stem.bn", "block1.bn1"]
    reasons = page.locator("#not-run").inner_text()
    assert "Needs a loader" in reasons
    assert "BN203 The last batch is small" in reasons
    assert "batchnorm check 'small.onnx'" in page.locator("#command").inner_text()


def test_what_the_data_has_shown_is_drawn(opened):
    page = opened("small")
    # the far ones, the sick ones, and no others of many
    shown = page.locator("#distributions section")
    assert "block2.bn1" in shown.all_inner_texts()[3]
    assert shown.count() == 6
    assert shown.nth(3).locator("svg").count() == 4
    for svg in shown.nth(3).locator("svg").all():
        box = svg.bounding_box()
        assert box["width"] > 150
        assert box["height"] > 120
    assert page.locator("#gaps svg .mark").count() == 6
    # a histogram only where inputs were kept
    assert page.locator("path.bars").count() == 18
    deep = opened("deep")
    assert deep.locator("#distributions section").count() == 3
    assert deep.locator("path.bars").count() == 0
    assert opened("problems").locator("#distributions").count() == 0


def test_light_and_dark_can_be_read(opened):
    """Contrast by the formula of WCAG 2.2, on the paper, on panels and in the cells."""
    for scheme in ("light", "dark"):
        page = opened("small", scheme)
        value = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
        for ground in ("paper", "panel"):
            behind = page.evaluate(f"({value})('{ground}')")
            for name in (*TEXT, *DRAWN):
                contrast = _contrast(_rgb(page.evaluate(f"({value})('{name}')")), _rgb(behind))
                assert contrast >= (4.5 if name in TEXT else 3.0), (scheme, ground, name, contrast)
        for kind in ("error", "warning"):
            ink, behind = page.locator(f"#strip .cell.{kind} .sign").first.evaluate(
                "e => [getComputedStyle(e).color, getComputedStyle(e.parentElement).backgroundColor]"
            )
            assert _contrast(_rgb(ink), _rgb(behind)) >= 4.5, (scheme, kind)


def test_names_that_attack_are_shown_as_they_are(opened):
    page = opened("hostile")
    assert page.locator("#broken").count() == 0
    assert page.locator("script").count() == 0
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("h1").inner_text()
    assert page.locator("#strip a.cell").first.get_attribute("title") == HOSTILE
    assert "a.{{ 7 * 7 }}" in page.locator("#strip").inner_text()
    assert HOSTILE in page.locator("#gaps title").first.text_content()
    for place in ("#problems", "#not-run", "#layers", "article"):
        assert HOSTILE in page.locator(place).first.inner_text()


def test_on_paper_nothing_is_cut_off(opened):
    page = opened("deep", width=720)
    page.emulate_media(media="print")
    for region in page.locator("div.scroll").all():
        assert region.evaluate("e => e.scrollHeight <= e.clientHeight + 1")
        assert region.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


EXTREMES = {
    "dead in the data": {"variance": np.zeros(4)},
    "dead in training": {"stored_variance": np.zeros(4)},
    "dead without ε": {"variance": np.zeros(4), "stored_variance": np.zeros(4), "eps": 0.0},
    "not finite": {"stored_mean": np.array([np.nan, np.inf, 0, 0])},
    "far away": {"mean": np.array([1e30, 0, 0, -1e-30])},
    "all alike": {},
    "tiny": {"variance": np.full(4, 1e-300), "eps": 1e-320},
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_statistics_are_drawn(extreme):
    one = observed("bn", np.random.default_rng(0), channels=4)
    one = replace(one, mean=one.stored_mean, variance=one.stored_variance)
    one = replace(one, **EXTREMES[extreme])
    report = Report((), (), (), ("bn", "bn2"), Observation((one, replace(one, layer="bn2"))))
    with np.errstate(all="ignore"):
        page = as_page(report, "net.onnx")
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    coordinates = re.findall(r'(?: (?:x|y|x1|x2|y1|y2|cx|cy)="|points="|d=")([^"]*)"', drawn)
    assert coordinates
    assert not any(re.search("nan|inf", text) for text in coordinates)


def test_one_layer_has_no_profile_and_thousands_of_channels_few_bytes():
    one = observed("bn", np.random.default_rng(0), channels=4096)
    page = as_page(Report((), (), (), ("bn",), Observation((one,))), "net.onnx")
    assert 'id="gaps"' not in page
    assert 'id="distributions"' in page
    assert len(page) < 80_000


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        (names([3, 4, 6, 3]), ["bn1", "layer1", "layer2", "layer3", "layer4"]),
        ([f"features.{i}.{k}" for i in range(5) for k in range(9)], [f"features.{i}" for i in range(5)]),
        ([f"bn_{i}" for i in range(60)], [""]),
        ([f"conv{i}_block{k}_bn" for i in (1, 2, 3) for k in range(6)], ["conv1", "conv2", "conv3"]),
        ([f"/stem/{i}/bn{k}/BatchNormalization" for i in (1, 2) for k in range(8)], ["/stem/1", "/stem/2"]),
        ([f"a.{i}" for i in range(8)], [""]),
    ],
    ids=["a resnet", "all in one part", "flat names", "Keras", "ONNX", "few"],
)
def test_stages_of_a_network(layers, stages):
    page = as_page(Report((), (), (), tuple(layers)), "net.onnx")
    assert re.findall(r'class="stage code">([^<]*)', page) == [stage for stage in stages if stage]


def test_numbers_and_names_are_short():
    assert [drawings.number(v) for v in (-0.00012345, 2048, 1234.5, 1e9, float("inf"), float("-inf"), float("nan"))] == [
        "−0.000123", "2,048", "1,234", "1e+09", "∞", "−∞", "not a number",
    ]  # fmt: skip
    assert drawings.short("layer1.0.bn1", 6) == "…0.bn1"


def test_a_finding_beside_the_norms_has_no_cell():
    report = Report((Finding("BN301", "conv", "It is.", "Strip it.", "note"),), (), (), ("bn",))
    page = as_page(report, "net.onnx")
    assert 'title="conv"' not in page
    assert '<li id="finding-0" class="code" tabindex="-1">conv</li>' in page
    assert "1 note in layers beside them." in page


def _rgb(color):
    if color.startswith("#"):
        return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    numbers = [float(v) for v in re.findall(r"[\d.]+", color.replace("srgb", ""))[:3]]
    return [v / 255 for v in numbers] if color.startswith("rgb") else numbers


def _contrast(one, other):
    def luminance(color):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
