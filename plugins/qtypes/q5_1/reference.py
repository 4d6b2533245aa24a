"""Q5_1 blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

from mortice.plugins.qtypes.bits import Bytes, spread_bits

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Low nibbles, fifth bits, and scale with minimum, of blocks of shape (n, 24)."""
    return blocks[:, 8:], spread_bits(blocks[:, 4:8]), blocks[:, :4]
