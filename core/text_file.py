"""Reads the small text files a user hands over, configs and contracts, however odd what stands at the path is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mortice.core.errors import InputError

__all__ = ["MAX_BYTES", "beginning", "kind_of", "oddity", "parse_json", "read_small_text", "require_utf8"]

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

_SIGNS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: git lfs pull fetches it"),
    (b"GGUF", "GGUF"),
    (b"PK\x03\x04", "a ZIP archive, as PyTorch writes"),
    (b"\x80\x02", "a Python pickle, as PyTorch wrote"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"<", "HTML or XML, as an error page that was saved"),
    (b"{", "JSON"),
    (b"ggjt", "the format before GGUF"),
    (b"tjgg", "the format before GGUF"),
    (b"lmgg", "the format before GGUF"),
)
_SHOWN_BYTES = 16
_INTEGER_BITS = 64  # as in TOML


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


def beginning(path: Path) -> str:
    """How a regular file begins, in bytes and, where it is a sign of something, in words; nothing for what is empty."""
    try:
        data = _read(path, InputError, len(_SIGNS[0][0]))
    except (OSError, ValueError, InputError):
        return ""
    if not data:
        return ""
    sign = next((f": {words}" for magic, words in _SIGNS if data.startswith(magic)), "")
    shown = data[:_SHOWN_BYTES]
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in shown)
    return f"it begins with {shown.hex(' ')} ({text}){sign}"


def read_small_text(path: Path, error: type[InputError], max_bytes: int = MAX_BYTES) -> str:
    """The text of a regular file, without the byte order mark that some editors put before it.

    Args:
        path: the file.
        error: what is raised.
        max_bytes: how large it may be.

    Raises:
        InputError: an `error`, when the file cannot be read, is no regular file, is too large or is not UTF-8.

    """
    try:
        data = _read(path, error, max_bytes + 1)
    except (OSError, ValueError) as fault:  # ValueError: a null byte in the path
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise error(f"{path}: cannot be read: {reason}") from None
    if len(data) > max_bytes:
        raise error(f"{path}: cannot be read: wanted at most {max_bytes} bytes, found more")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
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


def _read(path: Path, error: type[InputError], limit: int) -> bytes:
    # without O_NONBLOCK the open of a FIFO waits for a writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise error(f"{path}: cannot be read: wanted a regular file, found {kind_of(mode)}")
        return stream.read(limit)


def parse_json(text: str) -> Any:
    """JSON that somebody may have edited.

    Raises:
        ValueError: not JSON, nested too deeply, with a key that an object has twice or an integer of more than 64 bits.

    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _INTEGER_BITS or (value := int(text)).bit_length() > _INTEGER_BITS:
        raise ValueError(f"an integer has more than {_INTEGER_BITS} bits")
    return value
