"""Q2_K blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

from mortice.plugins.qtypes.bits import Bytes, pair_plane

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Pairs of bits, scales and minimums, and the two factors, of blocks of shape (n, 84)."""
    return pair_plane(blocks[:, 16:80]), blocks[:, :16], blocks[:, 80:]
