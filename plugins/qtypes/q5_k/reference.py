"""Q5_K blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

import numpy as np

from mortice.plugins.qtypes.bits import Bytes, bit_plane, nibble_plane, scales_and_minimums

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Low nibbles, fifth bits, and the head of 16 bytes, of blocks of shape (n, 176)."""
    head = np.hstack([blocks[:, :4], scales_and_minimums(blocks[:, 4:16])])
    return nibble_plane(blocks[:, 48:]), bit_plane(blocks[:, 16:48]), head
