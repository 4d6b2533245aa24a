// How a weight lies on the device: tiles of kRows rows x kCols columns, each a contiguous, 16-byte aligned run of bytes
// with the type's planes inside. The tiles of a row group follow one another along the columns, row groups follow one
// another. A tile is what a warp works on, wherever it lies. `layouts.py` chooses the shape and writes the same bytes.
#pragma once

#include "common.cuh"

template <class Q, int kRowsOfTile, int kColsOfTile>
struct Tile {
    static constexpr int kRows = kRowsOfTile;
    static constexpr int kCols = kColsOfTile;
    static constexpr int kElements = kRows * kCols;
    static constexpr int kUsedBytes = kElements / Q::kBlock * Q::kBlockBytes;
    static constexpr int kBytes = ceil_div(kUsedBytes, 16) * 16;  // the rest is zeros
    static constexpr int kRowChunks = kCols / 32;
    static constexpr int kChunks = kElements / 32;
    static constexpr int kRowLanes = kWarp / kRows;  // lanes that share a row

    static_assert(Q::kBlock % 32 == 0 && kCols % Q::kBlock == 0, "a tile holds whole blocks of each of its rows");
    static_assert(kWarp % kRows == 0, "a warp is shared evenly by the rows of a tile");

    // The 32 elements `chunk` of row `row` of the tile at `bytes`.
    template <class Memory>
    static __device__ __forceinline__ typename Q::Weight32 load(const uint8* bytes, int row, int chunk) {
        return Q::template load<Memory, kElements>(bytes, row * kRowChunks + chunk);
    }
};
