"""Reads any place of an open file into memory of the caller's, from several threads at once."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np
from attrs import define, field
from numpy.typing import NDArray

from mortice.core.counts import counted
from mortice.core.errors import ModelFileError

__all__ = ["FileReader"]


@define(eq=False)
class FileReader:
    """A descriptor of its own, closed by `close` or when nothing refers to it any more.

    To read into memory that is there costs one pass over the bytes. A copy out of a mapping first faults in its pages
    one by one, which threads of one process do not do side by side.

    Attributes:
        path: named in errors.

    """

    path: Path
    _descriptor: int
    _close: weakref.finalize[[int], FileReader] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._close = weakref.finalize(self, os.close, self._descriptor)

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> FileReader:
        """A reader of a file that is open; the caller goes on to own `file`."""
        return cls(path, os.dup(file.fileno()))

    def read_into(self, out: NDArray[np.uint8], offset: int) -> None:
        """Fill `out`, one dimension, with the bytes from `offset` on.

        Raises:
            ModelFileError: when the file ends before, cannot be read, or the reader was closed.

        """
        if not self._close.alive:
            raise ModelFileError(self.path, "is closed")
        view = out.data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise ModelFileError(self.path, f"cannot be read: {error.strerror}", offset + done) from error
            if not count:
                wanted = f"{counted(len(view) - done, 'more byte was', 'more bytes were')} there when it was opened"
                raise ModelFileError(self.path, f"the file ends, {wanted}", offset + done)
            done += count

    def close(self) -> None:
        """Close the descriptor; calling twice is fine. Nobody may be reading."""
        self._close()
