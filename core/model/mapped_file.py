"""Maps a model file into memory, to be read where it is needed."""

from __future__ import annotations

import stat
from contextlib import ExitStack, suppress
from mmap import ACCESS_READ, mmap
from os import fstat
from pathlib import Path

from attrs import field, frozen

from mortice.core.errors import ModelFileError
from mortice.core.model.file_reader import FileReader

__all__ = ["MappedFile", "map_file"]


@frozen(eq=False)
class MappedFile:
    """A file that is mapped.

    Attributes:
        data: its bytes; an empty file cannot be mapped and has ``b""``.
        reader: reads it past the mapping.

    """

    data: bytes | mmap = field(repr=False)
    reader: FileReader


def map_file(path: Path, wanted: str, stack: ExitStack) -> MappedFile:
    """Map a regular file for reading, until `stack` is closed; views that are then still there keep the mapping alive.

    Args:
        path: the file.
        wanted: what it should be, for messages (``a GGUF file``).
        stack: closes reader and mapping.

    Raises:
        ModelFileError: when it is no regular file or cannot be read.

    """
    try:
        # Asked before opening, for opening a named pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelFileError(path, f"not a regular file, {wanted} was expected")
        with path.open("rb") as file:
            nbytes = fstat(file.fileno()).st_size
            data = mmap(file.fileno(), nbytes, access=ACCESS_READ) if nbytes else b""
            reader = FileReader.of(path, file)
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    stack.callback(reader.close)
    if isinstance(data, mmap):
        stack.callback(_unmap, data)
    return MappedFile(data, reader)


def _unmap(mapping: mmap) -> None:
    """Close the mapping, unless arrays still refer to it: then it goes when the last of them does."""
    with suppress(BufferError):
        mapping.close()
