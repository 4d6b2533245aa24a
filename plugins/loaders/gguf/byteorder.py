"""Tensor data of big-endian files, brought into the little-endian order that everything else here expects.

A conversion reads and copies the data, so a big-endian file is neither opened lazily nor without copies.
Which bytes of a block form one number follows the block structs in llama.cpp's ``ggml-common.h`` and
agrees with what the ``gguf`` package's ``gguf_convert_endian`` does. Types that are read as wider
integers than they are declared (Q5_0, Q5_1, most IQ types) have no settled big-endian form: they are
refused.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mortice.core.model.qtypes import GGML_TYPES, QType

__all__ = ["MAX_CONVERTED_BYTES", "can_convert", "to_little_endian"]

MAX_CONVERTED_BYTES: Final = 4 * 2**30
"""Most tensor bytes of one file that are converted, since each takes a byte of memory."""

_NUMBERS: Final = {"I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}

_HALVES: Final[dict[str, tuple[int, int]]] = {
    "Q4_0": (0, 2),
    "Q4_1": (0, 4),
    "Q8_0": (0, 2),
    "Q8_1": (0, 4),
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
    "IQ4_NL": (0, 2),
    "IQ4_XS": (0, 4),
    "TQ1_0": (52, 54),
    "TQ2_0": (64, 66),
    "MXFP4": (0, 0),
    "NVFP4": (0, 0),
}
"""The bytes of a block that hold 16-bit numbers; the others are single bytes."""


def can_convert(qtype: QType) -> bool:
    """Whether the big-endian form of this type is settled."""
    return GGML_TYPES.get(qtype.id) == qtype and (qtype.name in _NUMBERS or qtype.name in _HALVES)


def to_little_endian(data: NDArray[np.uint8], qtype: QType) -> NDArray[np.uint8]:
    """A read-only copy of `data`, whole blocks of `qtype`, with its numbers in little-endian order.

    Args:
        data: ``uint8``, one dimension, big-endian.
        qtype: a type for which `can_convert` holds.

    """
    if qtype.name in _NUMBERS:
        swapped = data.view(f"V{_NUMBERS[qtype.name]}").view(f"u{_NUMBERS[qtype.name]}").byteswap().view(np.uint8)
    else:
        swapped = data.copy()
        first, last = _HALVES[qtype.name]
        halves = swapped.reshape(-1, qtype.block_bytes)[:, first:last]
        for low in range(0, last - first, 2):
            halves[:, [low, low + 1]] = halves[:, [low + 1, low]]
    swapped.flags.writeable = False
    return swapped
