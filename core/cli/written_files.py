"""Files that a command writes: refused before the work where they cannot be, overwritten only when told to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mortice.core.errors import ConfigError
from mortice.core.whole_file import require_place

__all__ = ["ForceFlag", "require_writable"]

ForceFlag = Annotated[
    bool, Parameter(name="--force", negative=(), help="Overwrite a file that is there already.", show_default=False)
]


def require_writable(
    flag: str, path: Path, *, force: bool, devices: bool = False, inputs: Iterable[Path | None] = ()
) -> None:
    """Refuse a path at which no file could be written, or where one is that nobody said to overwrite.

    Args:
        flag: where the path was given; empty for an argument.
        path: the file that would be written, or a link to it.
        force: whether a file that is there is overwritten.
        devices: whether it may be a device or a pipe: what is written in place, and opened before the work anyway.
        inputs: files that the command reads, never overwritten; None for what was not given.

    Raises:
        ConfigError: naming flag, path and what was found there.
        ExecutionError: when the system lets no file be written there.

    """
    where = f"{flag}: {path}" if flag else str(path)
    found = ""
    try:
        target = path.resolve()  # a link's target is what would be written
        if target.is_dir():
            found = "a folder"
        elif not target.parent.is_dir():
            found = "no folder to write it in"
        elif any(file is not None and file.exists() and target.exists() and target.samefile(file) for file in inputs):
            raise ConfigError(f"{where}: is a file that this command reads, wanted another")
        elif target.is_file():
            if not force:
                raise ConfigError(f"{where}: is there already; --force overwrites it")
        elif target.exists() and not devices:
            found = "a device, a pipe or a socket"
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if found:
        raise ConfigError(f"{where}: found {found}, wanted the name of a file")
    if not devices:
        require_place(path)
