"""How the reference executor keeps weights: as float32, or as they are in the file when memory is short."""

from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType
from mortice.core.plugin.interfaces import QuantizationType

__all__ = ["ExpandedLayout", "FileLayout"]


@frozen(eq=False)
class ExpandedLayout:
    """float32, row by row: four bytes an element, expanded once."""

    type: QuantizationType
    name: str = "f32"

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        return 4 * rows * columns

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        target = out.view(np.float32).reshape(len(rows), columns)
        # in pieces, so that the expansion's intermediates stay small beside the weight itself
        piece = max(1, (1 << 20) // columns)
        for start in range(0, len(rows), piece):
            target[start : start + piece] = self.type.dequantize(rows[start : start + piece])


@frozen(eq=False)
class FileLayout:
    """The mapped file's own bytes: no memory taken, and expanded again at each use. Slow, but anything fits."""

    type: QuantizationType
    name: str = "file"

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        return 0

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        """Nothing to write: the bytes are read where they are."""
