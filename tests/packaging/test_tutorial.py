"""The tutorial as a newcomer follows it: every command and every file of it, in a fresh environment."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.packaging.running import ROOT, clean_environment, run

PAGE = ROOT / "docs" / "tutorial" / "first-plugin.md"
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)

pytestmark = pytest.mark.slow


def steps(text: str) -> Iterator[tuple[str, str, str]]:
    """What a reader does, in order: ("run", command, what it prints) and ("write", file, content)."""
    for language, title, body in _BLOCK.findall(text):
        if title:
            yield "write", title, body
        elif language == "console":
            yield from (("run", command, expected) for command, expected in _COMMAND.findall(body))
        else:
            raise AssertionError(f"a block of {language} without a title is never run:\n{body}")


class Reader:
    """Someone at a shell; `cd` lasts."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        offline = {"PIP_NO_BUILD_ISOLATION": "0"}  # which, for pip, means: no isolation; nothing is fetched
        self.environment = clean_environment({**offline, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"})

    def run(self, command: str, expected: str) -> None:
        """Run a command; what it prints has to be what the page says."""
        if command.startswith("cd "):
            self.folder /= command.removeprefix("cd ")
            assert self.folder.is_dir()
            return
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == (2 if "\nfailed: " in f"\n{expected}" else 0), f"$ {command}\n{done.stdout}"
        wanted = expected.replace("…", "...")
        same = doctest.OutputChecker().check_output(wanted, done.stdout, _FLAGS)
        assert same or not wanted, f"$ {command} printed\n{done.stdout}\nand the page says\n{expected}"

    def write(self, file: str, content: str) -> None:
        """Write a file of the page."""
        (self.folder / file).write_text(content, encoding="utf-8")


def test_a_newcomer_gets_through_the_tutorial(wheel: Path, new_venv: Callable[[str], Path], tmp_path: Path) -> None:
    python = new_venv("newcomer")
    run([python, "-m", "pip", "install", "--no-deps", wheel], cwd=tmp_path)
    reader = Reader(tmp_path, python)
    done = list(steps(PAGE.read_text(encoding="utf-8")))
    assert len(done) > 12
    for kind, what, text in done:
        getattr(reader, kind)(what, text)
