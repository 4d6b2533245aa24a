// Rows of a GGUF tensor, as the file has them, to tiles. A thread writes what one chunk of 32 elements puts into the
// planes; neighbouring threads write neighbouring bytes.
//
// `raw` holds the rows of `row_groups` row groups, one after the other, and starts at a multiple of 4 bytes (2 where a
// block's bytes are not a multiple of 4). `tiles` is the place of the first of these row groups; 16-byte aligned.
//
// Compile-time: WEIGHT, a Tile<type, tile rows, tile columns>; QTYPE, its type; COLS columns.
#include "activations.cuh"
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(256) repack(const uint8* raw, uint8* tiles, int row_groups) {
    using T = WEIGHT;
    using Q = QTYPE;
    constexpr uint32 kTilesAcross = COLS / T::kCols, kBlockChunks = Q::kBlock / 32;
    constexpr uint32 kRowBytes = COLS / Q::kBlock * Q::kBlockBytes;
    const uint32 count = static_cast<uint32>(row_groups) * kTilesAcross * T::kChunks;
    for (uint32 at = blockIdx.x * blockDim.x + threadIdx.x; at < count; at += gridDim.x * blockDim.x) {
        const uint32 index = at / T::kChunks, chunk = at % T::kChunks;
        const uint32 row = index / kTilesAcross * T::kRows + chunk / T::kRowChunks;
        const uint32 row_chunk = index % kTilesAcross * T::kRowChunks + chunk % T::kRowChunks;
        const uint8* block = raw + static_cast<uint64>(row) * kRowBytes + row_chunk / kBlockChunks * Q::kBlockBytes;
        uint8* tile = tiles + static_cast<uint64>(index) * T::kBytes;
        Q::template repack<T::kElements>(block, tile, static_cast<int>(chunk));
        if (chunk == 0) {
            for (int i = T::kUsedBytes; i < T::kBytes; ++i) tile[i] = 0;
        }
    }
}
