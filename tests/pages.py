"""The pages of the documentation as tests see them: their blocks, and running what they show."""

import contextlib
import doctest
import io
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import keras

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: language, title, text, the number of its first line, and what follows it up to the next block."""

    language: str
    title: str
    text: str
    line: int


def blocks_of(page):
    """Return the fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    blocks = []
    for fence in FENCE.finditer(source):
        indent, language, options, body = fence.groups()
        title = re.search(r'title="([^"]+)"', options)
        text = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        blocks.append(Block(language, title[1] if title else "", text, source.count("\n", 0, fence.start(4)) + 1))
    return blocks


def run_blocks(page):
    """Run the python blocks of a page one after the other, and hold each to the block `output` that follows it.

    A block with a title is a file: it is written to the current folder and run from there.
    """
    # so that layers without a name are numbered from the first one
    keras.utils.clear_session()
    blocks, names = blocks_of(page), {"__name__": "__docs__"}
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as said:
            if block.title:
                Path(block.title).write_text(block.text, encoding="utf-8")
                runpy.run_path(block.title, run_name="__main__")
            else:
                # as many empty lines before it as the page has, so that a traceback names the page's line
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                exec(code, names)
        if following is not None and following.language == "output":
            assert_printed(following, said.getvalue(), page)


def assert_printed(block, said, page):
    if not doctest.OutputChecker().check_output(block.text, said, doctest.ELLIPSIS):
        raise AssertionError(f"{page.name}, line {block.line}: shows\n{block.text}\nbut prints\n{said}")
