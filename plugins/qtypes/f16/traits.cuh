// F16: half-precision floats as they are.
// Planes of a tile: elements 0-7 of each 32 | 8-15 | 16-23 | 24-31.
#pragma once

#include "activations.cuh"

struct F16 {
    static constexpr int kBlock = 32;
    static constexpr bool kIntegerDot = false;  // products are taken with float32 activations
    static constexpr int bytes(int elements) { return elements * 2; }

    struct Weight32 {
        uint4 part[4];
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        constexpr int kChunks = kElements / 32;
        Weight32 w;
#pragma unroll
        for (int i = 0; i < 4; ++i) w.part[i] = Memory::u128(tile + 16 * (i * kChunks + chunk));
        return w;
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        const uint4 part = w.part[group / 2];
        const float2 a = half2_bits(group % 2 ? part.z : part.x), b = half2_bits(group % 2 ? part.w : part.y);
        return make_float4(a.x, a.y, b.x, b.y);
    }
};
