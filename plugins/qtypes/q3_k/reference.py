"""Q3_K blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

import numpy as np

from mortice.plugins.qtypes.bits import Bytes, bit_plane, pair_plane, six_bit_pairs

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Low pairs of bits, third bits, scales as six-bit pairs, and d, of blocks of shape (n, 110)."""
    low = np.hstack([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4])
    high = np.hstack([(blocks[:, 104:108] >> shift) & 3 for shift in (0, 2, 4, 6)])
    scales = low | (high << 4)
    pairs = six_bit_pairs(scales[:, 0::2], scales[:, 1::2])
    return pair_plane(blocks[:, 32:96]), bit_plane(blocks[:, :32]), pairs, blocks[:, 108:]
