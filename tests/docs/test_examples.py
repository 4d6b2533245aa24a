"""The examples in the pages run as they stand, in a folder where ``model.gguf`` is the real model.

A fenced block counts by its language: ``python`` blocks of a page share their names; ``toml title="x"`` becomes the
file x; in ``console`` blocks each ``$ mortice …`` is run and prints what follows it. There ``…`` stands for anything,
runs of blanks are equal, and standard error and output come in the order they were written.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

from mortice.core.cli.main import main
from mortice.core.stages import open_file
from tests.support.hf_folders import write_folder
from tests.support.models import smollm2_path
from tests.support.tiny import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "docs/how-to/add-a-loader.md",
    "docs/how-to/add-an-architecture.md",
    "docs/how-to/add-an-executor.md",
    "docs/how-to/add-an-upload-strategy.md",
    "docs/how-to/derive-a-contract.md",
    "docs/how-to/measure-speed.md",
    "docs/how-to/reproduce-a-run.md",
    "docs/how-to/run-a-hugging-face-folder.md",
    "docs/how-to/run-from-a-config.md",
    "docs/how-to/run-many-prompts.md",
    "docs/how-to/test-a-plugin.md",
    "docs/how-to/validate-before-deployment.md",
    "docs/reference/cli.md",
    "docs/reference/hooks.md",
    "docs/reference/python-api.md",
]
RUN_AS_PACKAGES = ["docs/how-to/write-a-plugin.md", "docs/tutorial/first-plugin.md"]
"""Pages whose files are a package, which tests elsewhere install and run."""
RUN = ("python", "toml", "console")
HF_FOLDER = "SmolLM2-135M-Instruct"
"""The model as a folder, where a page speaks of it."""
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@frozen
class Block:
    """A fenced block."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page that can be run, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        if match[1] in RUN:
            yield Block(match[1], match[2] or "", match[3], text.count("\n", 0, match.start()) + 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, as the working directory."""
    (tmp_path / "model.gguf").symlink_to(smollm2_path())
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MORTICE_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    if f"run {HF_FOLDER} " in (ROOT / page).read_text(encoding="utf-8"):
        with open_file(REGISTRY, folder / "model.gguf") as file:
            write_folder(folder / HF_FOLDER, file, "BF16", shards=2)
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
        elif block.language == "toml" and block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "console":
            check_console(block.text, where)
    capsys.readouterr()


def check_console(text: str, where: str) -> None:
    """Run each command of a block and compare what it prints."""
    for match in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        program, *arguments = shlex.split(match[1])
        if program != "mortice":
            continue
        expected, printed = match[2].replace("…", "..."), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(arguments)
        assert code == (2 if "mortice: error" in expected else 0), f"{where}: {match[1]}: {printed.getvalue()}"
        same = doctest.OutputChecker().check_output(expected, printed.getvalue(), _FLAGS)
        assert same, f"{where}: {match[1]} printed\n{printed.getvalue()}\nand the page says\n{expected}"


def test_an_example_that_prints_something_else_is_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="the page says"):
        check_console("$ mortice --version\nno such version\n", "here")


def test_every_page_with_examples_is_run() -> None:
    pages = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
    found = {page for page in pages if any(block.language == "python" for block in blocks(page))}
    assert found - {*PAGES, *RUN_AS_PACKAGES} == set()


def test_every_page_but_the_readme_has_examples() -> None:
    assert [page for page in PAGES if page != "README.md" and not list(blocks(page))] == []
