"""The tables of modules in ``docs/design/architecture.md``: each file with what it says of itself.

A table stands between ``<!-- modules: PATTERN … -->`` and ``<!-- end of modules -->``. Patterns are of paths from the
project's folder, and their order is that of the table. A file whose path is given in full stands only there; a pattern
with ``*`` takes what is left by then.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ARCHITECTURE_PAGE", "ROOT", "architecture_page", "module_faults", "modules", "path_faults", "sentence"]

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE_PAGE = ROOT / "docs" / "design" / "architecture.md"
_FOLDERS = ("core", "plugins", "arch_contracts")
_MARKED = re.compile(r"(<!-- modules:\s(.*?)\s-->\n).*?(<!-- end of modules -->)", re.DOTALL)
_PATH = re.compile(r"`((?:core|plugins|arch_contracts|tests|docs)/[\w./*-]*)`")
_FILE_NAME = re.compile(r"`(\w+\.(?:py|cuh?))`")


def modules() -> Iterator[Path]:
    """Every module of mortice and every kernel source, without what only marks a package."""
    for folder in _FOLDERS:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__init__.py")
    for pattern in ("executors/cuda/ops/*.cu", "executors/cuda/ops/*.cuh", "qtypes/*.cuh"):
        yield from sorted((ROOT / "plugins").glob(pattern))


def architecture_page(current: str) -> str:
    """The page with its tables renewed, the rest as it is."""
    named = {name for _, patterns, _ in _MARKED.findall(current) for name in patterns.split() if "*" not in name}
    left = {path for path in modules() if path.relative_to(ROOT).as_posix() not in named}
    return _MARKED.sub(lambda match: f"{match[1]}{_table(match[2].split(), left)}{match[3]}", current)


def _table(patterns: list[str], left: set[Path]) -> str:
    rows = ["", "| module | what it does |", "| --- | --- |"]
    for pattern in patterns:
        paths = [path for path in sorted(ROOT.glob(pattern)) if "*" not in pattern or path in left]
        left.difference_update(paths)
        if not paths:
            raise ValueError(f"{ARCHITECTURE_PAGE.name}: no module is called {pattern}")
        rows += [f"| `{path.relative_to(ROOT).as_posix()}` | {_escaped(sentence(path))} |" for path in paths]
    return "\n".join(rows) + "\n\n"


def sentence(path: Path) -> str:
    """What a file says of itself: a Python module's summary, or the first sentence of a CUDA source."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    else:
        comment = re.match(r"(?:// .*\n)*", text)
        lines = re.sub(r"^// ", "", comment[0] if comment else "", flags=re.MULTILINE)
        said = re.split(r"(?<=\.)\s(?=[A-Z])", lines)[0]
    said = " ".join(said.split())
    if not said:
        raise ValueError(f"{path}: does not begin with what it is for")
    return said.replace("``", "`")


def _escaped(text: str) -> str:
    """Markdown that shows the text as it is, code spans left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\[\]*_|])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )


def module_faults(page: str) -> Iterator[str]:
    """Modules that have no row in the page's tables, or several, and rows of what is no module."""
    listed = Counter(re.findall(r"^\| `([^`]+)` \| .{5,} \|$", page, re.MULTILINE))
    wanted = {path.relative_to(ROOT).as_posix() for path in modules()}
    yield from (f"{path} has no row" for path in sorted(wanted - set(listed)))
    yield from (f"{path} has {count} rows" for path, count in listed.items() if path in wanted and count > 1)


def path_faults(text: str) -> Iterator[str]:
    """Paths and names of files in code spans that lead nowhere."""
    for path in dict.fromkeys(_PATH.findall(text)):
        if not any(ROOT.glob(path.rstrip("/"))):
            yield f"{path} does not exist"
    names = {path.name for folder in _FOLDERS for path in (ROOT / folder).rglob("*.*")}
    yield from (f"{name} does not exist" for name in dict.fromkeys(_FILE_NAME.findall(text)) if name not in names)
