// Q5_1: 32 five-bit integers with a half-precision scale and minimum; x = d * q + m.
// Planes of a tile: low nibbles (4-bit plane) | fifth bits (1-bit plane) | scale and minimum, 4 bytes a chunk.
// File block, 24 bytes: scale, minimum | fifth bits, bit l for element l | nibbles as in Q4_0.
#pragma once

#include "unpack.cuh"

struct Q5_1 {
    static constexpr int kBlock = 32, kBlockBytes = 24;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 low;
        uint32 high;
        uint32 factors;  // scale, minimum
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u32(tile + kElements / 2 + 4 * chunk),
                Memory::u32(tile + kElements / 8 * 5 + 4 * chunk)};
    }

    // Four integers of 0 … 31, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return nibbles4(w.low, group) | bits4(w.high, group, 4);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const float2 factors = half2_bits(w.factors);
        const float sum = static_cast<float>(dot_all<Q5_1>(w, x));
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
        put_u128(tile + 16 * chunk, raw_words4<Q5_1>(block + 8));
        put_u32(tile + kElements / 2 + 4 * chunk, spread_bits(raw_word<Q5_1>(block + 4)));
        put_u32(tile + kElements / 8 * 5 + 4 * chunk, raw_word<Q5_1>(block));
    }
};
