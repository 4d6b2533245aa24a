"""Q5_0 blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

from mortice.plugins.qtypes.bits import Bytes, spread_bits

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Low nibbles, fifth bits and scales, of blocks of shape (n, 22)."""
    return blocks[:, 6:], spread_bits(blocks[:, 2:6]), blocks[:, :2]
