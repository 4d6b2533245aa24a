// out[r] = row `ids[r]` of a weight in tiles, as float32: token embeddings and learned positions. Block x is the row.
//
// Compile-time: WEIGHT, a Tile<type, tile rows, tile columns>; QTYPE, its type; COLS columns.
#include "activations.cuh"
#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(128) embed(const uint8* weight, const int* ids, float* out) {
    using T = WEIGHT;
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int id = ids[blockIdx.x];
    constexpr int kTilesAcross = COLS / T::kCols;
    const uint8* tiles = weight + static_cast<uint64>(id / T::kRows) * kTilesAcross * T::kBytes;
    float4* to = reinterpret_cast<float4*>(out + static_cast<size_t>(blockIdx.x) * COLS);
    for (int chunk = threadIdx.x; chunk < COLS / 32; chunk += blockDim.x) {
        const int across = chunk / T::kRowChunks;
        const auto w = T::template load<GlobalStream>(tiles + across * T::kBytes, id % T::kRows, chunk % T::kRowChunks);
#pragma unroll
        for (int group = 0; group < 8; ++group) to[8 * chunk + group] = QTYPE::dequantise4(w, group);
    }
}
