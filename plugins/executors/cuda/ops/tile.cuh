// How a weight lies on the device: tiles of kTileRows rows x kTileCols columns, each a contiguous, 16-byte aligned run
// of bytes with the type's planes inside. A row of tiles covers the columns, row groups follow one another. The tile is
// the unit that a warp works on, wherever it lies. `layouts.py` writes what this reads.
#pragma once

#include "common.cuh"

template <class Q, int kRowsOfTile, int kColsOfTile>
struct Tile {
    static constexpr int kRows = kRowsOfTile;
    static constexpr int kCols = kColsOfTile;
    static constexpr int kElements = kRows * kCols;
    static constexpr int kBytes = ceil_div(Q::bytes(kElements), 16) * 16;
    static constexpr int kRowChunks = kCols / 32;
    static constexpr int kRowLanes = kWarp / kRows;  // lanes that share a row

    static_assert(kCols % Q::kBlock == 0, "a tile holds whole blocks of each of its rows");
    static_assert(kWarp % kRows == 0, "a warp is shared evenly by the rows of a tile");

    // The 32 elements `chunk` of row `row` of the tile at `bytes`.
    template <class Memory>
    static __device__ __forceinline__ typename Q::Weight32 load(const uint8* bytes, int row, int chunk) {
        return Q::template load<Memory, kElements>(bytes, row * kRowChunks + chunk);
    }
};
