"""A bounds-checked cursor over the bytes of a file."""

from __future__ import annotations

import struct
from mmap import mmap
from pathlib import Path
from typing import Any

from attrs import define

from mortice.core.counts import counted
from mortice.core.errors import ModelFileError
from mortice.plugins.loaders.gguf.format import MAX_HEADER_BYTES

__all__ = ["Reader", "quoted"]

_STRUCT_CODES = {
    "u1": "B",
    "i1": "b",
    "u2": "H",
    "i2": "h",
    "u4": "I",
    "i4": "i",
    "f4": "f",
    "u8": "Q",
    "i8": "q",
    "f8": "d",
}
_STRUCTS = {(order, code): struct.Struct(order + letter) for code, letter in _STRUCT_CODES.items() for order in "<>"}


def quoted(text: str) -> str:
    """Text from a file as it may appear in a one-line message: escaped, in quotes, cut at 80 characters."""
    return repr(text if len(text) <= 80 else text[:79] + "…")


@define(eq=False)
class Reader:
    """Reads numbers and strings one after the other; nothing outside the file is ever touched.

    The buffer is sliced and unpacked from but never exported, so a mapping can be closed after any error.

    Attributes:
        path: the file, for messages.
        buffer: its bytes.
        order: ``<`` for a little-endian file, ``>`` for a big-endian one.
        position: offset of the next byte.

    """

    path: Path
    buffer: bytes | mmap
    order: str = "<"
    position: int = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self.buffer)

    @property
    def limit(self) -> int:
        """Offset that the header may not pass."""
        return min(len(self.buffer), MAX_HEADER_BYTES)

    def error(self, message: str, offset: int | None = None) -> ModelFileError:
        """The error to raise for what was found at `offset` (the current position when not given)."""
        return ModelFileError(self.path, message, self.position if offset is None else offset)

    def too_long(self, what: str, nbytes: int, offset: int) -> ModelFileError:
        """The error for `what`, which starts at `offset` and passes the end of the file or of the header."""
        left = self.size - offset
        if nbytes > left:
            missing = nbytes - max(left, 0)
            # a length that no header has is a broken file, not a download cut short
            cut = nbytes < MAX_HEADER_BYTES
            lost = counted(missing, "byte is", "bytes are")
            hint = f"; at least {lost} missing (an interrupted download?)" if cut else ""
            there = counted(max(left, 0), "is left", "are left")
            return self.error(f"file is truncated: {what} takes {counted(nbytes, 'byte')}, {there}{hint}", offset)
        return self.error(f"{what} takes {nbytes} bytes; a header may have {MAX_HEADER_BYTES} bytes in all", offset)

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` bytes and return the offset of the first.

        Raises:
            ModelFileError: when they are not all there.

        """
        start = self.position
        if nbytes > self.limit - start:
            raise self.too_long(what, nbytes, start)
        self.position = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        """The next number; `code` is NumPy's, for instance ``u4``."""
        form = _STRUCTS[self.order, code]
        return form.unpack_from(self.buffer, self.take(form.size, what))[0]

    def string(self, what: str, max_bytes: int) -> str:
        """The next string: a 64-bit length and that many bytes of UTF-8.

        Raises:
            ModelFileError: when it is longer than `max_bytes` or the file, or is not UTF-8.

        """
        at = self.position
        nbytes = self.number("u8", f"length of {what}")
        if nbytes > max_bytes:
            raise self.error(f"{what} has {nbytes} bytes, at most {max_bytes} are allowed", at)
        start = self.take(nbytes, what)
        try:
            return str(self.buffer[start : start + nbytes], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason}", start + error.start) from None
