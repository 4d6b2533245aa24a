"""GGML's type Q1_0: 128 signs that share a half-precision scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import QuantizationType
from mortice.plugins.qtypes.bits import spread_bits

mortice_contract_version = 1

Q1_0 = QType(41, "Q1_0", block_elements=128, block_bytes=18)  # float16 scale, then 128 bits


@hookimpl
def mortice_qtypes() -> list[QuantizationType]:
    """One type."""
    traits = Path(__file__).parent / "traits.cuh"
    return [
        QuantizationType(
            qtype=Q1_0,
            dequantize=dequantize,
            quantize=quantize,
            largest_error=0.65,  # a sign and a mean keep no more of normal values: sqrt(1 - 2 / pi) is lost
            traits=traits,
            planes=planes,
        )
    ]


def dequantize(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of blocks, shape (rows, bytes), as float32 of shape (rows, columns)."""
    blocks = rows.reshape(-1, Q1_0.block_bytes)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    columns = rows.shape[1] // Q1_0.block_bytes * Q1_0.block_elements
    return np.where(bits == 1, scales, -scales).reshape(len(rows), columns)


def quantize(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rows of float32 as rows of blocks: the mean magnitude is the scale, as in ggml's reference.

    Raises:
        FloatingPointError: for a mean beyond half precision.

    """
    blocks = values.reshape(-1, Q1_0.block_elements)
    with np.errstate(over="raise"):
        scales = np.abs(blocks).mean(axis=1, keepdims=True).astype("<f2")
    bits = np.packbits(blocks >= 0, axis=1, bitorder="little")
    return np.hstack([scales.view(np.uint8), bits]).reshape(len(values), -1)


def planes(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
    """Bits and scales, of blocks of shape (n, 18); see ``traits.cuh``."""
    bits = spread_bits(np.ascontiguousarray(blocks[:, 2:]).reshape(-1, 4))
    return bits.reshape(len(blocks), 16), blocks[:, :2]
