"""Every rule has its paragraph: why, how it is found, the cure, the source."""

import re
from pathlib import Path

import pytest

from batchnorm.check import RULES

PAGE = (Path(__file__).parents[1] / "docs" / "check.md").read_text(encoding="utf-8")
PARAGRAPHS = {
    code: (title, text) for code, title, text in re.findall(r"^#### (BN\d{3}) (.+)\n\n((?:.+\n|\n(?!#))+)", PAGE, re.M)
}


@pytest.mark.parametrize("code", sorted(RULES))
def test_a_rule_has_its_paragraph(code):
    title, text = PARAGRAPHS[code]
    assert title == RULES[code].title
    assert "*Cure*:" in text


def test_no_paragraph_is_about_a_rule_that_is_gone():
    assert set(PARAGRAPHS) == set(RULES)
