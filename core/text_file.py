"""Reads the small text files a user hands over, configs and contracts, however odd what stands at the path is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mortice.core.errors import InputError

__all__ = ["MAX_BYTES", "kind_of", "oddity", "read_small_text", "require_utf8"]

MAX_BYTES = 1 << 20
"""Far more than any config or contract needs, and little enough to read at once."""

_KINDS = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of(mode: int) -> str:
    """What ``st_mode`` says stands at a path, in words: ``a folder``."""
    return next((name for test, name in _KINDS if test(mode)), "no file")


def oddity(path: Path) -> str:
    """What a person may have overlooked about a path: `` (a folder)``, `` (an empty file)``; else nothing."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return ""
    if stat.S_ISREG(found.st_mode):
        return "" if found.st_size else " (an empty file)"
    return f" ({kind_of(found.st_mode)})"


def read_small_text(path: Path, error: type[InputError]) -> str:
    """The text of a regular file of at most `MAX_BYTES`.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        InputError: an `error`, when the file cannot be read, is no regular file, is too large or is not UTF-8.

    """
    try:
        data = _read(path, error)
    except (OSError, ValueError) as fault:  # ValueError: a null byte in the path
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise error(f"{path}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise error(f"{path}: cannot be read: wanted at most {MAX_BYTES} bytes, found more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{path}: cannot be read: not UTF-8 at byte {fault.start}") from None


def require_utf8(text: str) -> None:
    """Refuse text of an argument or a variable that was no UTF-8: the system hands such bytes on as surrogates.

    Raises:
        ValueError: naming the byte.

    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        offset = len(text[: error.start].encode("utf-8"))
        raise ValueError(f"not UTF-8 at byte {offset}") from None


def _read(path: Path, error: type[InputError]) -> bytes:
    # without O_NONBLOCK the open of a FIFO waits for a writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise error(f"{path}: cannot be read: wanted a regular file, found {kind_of(mode)}")
        return stream.read(MAX_BYTES + 1)
