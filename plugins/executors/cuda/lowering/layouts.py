"""How weights lie on the device: tiles of some rows and columns, with the planes of the weight's type inside each.

``ops/tile.cuh`` reads what this writes; ``ops/repack.cu`` writes the same bytes on the device. A type's header in
``qtypes/`` says which planes it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import lcm

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mortice.core.errors import UnsupportedError
from mortice.core.model.qtypes import QType
from mortice.core.plugin.interfaces import QuantizationType

__all__ = ["CHUNK", "TileGeometry", "TileLayout", "tile_geometry"]

CHUNK = 32
"""Elements of a row that a lane takes at a time."""

TILE_ALIGNMENT = 16
"""Bytes: the widest load of a lane."""

_WIDTHS = (range(1024, 4096 + 1), range(11264 + 1))  # columns of a tile, the better range first
_MOST_ROW_BYTES = 9216  # of a tile: a warp keeps two tiles in shared memory
_TILE_ROWS = (1, 2, 4, 8)
_LANES = 32
_GOOD_ENOUGH = 0.85  # of the best share of busy lanes; a smaller tile is worth a few idle ones
_MOST_PADDING = 0.02  # of a tile's bytes, where some number of rows allows it
_STORE_BYTES = 1 << 18  # of a piece of `TileLayout.store`: its intermediates stay in the L2 cache


@frozen(kw_only=True)
class TileGeometry:
    """The tiles of one weight.

    Tiles of a row group follow one another along the columns, row groups follow one another.

    Attributes:
        rows: of the weight.
        columns: of the weight.
        tile_rows: rows of a tile; divides `rows` and the lanes of a warp.
        tile_columns: columns of a tile; divides `columns`.
        piece_elements: the smallest whole part of a row: a block of the type, or 32 elements where that is more.
        piece_bytes: bytes of it, in the file and in the tile.

    """

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    piece_elements: int
    piece_bytes: int

    @property
    def row_groups(self) -> int:
        """Rows of tiles."""
        return self.rows // self.tile_rows

    @property
    def tiles_across(self) -> int:
        """Tiles along a row."""
        return self.columns // self.tile_columns

    @property
    def tile_pieces(self) -> int:
        """Pieces of a tile."""
        return self.tile_rows * self.tile_columns // self.piece_elements

    @property
    def used_bytes(self) -> int:
        """Bytes of a tile that hold the weight."""
        return self.tile_pieces * self.piece_bytes

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile; the last few may be zeros that keep the next one aligned."""
        return -(-self.used_bytes // TILE_ALIGNMENT) * TILE_ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of the weight on the device."""
        return self.row_groups * self.tiles_across * self.tile_bytes

    @property
    def busy_lanes(self) -> float:
        """Share of lanes with something to do when a warp takes a tile, its rows side by side."""
        lanes = _LANES // self.tile_rows
        chunks = self.tile_columns // CHUNK
        return chunks / (-(-chunks // lanes) * lanes)

    @property
    def padding(self) -> float:
        """Share of bytes added."""
        return self.tile_bytes / self.used_bytes - 1


def _widths(qtype: QType, columns: int, piece: int) -> Iterator[int]:
    """For each of `_WIDTHS` the widest equal part of a row in it, or 0; at last a piece."""
    pieces = columns // piece
    parts = [columns // count for count in range(1, pieces + 1) if pieces % count == 0]
    for widths in _WIDTHS:
        yield next((width for width in parts if width in widths and qtype.row_bytes(width) <= _MOST_ROW_BYTES), 0)
    yield piece


@cache
def tile_geometry(qtype: QType, rows: int, columns: int) -> TileGeometry:
    """The tiles of a weight; a function of its type and shape alone, so that every kernel and upload agrees.

    Tiles are the widest equal parts of a row that are whole pieces and of 1024 to 4096 columns; where there are none,
    the widest that a ring of two holds. Of the numbers of rows that divide the weight's, the least is taken that keeps
    lanes busy and padding small.

    Raises:
        UnsupportedError: when a row is not whole pieces of 32 elements and whole blocks.

    """
    piece = lcm(qtype.block_elements, CHUNK)
    if rows < 1 or columns < 1 or columns % piece:
        raise UnsupportedError(
            f"{qtype.name} weight of {rows} x {columns}: the CUDA executor wants rows of whole {piece} elements"
        )
    tile_columns = next(width for width in _widths(qtype, columns, piece) if width)
    choices = [
        TileGeometry(
            rows=rows,
            columns=columns,
            tile_rows=tile_rows,
            tile_columns=tile_columns,
            piece_elements=piece,
            piece_bytes=qtype.row_bytes(piece),
        )
        for tile_rows in _TILE_ROWS
        if rows % tile_rows == 0
    ]
    lean = [choice for choice in choices if choice.padding <= _MOST_PADDING]
    choices = lean or [min(choices, key=lambda choice: choice.padding)]
    wanted = _GOOD_ENOUGH * max(choice.busy_lanes for choice in choices)
    return next(choice for choice in choices if choice.busy_lanes >= wanted)


@frozen(eq=False)
class TileLayout:
    """Weights in tiles.

    Attributes:
        type: the type of the weights; it has planes.

    """

    type: QuantizationType
    name: str = "tiles"

    def nbytes(self, qtype: QType, rows: int, columns: int) -> int:
        return tile_geometry(qtype, rows, columns).nbytes

    def store(self, rows: NDArray[np.uint8], columns: int, out: NDArray[np.uint8]) -> None:
        geometry = tile_geometry(self.type.qtype, len(rows), columns)
        across, tile_rows = geometry.tiles_across, geometry.tile_rows
        tiles = out.reshape(geometry.row_groups, across * geometry.tile_bytes)
        step = max(1, _STORE_BYTES // (tile_rows * rows.shape[1]))
        for start in range(0, geometry.row_groups, step):
            stop = min(start + step, geometry.row_groups)
            piece = rows[start * tile_rows : stop * tile_rows]
            if across > 1:
                by_tile = piece.reshape(stop - start, tile_rows, across, -1).transpose(0, 2, 1, 3)
                piece = np.ascontiguousarray(by_tile)
            self._store_tiles(piece, geometry, tiles[start:stop].reshape(-1, geometry.tile_bytes))

    def _store_tiles(self, raw: NDArray[np.uint8], geometry: TileGeometry, tiles: NDArray[np.uint8]) -> None:
        """Write tiles whose pieces lie in `raw` in their order."""
        assert self.type.planes is not None, f"{self.type.qtype.name} has no planes"
        at = 0
        for plane in self.type.planes(raw.reshape(-1, geometry.piece_bytes)):
            width = geometry.tile_pieces * plane.shape[1]
            tiles[:, at : at + width].reshape(len(tiles), geometry.tile_pieces, plane.shape[1])[...] = plane.reshape(
                len(tiles), geometry.tile_pieces, plane.shape[1]
            )
            at += width
        assert at == geometry.used_bytes, f"{self.type.qtype.name}: planes of {at} bytes, wanted {geometry.used_bytes}"
        tiles[:, at:] = 0
