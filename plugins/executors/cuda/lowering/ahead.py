"""What blocks of attention with nothing else to do ask the L2 cache for: weights of the launch after next.

While Q, K and V are made and a short context is attended to, memory has little to do: the next launch's weights are on
their way to shared memory already (``ops/gemv_ring.cuh``). Those of the launch after it are known, too. A long context
keeps memory busy until blocks are through with it; while what they found is joined, it has time again. The figures are
in docs/design/decode-performance.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from attrs import frozen

from mortice.core.model.operators import WeightRef
from mortice.plugins.executors.cuda.lowering.launches import Addresses
from mortice.plugins.executors.cuda.lowering.layouts import TileGeometry

__all__ = ["MOST_AHEAD", "AheadArgs", "AheadWeight", "weights_ahead"]

MOST_AHEAD = 2
"""Weights: gate and up. Asking for `down` as well was no faster."""

_PIECE = 2048
"""Bytes asked for at once; see ``ops/attend.cu``."""

_MOST_BYTES = 2 << 20
"""Of each weight: 1 to 3 MB were as good for 8B, 4 of 1.5B and of 0.5B were worse than none, for attention waited."""

_MOST_LATE_BYTES = 1 << 20
"""Of each weight, when the context was read: 2 MB were as good, 4 and 6 less so."""

_WARPS = 16
"""Of a block of products."""

_LONG_ROW = 2048
"""Bytes of a row from which on two rows of each warp are left to the rings, which ask for about as much by themselves;
one of shorter rows. 8B takes 51.1 instead of 51.5 us a layer so, 1.5B 18.1 instead of 18.6."""


class AheadArgs(ctypes.Structure):
    """Mirror of ``Ahead`` in ``ops/attend_parts.cuh``."""

    _fields_ = [("start", ctypes.c_uint64), ("pieces", ctypes.c_int32), ("late_pieces", ctypes.c_int32)]


@frozen(kw_only=True)
class AheadWeight:
    """A part of a weight to ask for.

    Attributes:
        weight: which.
        start: bytes into it, as it lies on the device.
        pieces: of 2 KiB, by blocks without a part of the context.
        late_pieces: by blocks that are through with theirs.

    """

    weight: WeightRef
    start: int
    pieces: int
    late_pieces: int

    def args(self, at: Addresses) -> AheadArgs:
        """Where it lies."""
        start = at.weights[self.weight] + self.start
        return AheadArgs(start=start, pieces=self.pieces, late_pieces=self.late_pieces)


def weights_ahead(
    weights: Sequence[WeightRef], tiles: Sequence[TileGeometry], sm_count: int
) -> tuple[AheadWeight, ...]:
    """What to ask for of the weights of a launch, each after the rows that rings ask for.

    Args:
        weights: of one launch; of others than one or two nothing is asked for.
        tiles: of each.
        sm_count: multiprocessors of the card.

    """
    if len(weights) > MOST_AHEAD:
        return ()
    found = []
    for weight, tile in zip(weights, tiles, strict=True):
        row = tile.nbytes // tile.rows
        left = 2 if row >= _LONG_ROW else 1
        start = min(tile.nbytes, sm_count * _WARPS * left * row // 128 * 128)
        pieces, late = (min(most, tile.nbytes - start) // _PIECE for most in (_MOST_BYTES, _MOST_LATE_BYTES))
        if pieces:
            found.append(AheadWeight(weight=weight, start=start, pieces=pieces, late_pieces=late))
    return tuple(found)
