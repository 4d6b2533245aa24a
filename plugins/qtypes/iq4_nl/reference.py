"""IQ4_NL blocks as planes; see ``traits.cuh``."""

from __future__ import annotations

from mortice.plugins.qtypes.bits import Bytes, iq4_codes

__all__ = ["planes"]


def planes(blocks: Bytes) -> tuple[Bytes, ...]:
    """Codes and scales, of blocks of shape (n, 18)."""
    return iq4_codes(blocks[:, 2:]), blocks[:, :2]
