"""Random rows of any quantisation type: valid whatever its blocks hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mortice.core.plugin.interfaces import QuantizationType

__all__ = ["random_rows"]

_LARGEST = 1e6
_ROUNDS = 200


def random_rows(type_: QuantizationType, rows: int, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rows as in a file, shape (rows, bytes of a row), every bit random but for what makes a value useless.

    Blocks whose values are not finite or beyond a million are drawn again; no knowledge of the type is needed for that.

    Raises:
        ValueError: when a row is not a whole number of blocks, or hardly any bytes are valid blocks.

    """
    qtype = type_.qtype
    count = rows * qtype.row_bytes(columns) // qtype.block_bytes
    blocks = rng.integers(0, 256, (count, qtype.block_bytes), np.uint8)
    wrong = np.arange(count)
    for _ in range(_ROUNDS):
        with np.errstate(all="ignore"):
            values = np.abs(type_.dequantize(blocks[wrong]))
        wrong = wrong[~(values <= _LARGEST).all(axis=1)]
        if not len(wrong):
            return blocks.reshape(rows, qtype.row_bytes(columns))
        blocks[wrong] = rng.integers(0, 256, (len(wrong), qtype.block_bytes), np.uint8)
    raise ValueError(f"{qtype.name}: {len(wrong)} of {count} random blocks have no finite values below a million")
