"""Makes one text of a CUDA source and the headers it includes.

The text is the whole input of the compiler besides the toolkit's own headers, so that it can be the cache key; nothing
in it depends on where mortice is installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attrs import define, field

from mortice.plugins.executors.cuda.errors import CompileError

__all__ = ["flatten"]

_DIRECTIVE = re.compile(r"\s*#\s*(\w+)(.*)")
_QUOTED = re.compile(r'\s*"([^"]+)"\s*$')
_TOKEN = re.compile(r"""//.*|/\*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")
_OPENS = {"if", "ifdef", "ifndef"}


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
    work = _Flattener([root.resolve() for root in roots])
    for path in [*before, source]:
        if not path.is_file():
            raise CompileError(f"{path}: no such CUDA source")
        work.file(path.resolve())
    return "\n".join(work.lines) + "\n"


@define
class _Flattener:
    roots: list[Path]
    lines: list[str] = field(factory=list)
    done: set[Path] = field(factory=set)
    open: list[Path] = field(factory=list)

    def name(self, path: Path) -> str:
        for root in self.roots:
            if path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        return f"{path.parent.name}/{path.name}"

    def file(self, path: Path) -> None:
        """Append a file, unless it is in already."""
        if path in self.done:
            return
        name = self.name(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CompileError(f"{name}: cannot be read as UTF-8 text: {error}") from error
        self.open.append(path)
        self.lines.append(f'#line 1 "{name}"')
        in_comment, depth = False, 0
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
            if not in_comment and "#" not in line and "/*" not in line:  # most lines
                self.lines.append(line)
                continue
            began_in_comment = in_comment
            code, in_comment = _without_comments(line, in_comment)
            directive = _DIRECTIVE.match(code)
            word, rest = (directive[1], directive[2]) if directive else ("", "")
            depth += (word in _OPENS) - (word == "endif")
            once = word == "pragma" and rest.split() == ["once"]
            quoted = word == "include" and not rest.lstrip().startswith("<")
            if (once or quoted) and (in_comment or began_in_comment):
                raise CompileError(f"{name}:{number}: #{word} shares its line with a comment of several lines")
            if once:
                self.lines.append("")  # the compiler would warn about it in the main file
            elif quoted:
                self.include(path, rest, f"{name}:{number}", conditional=depth > 0)
                self.lines.append(f'#line {number + 1} "{name}"')
            else:
                self.lines.append(line)
        self.open.pop()
        self.done.add(path)

    def include(self, path: Path, rest: str, where: str, *, conditional: bool) -> None:
        """Append what an include line names."""
        quoted = _QUOTED.match(rest)
        if quoted is None:
            raise CompileError(f"{where}: #include{rest}: only quoted and angle includes can be flattened")
        if conditional:
            raise CompileError(f'{where}: #include "{quoted[1]}" under #if: a file is put in once, include it always')
        folders = [path.parent, *self.roots]
        found = next((folder / quoted[1] for folder in folders if (folder / quoted[1]).is_file()), None)
        if found is None:
            looked = ", ".join(str(folder) for folder in folders)
            raise CompileError(f'{where}: #include "{quoted[1]}" not found in {looked}')
        found = found.resolve()
        if found in self.open:
            chain = " -> ".join(self.name(link) for link in [*self.open[self.open.index(found) :], found])
            raise CompileError(f"{where}: circular include: {chain}")
        self.file(found)


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
