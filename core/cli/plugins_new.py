"""``mortice plugins new``: the package of a plugin, to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mortice.core.cli.flags import OutputFlags
from mortice.core.cli.render import Screen

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
    screen.say(f"wrote {target}: {', '.join(files)}")
    if not output.quiet:
        screen.say(f"next: cd {target}; python -m pip install -e '.[test]'; pytest; mortice plugins check {name}")
    return 0
