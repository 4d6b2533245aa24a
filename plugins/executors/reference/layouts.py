"""How the reference executor keeps weights: as float32, or as they are in the file when memory is short."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.errors import PluginError
from mortice.core.model.qtypes import QType
from mortice.core.plugin.interfaces import QuantizationType

__all__ = ["ExpandedLayout", "FileLayout", "expand"]


# Elements expanded at a time, so that what an expansion needs in passing stays small beside the weight itself.
_PIECE = 1 << 20


@frozen(eq=False)
class ExpandedLayout:
    """float32, row by row: four bytes an element, expanded once."""

    type: QuantizationType
    name: str = "f32"

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:  # noqa: ARG002 (as `Layout` has it)
        return 4 * rows * columns

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        target = out.view(np.float32).reshape(len(rows), columns)
        piece = max(1, _PIECE // columns)
        for start in range(0, len(rows), piece):
            part = rows[start : start + piece]
            target[start : start + len(part)] = expand(self.type, part, columns)


@frozen(eq=False)
class FileLayout:
    """The mapped file's own bytes: no memory taken, and expanded again at each use. Slow, but anything fits."""

    PASSING_BYTES: ClassVar[int] = 2 * 4 * _PIECE
    """What expanding a piece takes while it lasts: the piece, and gguf's intermediates, which are smaller than it."""

    type: QuantizationType
    name: str = "file"

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:  # noqa: ARG002 (as `Layout` has it)
        return 0

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        """Nothing to write: the bytes are read where they are."""

    def piece(self, columns: int) -> int:
        """Rows to expand at a time."""
        return max(1, _PIECE // columns)


def expand(type_: QuantizationType, rows: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """float32, shape (rows, columns), of rows as in the file.

    Raises:
        PluginError: when the type's ``dequantize`` fails or gives something else, which NumPy might well broadcast.

    """
    try:
        values = type_.dequantize(np.ascontiguousarray(rows))
    except Exception as error:
        raise PluginError(f"{type_.qtype.name}: its dequantize failed: {type(error).__name__}: {error}") from error
    if values.shape != (len(rows), columns) or values.dtype != np.float32:
        raise PluginError(
            f"{type_.qtype.name}: its dequantize gave {values.dtype} of shape {values.shape}, "
            f"wanted float32 of shape {(len(rows), columns)}"
        )
    return values
