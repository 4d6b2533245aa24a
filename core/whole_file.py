"""Writes a file whole, or leaves what was there as it was: also on a full disk and when interrupted."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mortice.core.errors import ExecutionError

__all__ = ["require_place", "write_text", "written_beside"]


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place in the end; until then `path` is left alone.

    A link stays a link: its target is what is replaced. A device, a pipe or a socket is refused, for it would be gone.

    Raises:
        ExecutionError: when it cannot be written.

    """
    target, part = _places(path)
    try:
        yield part
        part.replace(target)
    except OSError as error:
        raise _cannot(path, error.strerror or str(error)) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def require_place(path: Path) -> None:
    """Refuse, before the work, a file that `written_beside` could not begin: in a folder nobody may write in, say.

    Raises:
        ExecutionError: as `written_beside` does.

    """
    _, part = _places(path)
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise _cannot(path, error.strerror or str(error)) from None


def _places(path: Path) -> tuple[Path, Path]:
    """The file that is written in the end, and the one beside it that is written first."""
    target = _target(path)
    return target, target.with_name(f".mortice-{secrets.token_hex(8)}.part")


def _target(path: Path) -> Path:
    try:
        target = path.resolve()
        if not target.exists() or target.is_file():
            return target
        found = "a folder" if target.is_dir() else "a device, a pipe or a socket"
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _cannot(path, getattr(error, "strerror", None) or str(error)) from None
    raise _cannot(path, f"found {found}, wanted the name of a file")


def _cannot(path: Path, why: str) -> ExecutionError:
    return ExecutionError(f"{path}: cannot be written: {why}")


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; the file is there complete or as it was.

    Raises:
        ExecutionError: when it cannot be written.

    """
    with written_beside(path) as part:
        part.write_text(text, encoding="utf-8")
