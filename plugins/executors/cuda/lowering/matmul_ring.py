"""How a launch of ``ops/matmul_ring.cu`` is cut, and which groups of linear maps it multiplies."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from mortice.plugins.executors.cuda.lowering.fusion import LinearGroup
from mortice.plugins.executors.cuda.lowering.layouts import TileGeometry
from mortice.plugins.executors.cuda.lowering.matmul import LEAST_SLICE, STEP

__all__ = ["RING_ROWS", "RingShape", "ring_shape"]

RING_ROWS = 16
"""Rows up to which ``ops/matmul_ring.cu`` is faster than the kernels for more: measured, see
docs/design/prefill-performance.md."""

_RING_BYTES = 225 << 10
"""Of a block with bulk copies, which has a multiprocessor to itself: 227 KiB from compute capability 9.0 on, less what
the kernel keeps besides."""

_RING_WARPS, _RING_FRAGMENTS = 16, 4
"""Most warps of a block of ``ops/matmul_ring.cu``, and most steps times eights of rows of each: more input would not
fit registers."""

_UNIT = 16
"""Rows of a weight that ``ops/matmul_ring.cu`` takes at a time."""

_MOST_SLOTS = 8

_HELPERS, _HELPED_FRAGMENTS = 4, 2
"""Warps that help, and most steps times eights of rows of a warp with which they do: a fifth warp on a quarter of a
multiprocessor leaves each 96 registers."""

_EARLY_SLOTS = 2
"""Slots asked for before the kernel waits, where there are helpers: what is under way delays the input. Of a block with
no more than these in all, one."""


@frozen(kw_only=True)
class RingShape:
    """How a launch of ``ops/matmul_ring.cu`` is cut.

    Attributes:
        rows: of the step that a block takes.
        warps: of a block that multiply.
        helpers: warps of a block that ask for weights and add sums, or 0 where all do so.
        steps: of 128 columns of a tile that each warp takes.
        early: slots asked for before the input is read, where there are helpers.
        slots: of the ring, each for 16 rows of tiles.
        slices: tiles along a row; a block takes one of each row.
        units: lots of 16 rows of all weights.

    """

    rows: int
    warps: int
    helpers: int
    steps: int
    early: int
    slots: int
    slices: int
    units: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.warps + self.helpers)

    def grid(self, rows: int, sm_count: int) -> int:
        """Blocks: one on each multiprocessor, as far as there is work."""
        each = self.slices * -(-rows // self.rows)
        return each * max(1, min(sm_count // each, self.units))


def ring_shape(group: LinearGroup, tiles: Sequence[TileGeometry], rows: int, sm_count: int) -> RingShape | None:
    """How ``ops/matmul_ring.cu`` multiplies a group, or None where it does not.

    Tiles have to be of one width that fits the registers of a block. Norms need whole rows in a block, gates whole
    sums; layer norms need their mean before anything else.

    Args:
        group: the maps.
        tiles: of their weights, in order.
        rows: of the step, at most.
        sm_count: multiprocessors of the card.

    """
    columns, slices = tiles[0].tile_columns, tiles[0].tiles_across
    steps = -(-columns // STEP)
    each = -(-steps // _RING_WARPS)
    whole = slices == 1 or (group.norm is None and group.gated is None and columns >= LEAST_SLICE)
    rms = group.norm is None or (group.norm.type == "rms" and group.norm.bias is None)
    alike = all(tile.tile_columns == columns for tile in tiles)
    if rows > RING_ROWS or each > _RING_FRAGMENTS or not (whole and rms and alike):
        return None
    warps = -(-steps // each)
    passed = 8 if rows <= 8 or 2 * each > _RING_FRAGMENTS else 16
    parts = 2 if group.gated is not None else 1
    sums = max(2 * parts * warps * (passed * (_UNIT + 4) + 8) * 4, warps * 2048)
    slot = max(
        _UNIT // tile.tile_rows * (_apart(tile.tile_bytes) if tile.tile_rows == 1 else tile.tile_bytes)
        for tile in tiles
    )
    slots = min(_MOST_SLOTS, (_RING_BYTES - sums) // (-(-slot // 128) * 128))
    if slots < 2:
        return None
    of_each = [-(-tile.rows // _UNIT) for tile in tiles]
    units = of_each[0] if parts == 2 else sum(of_each)
    of_block = parts * -(-units // max(1, sm_count // slices))
    return RingShape(
        rows=passed,
        warps=warps,
        helpers=_HELPERS if each * passed // 8 <= _HELPED_FRAGMENTS else 0,
        early=_EARLY_SLOTS if of_block > _EARLY_SLOTS else 1,
        steps=each,
        slots=slots,
        slices=slices,
        units=units,
    )


def _apart(nbytes: int) -> int:
    """Bytes from a row to the next that lies half a line of banks further."""
    return -(-(nbytes - 64) // 128) * 128 + 64
