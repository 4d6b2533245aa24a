"""The shape of a launch of ``ops/gemv.cu``: threads, and how weights reach them."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from mortice.core.model.weight_plan import PlannedWeight
from mortice.plugins.executors.cuda.device.properties import CudaProperties
from mortice.plugins.executors.cuda.lowering.layouts import tile_geometry

__all__ = ["GemvShape", "gemv_shape", "has_bulk_copies"]

_THREADS = 512
_LEAST_WARPS, _MOST_WARPS = 4, 16
_LEAST_SLOTS, _MOST_SLOTS = 2, 8
_RING_BLOCK_BYTES = 111 << 10
"""Shared memory of a block, so that the next kernel's finds room beside it on a multiprocessor of 228 KiB."""
_MOST_COLUMNS = 25600
"""Of an input kept as float32 beside rings."""
_INPUT_BYTES = 40
"""Of shared memory for each 32 activations as int8; see ``ActivationRow``."""


def has_bulk_copies(properties: CudaProperties) -> bool:
    """Whether a card copies to shared memory in bulk, and has enough of it for the rings of two blocks."""
    return properties.compute_capability >= (9, 0) and properties.shared_bytes_per_sm >= 2 * (_RING_BLOCK_BYTES + 2048)


@frozen(kw_only=True)
class GemvShape:
    """How a launch is cut.

    Attributes:
        threads: of a block.
        slots: tiles of a warp's ring in shared memory; 0 where weights go straight to registers.
        blocks: that a multiprocessor is to have room for.

    """

    threads: int
    slots: int
    blocks: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.threads // 32

    def grid(self, units: int, at_once: int) -> int:
        """Blocks for so many units of work on a card that runs so many blocks at once.

        Rings want every multiprocessor, however little each does, see ``kLeastShared`` in ``ops/common.cuh``.
        """
        return at_once // self.blocks if self.slots else min(at_once, -(-units // self.warps))


def gemv_shape(weights: Sequence[PlannedWeight], *, bulk_copies: bool) -> GemvShape:
    """The shape for weights of one input.

    With bulk copies each warp has a ring of slots for the largest tile: as many warps as leave each two.
    """
    tile = max(tile_geometry(w.tensor.qtype, w.rows, w.columns).tile_bytes for w in weights)
    room = _RING_BLOCK_BYTES - _INPUT_BYTES * weights[0].columns // 32
    warps = min(_MOST_WARPS, room // (_LEAST_SLOTS * tile))
    if not bulk_copies or weights[0].columns > _MOST_COLUMNS or warps < _LEAST_WARPS:
        return GemvShape(threads=_THREADS, slots=0, blocks=1)
    slots = min(_MOST_SLOTS, room // (warps * tile))
    return GemvShape(threads=32 * warps, slots=slots, blocks=2)
