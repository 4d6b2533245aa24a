// Q4_1: 32 nibbles with a half-precision scale and minimum; x = d * q + m.
// Planes of a tile: nibbles (4-bit plane) | scale and minimum, 4 bytes a chunk.
// File block, 20 bytes: scale, minimum | nibbles as in Q4_0.
#pragma once

#include "unpack.cuh"

struct Q4_1 {
    static constexpr int kBlock = 32, kBlockBytes = 20;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 q;
        uint32 factors;  // scale, minimum
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u32(tile + kElements / 2 + 4 * chunk)};
    }

    // Four integers of 0 … 15, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) { return nibbles4(w.q, group); }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const float2 factors = half2_bits(w.factors);
        const float sum = static_cast<float>(dot_nibbles(w.q, x));
        return x.scale * (factors.x * sum + factors.y * static_cast<float>(x.sum()));
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int ) {
        return half2_bits(w.factors);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        put_u128(tile + 16 * chunk, raw_words4<Q4_1>(block + 4));
        put_u32(tile + kElements / 2 + 4 * chunk, raw_word<Q4_1>(block));
    }
};
