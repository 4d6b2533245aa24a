// Every chunk of a weight through its traits: `load` with `dot` and `dequantise4`.
//
// Compile-time: WEIGHT, a Tile<type, tile rows, tile columns>; QTYPE, its type; COLS columns; MEMORY, GlobalStream or
// SharedTile (whose loads work on any memory).
#pragma once

#include "activations.cuh"
#include "tile.cuh"

template <class Q>
__device__ __forceinline__ float probe_dot(const typename Q::Weight32& w, const int8* q, float scale) {
    if constexpr (Q::kIntegerDot) {
        Activation32 x{};
        x.low = *reinterpret_cast<const uint4*>(q);
        x.high = *reinterpret_cast<const uint4*>(q + 16);
        x.scale = scale;
        for (int i = 0; i < 16; ++i) x.sum_low += q[i], x.sum_high += q[16 + i];
        return Q::dot(w, x);
    }
    return 0.f;
}

// values: (rows, COLS); products: (rows, COLS / 32), of each chunk with the activations q[COLS] * scales[COLS / 32].
extern "C" __global__ void probe(const uint8* tiles, const int8* q, const float* scales, float* values, float* products,
                                 int rows) {
    using T = WEIGHT;
    constexpr int kRowChunks = COLS / 32, kTilesAcross = COLS / T::kCols;
    for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < rows * kRowChunks; at += gridDim.x * blockDim.x) {
        const int row = at / kRowChunks, column = at % kRowChunks;
        const int index = row / T::kRows * kTilesAcross + column / T::kRowChunks;
        const uint8* tile = tiles + static_cast<uint64>(index) * T::kBytes;
        const auto w = T::template load<MEMORY>(tile, row % T::kRows, column % T::kRowChunks);
#pragma unroll
        for (int group = 0; group < 8; ++group) {
            const float4 v = QTYPE::dequantise4(w, group);
            float* to = values + 32 * static_cast<uint64>(at) + 4 * group;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        products[at] = probe_dot<QTYPE>(w, q + 32 * column, scales[column]);
    }
}
