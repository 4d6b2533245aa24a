"""``mortice plugins new``: the package of a plugin, to begin with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mortice.core.cli.flags import OutputFlags
from mortice.core.cli.render import Screen, printable

__all__ = ["new_plugin"]


def new_plugin(
    name: Annotated[str, Parameter(help="Of the package, such as acme-ternary; it becomes a folder.")],
    /,
    *,
    kind: Annotated[Literal["arch", "qtype", "upload", "loader"], Parameter(help="What the plugin gives.")],
    folder: Annotated[Path, Parameter(help="Where the folder is made.")] = Path(),
    output: OutputFlags | None = None,
) -> int:
    """Write the package of a new plugin: installable, with tests that use the conformance kit, and a README.

    It works as it is written; change it step by step. Nothing is overwritten.
    """
    from mortice.core.scaffold.package import write_package

    output = output or OutputFlags()
    screen = Screen(json=output.json, quiet=output.quiet)
    target = write_package(name, kind, folder)
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    screen.result({"folder": target, "kind": kind, "files": files})
    screen.say(printable(f"wrote {target}: {', '.join(files)}"))
    if not output.quiet:
        sample = f" --sample FILE.{name.replace('-', '_')}" if kind == "loader" else ""
        steps = f"python -m pip install -e '.[test]'; pytest; mortice plugins check {name}{sample}"
        screen.say(f"next: cd {_shell_word(target)}; {steps}")
    return 0


def _shell_word(path: Path) -> str:
    """A path as a shell reads it, in one line: ``$'…'`` for one that cannot be printed."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    escaped = (chr(code) if 32 <= code < 127 and code not in b"\\'" else f"\\{code:03o}" for code in os.fsencode(text))
    return f"$'{''.join(escaped)}'"
