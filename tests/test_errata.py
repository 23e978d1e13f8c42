"""Each entry of the errata says what is said, what is right, and by which evidence."""

import re

import pytest

from pages import ROOT

TEXT = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def test_the_entries_are_found():
    assert len(ENTRIES) > 25


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_is_complete(entry):
    assert re.match(r"\n\*\*Often said\.\*\* .*?\n\n\*\*Right\.\*\* ", entry, re.DOTALL)
    assert re.search(r"\bShown\.\*|\*Paper:\s+arXiv:\d{4}\.\d{5}", entry)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_what_is_said_to_be_shown_is_shown(entry):
    blocks = re.findall(r"^```(\w+)", entry, re.MULTILINE)
    assert blocks == (["python", "output"] if "```" in entry else [])
    if re.search(r"\bShown\.\*", entry):
        assert blocks
