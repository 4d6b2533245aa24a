// F32: single-precision floats as they are.
// Planes of a tile: elements 0-3 of each chunk | 4-7 | … | 28-31, 16 bytes each.
#pragma once

#include "unpack.cuh"

struct F32 {
    static constexpr int kBlock = 32, kBlockBytes = 128;  // the file has no blocks; a chunk is as good
    static constexpr bool kIntegerDot = false;            // products are taken with float32 activations

    struct Weight32 {
        uint4 part[8];
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        Weight32 w;
#pragma unroll
        for (int i = 0; i < 8; ++i) w.part[i] = Memory::u128(tile + 16 * (i * (kElements / 32) + chunk));
        return w;
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        const uint4& p = w.part[group];
        return make_float4(__uint_as_float(p.x), __uint_as_float(p.y), __uint_as_float(p.z), __uint_as_float(p.w));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            put_u128(tile + 16 * (i * (kElements / 32) + chunk), raw_words4<F32>(block + 16 * i));
        }
    }
};
