"""How the input of products is prepared, and what they leave to be finished: where one launch does both.

``ops/matmul_input.cu`` makes halves of rows of activations; ``ops/finish.cuh`` is what follows products.
"""

from __future__ import annotations

from attrs import frozen

from mortice.core.model.operators import Norm
from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup
from mortice.plugins.executors.cuda.lowering.matmul import STEP, MatmulTile, Slices, steps_of

__all__ = ["JOIN_COLUMNS", "InputCut", "LeftProducts", "input_cut"]

JOIN_COLUMNS = 20480
"""Widest part of a row whose products ``ops/matmul_input.cu`` can finish without running out of registers."""


@frozen(kw_only=True)
class LeftProducts:
    """What the products of a group have left to be finished.

    Attributes:
        group: whose.
        slices: of the sums.
        scaled: whether they are still to be multiplied with the scales of the rows of the group's input.
        lacks_factor: whether with RMS norm's factor.

    """

    group: LinearGroup
    slices: int
    scaled: bool = False
    lacks_factor: bool = False


@frozen(kw_only=True)
class InputCut:
    """How a launch of ``ops/matmul_input.cu`` is cut.

    Attributes:
        steps: of 128 columns that a block takes of a row.
        parts: blocks of a row.
        scales: of a row; one a part, or as many times that of the whole row.
        factor_later: whether RMS norm's factor is left to what finishes the products.

    """

    steps: int
    parts: int
    scales: int
    factor_later: bool

    @property
    def threads(self) -> int:
        """Of a block, which holds its part in registers."""
        return min(32 * self.steps, 256) if self.steps <= 16 else 512 if self.steps <= 256 else 1024


def input_cut(columns: int, norm: Norm | None, tile: MatmulTile | None, slices: Slices) -> InputCut:
    """A block for each slice of a row; for the whole of it without a `tile`, for cuBLAS, and where a norm needs it."""
    later = tile is not None and norm is not None and norm.type == "rms" and norm.bias is None
    if tile is None or (norm is not None and not later):
        steps = steps_of(columns, tile) if tile is not None else -(-columns // STEP)
        return InputCut(steps=steps, parts=1, scales=slices.count, factor_later=False)
    return InputCut(steps=slices.steps, parts=slices.count, scales=slices.count, factor_later=later)
