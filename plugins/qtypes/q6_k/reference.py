"""Q6_K blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

from mortice.plugins.qtypes.bits import Bytes, nibble_plane, pair_plane

__all__ = ["planes"]

# The file's nibbles, 32 bytes after 32 bytes, low before high: chunks of the block.
_ORDER = (0, 2, 1, 3, 4, 6, 5, 7)


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Low nibbles, high pairs of bits, scales and d, of blocks of shape (n, 210)."""
    return nibble_plane(blocks[:, :128], _ORDER), pair_plane(blocks[:, 128:192]), blocks[:, 192:208], blocks[:, 208:]
