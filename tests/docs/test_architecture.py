"""The life of a token names every module, and no page names a file that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.modules import (
    ARCHITECTURE_PAGE,
    ROOT,
    architecture_page,
    module_faults,
    modules,
    path_faults,
    sentence,
)

PAGE = ARCHITECTURE_PAGE.read_text(encoding="utf-8")
DOCS = ROOT / "docs"
# the examples and the tutorial speak of paths in packages of their own
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/index.md")),
    *(page for folder in ("design", "how-to", "reference") for page in sorted((DOCS / folder).glob("*.md"))),
]


def test_every_module_has_one_line() -> None:
    assert list(module_faults(PAGE)) == []


def test_the_lines_are_what_the_modules_say() -> None:
    assert architecture_page(PAGE) == PAGE, "run `python -m tests.docs.reference` from the project's folder"


def test_a_module_without_a_line_is_noticed() -> None:
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        row = next(line for line in PAGE.splitlines(keepends=True) if line.startswith(f"| `{name}` |"))
        assert list(module_faults(PAGE.replace(row, "", 1))) == [f"{name} has no row"]
        assert list(module_faults(PAGE + row)) == [f"{name} has 2 rows"]


def test_a_table_of_a_module_that_is_gone_is_noticed() -> None:
    with pytest.raises(ValueError, match=r"no module is called core/gone\.py"):
        architecture_page("<!-- modules: core/errors.py core/gone.py -->\n<!-- end of modules -->")


@pytest.mark.parametrize(("name", "text"), [("plain.py", "import os\n"), ("kernel.cu", "#include <x>\n")])
def test_a_module_that_does_not_say_what_it_is_for_is_noticed(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: does not begin with what it is for"):
        sentence(tmp_path / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert list(path_faults(page.read_text(encoding="utf-8"))) == []


def test_a_path_that_leads_nowhere_is_noticed() -> None:
    text = "`core/errors.py`, `plugins/qtypes/`, `lowering.py`; but `core/gone.py`, `plugins/gone/` and `gone.cuh`"
    assert list(path_faults(text)) == [
        "core/gone.py does not exist",
        "plugins/gone/ does not exist",
        "gone.cuh does not exist",
    ]
