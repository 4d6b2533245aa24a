"""Makes one text of a CUDA source and the headers it includes.

The text is the whole input of the compiler besides the toolkit's own headers, so that it can be the cache key; nothing
in it depends on where mortice is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from attrs import define, field, frozen

from mortice.plugins.executors.cuda.device.errors import CompileError

__all__ = ["Headers", "flatten"]

_DIRECTIVE = re.compile(r"\s*#\s*(\w+)(.*)")
_QUOTED = re.compile(r'\s*"([^"]+)"\s*$')
_TOKEN = re.compile(r"""//.*|/\*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")
_OPENS = {"if", "ifdef", "ifndef"}


@frozen
class _Line:
    """A line that is not passed on as it is: an include, or ``#pragma once``, where `included` is None.

    Attributes:
        number: from 1.
        word: of the directive.
        included: what stands behind ``include``.
        conditional: whether it stands under an ``#if``.
        shared: whether a comment of several lines begins, ends or goes on in it.

    """

    number: int
    word: str
    included: str | None
    conditional: bool
    shared: bool


def _resolved(folders: Iterable[Path]) -> list[Path]:
    return [folder.resolve() for folder in folders]


@define(eq=False)
class Headers:
    """Files as they were when first read: those that many sources include are read and looked through once.

    Attributes:
        roots: folders of headers.

    """

    roots: Sequence[Path] = field(converter=_resolved)
    _files: dict[Path, tuple[list[str], list[_Line]]] = field(factory=dict, init=False, repr=False)
    _real: dict[Path, Path | None] = field(factory=dict, init=False, repr=False)
    _names: dict[Path, str] = field(factory=dict, init=False, repr=False)
    _found: dict[tuple[Path, str], Path | None] = field(factory=dict, init=False, repr=False)

    def name(self, path: Path) -> str:
        """What a file is called, wherever it is installed."""
        known = self._names.get(path)
        if known is None:
            root = next((root for root in self.roots if path.is_relative_to(root)), path.parent.parent)
            known = self._names[path] = path.relative_to(root).as_posix()
        return known

    def lines(self, path: Path) -> tuple[list[str], list[_Line]]:
        """The lines of a file, and those of them that are not passed on as they are."""
        known = self._files.get(path)
        if known is None:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CompileError(f"{self.name(path)}: cannot be read as UTF-8 text: {error}") from error
            lines = text.removesuffix("\n").split("\n")
            known = self._files[path] = lines, list(_special(lines))
        return known

    def find(self, folder: Path, name: str) -> Path | None:
        """The file that an include of a file in `folder` means."""
        key = folder, name
        if key not in self._found:
            places = (self.real(root / name) for root in (folder, *self.roots))
            self._found[key] = next((path for path in places if path is not None), None)
        return self._found[key]

    def real(self, path: Path) -> Path | None:
        """What a file is called without links; None where there is none."""
        if path not in self._real:
            self._real[path] = path.resolve() if path.is_file() else None
        return self._real[path]

    def flatten(self, source: Path, before: Sequence[Path] = ()) -> str:
        """See the function of that name."""
        work = _Flattener(self)
        for path in [*before, source]:
            real = self.real(path)
            if real is None:
                raise CompileError(f"{path}: no such CUDA source")
            work.file(real)
        return "\n".join(work.lines) + "\n"


def flatten(source: Path, roots: Sequence[Path], *, before: Sequence[Path] = ()) -> str:
    """One text of a source file, with every quoted include put in its place.

    ``#include "x.cuh"`` is looked for beside the including file, then in each root. A file is put in once, where it
    is first included, whether it says ``#pragma once`` or not. Angle includes stay for the compiler. ``#line`` names
    each file by its path under the first root that holds it, else by its folder and name.

    Args:
        source: the file to compile.
        roots: folders of headers; they also name the files.
        before: files put in front, in order, as though the source began by including them.

    Returns:
        The text, lines ended by one newline each.

    Raises:
        CompileError: an include that is missing, circular, conditional or computed, or a file that is not UTF-8.

    """
    return Headers(roots).flatten(source, before)


@define(eq=False)
class _Flattener:
    headers: Headers
    lines: list[str] = field(factory=list)
    done: set[Path] = field(factory=set)
    open: list[Path] = field(factory=list)

    def file(self, path: Path) -> None:
        """Append a file, unless it is in already."""
        if path in self.done:
            return
        name = self.headers.name(path)
        lines, special = self.headers.lines(path)
        self.open.append(path)
        self.lines.append(f'#line 1 "{name}"')
        passed = 0
        for line in special:
            self.lines += lines[passed : line.number - 1]
            passed = line.number
            where = f"{name}:{line.number}"
            if line.shared:
                raise CompileError(f"{where}: #{line.word} shares its line with a comment of several lines")
            if line.included is None:
                self.lines.append("")  # the compiler would warn about it in the main file
            else:
                self.include(path, line.included, where, conditional=line.conditional)
                self.lines.append(f'#line {line.number + 1} "{name}"')
        self.lines += lines[passed:]
        self.open.pop()
        self.done.add(path)

    def include(self, path: Path, rest: str, where: str, *, conditional: bool) -> None:
        """Append what an include line names."""
        quoted = _QUOTED.match(rest)
        if quoted is None:
            raise CompileError(f"{where}: #include{rest}: only quoted and angle includes can be flattened")
        if conditional:
            raise CompileError(f'{where}: #include "{quoted[1]}" under #if: a file is put in once, include it always')
        found = self.headers.find(path.parent, quoted[1])
        if found is None:
            looked = ", ".join(map(str, (path.parent, *self.headers.roots)))
            raise CompileError(f'{where}: #include "{quoted[1]}" not found in {looked}')
        if found in self.open:
            chain = " -> ".join(self.headers.name(link) for link in [*self.open[self.open.index(found) :], found])
            raise CompileError(f"{where}: circular include: {chain}")
        self.file(found)


def _special(lines: Sequence[str]) -> Iterator[_Line]:
    """The lines of a file that are not passed on as they are."""
    in_comment, depth = False, 0
    for number, line in enumerate(lines, start=1):
        if not in_comment and "#" not in line and "/*" not in line:  # most lines
            continue
        began_in_comment = in_comment
        code, in_comment = _without_comments(line, in_comment)
        directive = _DIRECTIVE.match(code)
        word, rest = (directive[1], directive[2]) if directive else ("", "")
        depth += (word in _OPENS) - (word == "endif")
        once = word == "pragma" and rest.split() == ["once"]
        if once or (word == "include" and not rest.lstrip().startswith("<")):
            yield _Line(number, word, None if once else rest, depth > 0, in_comment or began_in_comment)


def _without_comments(line: str, in_comment: bool) -> tuple[str, bool]:
    """What of a line is code, and whether a block comment is open at its end."""
    code: list[str] = []
    position = 0
    while position < len(line):
        if in_comment:
            end = line.find("*/", position)
            if end < 0:
                return "".join(code), True
            position, in_comment = end + 2, False
            code.append(" ")
            continue
        token = _TOKEN.search(line, position)
        if token is None or token[0].startswith("//"):
            code.append(line[position : token.start() if token else None])
            break
        in_comment = token[0] == "/*"
        code.append(line[position : token.start() if in_comment else token.end()])
        position = token.end()
    return "".join(code), in_comment
