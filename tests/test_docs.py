"""What the documentation shows is run: code blocks, doctests, command lines, names of targets and of public things."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import batchnorm
import batchnorm.lab
import batchnorm.torch
from batchnorm import cli, errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


def name_of(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=map(name_of, PAGES))
pages_with_code = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


# NumPy 2 says it whenever Keras makes an array of a torch tensor
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("page", pages_with_code, ids=map(name_of, pages_with_code))
def test_the_code_of_a_page_runs_and_prints_what_is_shown(page, elsewhere):
    run_blocks(page)


def test_the_pages_of_the_documentation_are_found():
    assert {"README.md", "docs/index.md", "docs/compare.md"} <= set(map(name_of, PAGES))
    assert ROOT / "README.md" in pages_with_code


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("```python\nprint(1)\n```\n\n```output\n2\n```\n", "line 6: shows\n2\n\nbut prints\n1"),
        ('=== "tab"\n\n    ```python\n    import absent_module\n    ```\n', "absent_module"),
    ],
    ids=["an error", "another output", "an error in a tab"],
)
def test_the_check_above_sees(text, said, elsewhere):
    page = elsewhere / "page.md"
    page.write_text(text)
    with pytest.raises(Exception, match=re.escape(said)):
        run_blocks(page)


MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(batchnorm.__path__, "batchnorm.")
    if not found.name.endswith("__main__")
]


@pytest.mark.parametrize("module", [batchnorm, *MODULES], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_print_what_they_show(module, elsewhere):
    assert doctest.testmod(module).failed == 0, "see the captured output"


def test_the_doctests_are_found_and_a_wrong_one_fails():
    tried = {module.__name__: len(doctest.DocTestFinder(exclude_empty=True).find(module)) for module in MODULES}
    assert {"batchnorm.moments", "batchnorm.torch.layers", "batchnorm.lab.compare"} <= tried.keys()
    assert sum(tried.values()) > 20
    module = ModuleType("with_a_wrong_example", doc=">>> 1 + 1\n3\n")
    with contextlib.redirect_stdout(io.StringIO()):
        assert doctest.testmod(module).failed == 1


def shell_lines(page):
    """Return the commands of a page's shell blocks, continued lines joined."""
    text = "\n".join(block.text for block in blocks_of(page) if block.language in ("sh", "bash", "console"))
    return [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]


COMMANDS = [(page, line) for page in PAGES for line in shell_lines(page) if line.startswith("batchnorm ")]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{name_of(page)}: {line}" for page, line in COMMANDS])
def test_a_command_line_that_is_shown_is_one(page, line):
    words = shlex.split(line, comments=True)[1:]
    if words == ["--version"] or "--help" in words:
        return
    assert callable(cli._parser().parse_args(words).run)


def test_command_lines_are_found_and_a_wrong_one_is_refused(capsys):
    assert len(COMMANDS) > 5
    with pytest.raises(SystemExit):
        cli._parser().parse_args(shlex.split("compare digits --sedes 3"))
    assert "--sedes" in capsys.readouterr().err


@every_page
def test_every_target_of_make_that_is_named_exists(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"compare", "test"} <= targets
    inline = re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
    shown = [
        word for line in shell_lines(page) if line.startswith("make ") for word in shlex.split(line, comments=True)[1:]
    ]
    assert {word for word in [*inline, *shown] if "=" not in word} <= targets


@every_page
def test_no_page_loads_anything_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*https?://", text)
    assert not re.findall(r"!\[[^\]]*\]\(https?://", text)


def test_the_site_loads_nothing_from_elsewhere():
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in configuration
    assert "http" not in re.sub(r"^ *#.*$", "", configuration, flags=re.MULTILINE)


def test_the_page_on_architecture_names_every_room_of_the_contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = [c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    rooms = {room for contract in contracts for layer in contract["layers"] for room in re.findall(r"\w+", layer)}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "moments" in rooms
    assert rooms <= set(re.findall(r"`(\w+)`", page))


PUBLIC = {
    "batchnorm": batchnorm.__all__,
    "batchnorm.lab": batchnorm.lab.__all__,
    "batchnorm.errors": errors.__all__,
    "batchnorm.torch": [name for name in vars(batchnorm.torch) if name.startswith("BatchNorm")],
    "batchnorm.functional": [
        name
        for name, v in vars(batchnorm.functional).items()
        if not name.startswith("_") and not isinstance(v, ModuleType)
    ],
}


@pytest.mark.parametrize("room", PUBLIC)
def test_every_public_name_has_its_place_in_the_reference(room):
    shown = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").rglob("*.md"))
    documented = set(re.findall(r"^::: [\w.]*?(\w+)$", shown, re.MULTILINE))
    assert set(PUBLIC[room]) - documented == {"functional"} & set(PUBLIC[room])
