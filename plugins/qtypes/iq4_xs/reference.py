"""IQ4_XS blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

from mortice.plugins.qtypes.bits import Bytes, iq4_codes

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Codes, and the head of 8 bytes, of blocks of shape (n, 136)."""
    return iq4_codes(blocks[:, 8:]), blocks[:, :8]
