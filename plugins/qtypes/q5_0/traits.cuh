// Q5_0: 32 five-bit integers with an offset of 16 and one half-precision scale; x = d * (q - 16).
// Planes of a tile: low nibbles (4-bit plane) | fifth bits (1-bit plane) | scales, 2 bytes a chunk.
// File block, 22 bytes: scale | fifth bits, bit l for element l | nibbles as in Q4_0.
#pragma once

#include "unpack.cuh"

struct Q5_0 {
    static constexpr int kBlock = 32, kBlockBytes = 22;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 low;
        uint32 high;
        uint32 d;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u32(tile + kElements / 2 + 4 * chunk),
                Memory::u16(tile + kElements / 8 * 5 + 2 * chunk)};
    }

    // Four integers of 0 … 31, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return nibbles4(w.low, group) | bits4(w.high, group, 4);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const int sum = x.sums_times(0xf0f0u, dot_all<Q5_0>(w, x));  // -16 for each half
        return x.scale * half_bits(w.d) * static_cast<float>(sum);
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int ) {
        const float d = half_bits(w.d);
        return make_float2(d, -16.f * d);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        put_u128(tile + 16 * chunk, raw_words4<Q5_0>(block + 6));
        put_u32(tile + kElements / 2 + 4 * chunk, spread_bits(raw_word<Q5_0>(block + 2)));
        put_u16(tile + kElements / 8 * 5 + 2 * chunk, *reinterpret_cast<const uint16*>(block));
    }
};
