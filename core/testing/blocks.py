"""Values to quantised bytes, for test models: rounded where the `gguf` package can, random but valid where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mortice.core.model.qtypes import QType

__all__ = ["Encoder", "encode"]

Encoder = Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.uint8]]
"""float32 of shape (rows, columns) to bytes of shape (rows, bytes of a row)."""

# Byte offsets of a block's float16 scale and float16 minimum (ggml-common.h); all other bytes may hold anything.
_SCALES: Mapping[str, tuple[int, int | None]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
    "IQ1_S": (0, None),
    "IQ2_XXS": (0, None),
    "IQ2_XS": (0, None),
    "IQ2_S": (0, None),
    "IQ3_XXS": (0, None),
    "IQ3_S": (0, None),
    "IQ4_NL": (0, None),
    "IQ4_XS": (0, None),
}


def encode(values: NDArray[np.float32], qtype: QType, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of rows, shape (rows, bytes of a row), for any GGML type that holds weights.

    Where the `gguf` package has no quantiser, the blocks are random with the standard deviation of `values` and a mean
    of nearly 0: valid data of the type, but not `values`.

    Raises:
        ValueError: when a row is not a whole number of blocks, or the type is not one of GGML's weight types.

    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    row_bytes = qtype.row_bytes(values.shape[-1])
    if qtype.name == "IQ1_M" or qtype.name in _SCALES:
        return _random_blocks(values, qtype, rng).reshape(-1, row_bytes)
    try:
        data = quantize(np.ascontiguousarray(values), GGMLQuantizationType(qtype.id))
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{qtype.name}: no encoder; pass one for this type") from error
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1, row_bytes)


def _random_blocks(values: NDArray[np.float32], qtype: QType, rng: np.random.Generator) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = rng.integers(0, 256, (values.size // qtype.block_elements, qtype.block_bytes), np.uint8)

    def expanded(scale: float, minimum: float) -> NDArray[np.float32]:
        _set_scales(blocks, qtype, np.full(len(blocks), scale), np.full(len(blocks), minimum))
        return np.asarray(dequantize(blocks, GGMLQuantizationType(qtype.id)), np.float32)

    # a value is scale * a - minimum * b with a and b set by the other bytes: balance the two, then fit the spread
    ratio = 0.0
    unit = expanded(1.0, 0.0)
    if qtype.name in _SCALES and _SCALES[qtype.name][1] is not None:
        minima = expanded(0.0, 1.0)
        ratio = -float(unit.mean() / minima.mean())
        unit = unit + np.float32(ratio) * minima
    scale = values.std() / unit.std() * rng.uniform(0.6, 1.4, len(blocks))
    if not ratio:
        scale *= rng.choice((-1.0, 1.0), len(blocks))
    _set_scales(blocks, qtype, scale, ratio * scale)
    return blocks


def _set_scales(
    blocks: NDArray[np.uint8],
    qtype: QType,
    scale: NDArray[np.float64],
    minimum: NDArray[np.float64],
) -> None:
    if qtype.name == "IQ1_M":  # the scale's four nibbles are the top ones of four 16-bit words
        bits = scale.astype("<f2").view("<u2")
        for word, shift in enumerate((0, 4, 8, 12)):
            high = 48 + 2 * word + 1
            nibble = ((bits >> shift) & 15).astype(np.uint8)
            blocks[:, high] = (blocks[:, high] & 15) | (nibble << 4)
        return
    scale_at, minimum_at = _SCALES[qtype.name]
    blocks[:, scale_at : scale_at + 2] = scale.astype("<f2")[:, None].view(np.uint8)
    if minimum_at is not None:
        blocks[:, minimum_at : minimum_at + 2] = minimum.astype("<f2")[:, None].view(np.uint8)
