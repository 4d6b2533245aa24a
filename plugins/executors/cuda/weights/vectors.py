"""Norm weights, biases and RoPE factors on the card: float32, whatever the file has."""

from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType
from mortice.core.plugin.interfaces import QuantizationType

__all__ = ["VectorLayout"]


@frozen(eq=False)
class VectorLayout:
    """float32, in order."""

    type: QuantizationType
    name: str = "vector-f32"

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        del qtype  # expanded, whatever it was
        return 4 * rows * columns

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        out.view(np.float32)[:] = self.type.dequantize(rows).reshape(len(rows) * columns)
