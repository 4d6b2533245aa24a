// BF16: the upper halves of single-precision floats, as they are.
// Planes of a tile: elements 0-7 of each chunk | 8-15 | 16-23 | 24-31, 16 bytes each.
#pragma once

#include "unpack.cuh"

struct BF16 {
    static constexpr int kBlock = 32, kBlockBytes = 64;  // the file has no blocks; a chunk is as good
    static constexpr bool kIntegerDot = false;           // products are taken with float32 activations

    struct Weight32 {
        uint4 part[4];
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        Weight32 w;
#pragma unroll
        for (int i = 0; i < 4; ++i) w.part[i] = Memory::u128(tile + 16 * (i * (kElements / 32) + chunk));
        return w;
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        const uint4& part = w.part[group / 2];
        const uint32 first = group % 2 ? part.z : part.x, second = group % 2 ? part.w : part.y;
        return make_float4(__uint_as_float(first << 16), __uint_as_float(first & 0xffff0000u),
                           __uint_as_float(second << 16), __uint_as_float(second & 0xffff0000u));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            put_u128(tile + 16 * (i * (kElements / 32) + chunk), raw_words4<BF16>(block + 16 * i));
        }
    }
};
