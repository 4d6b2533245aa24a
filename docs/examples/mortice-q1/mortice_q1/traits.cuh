// Q1_0: 128 signs and one half-precision scale; x = d where the bit is set, else -d.
// Planes of a tile: bits (1-bit plane) | d, 2 bytes a block.
// File block, 18 bytes: d | bits in order.
#pragma once

#include "unpack.cuh"

struct Q1_0 {
    static constexpr int kBlock = 128, kBlockBytes = 18;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint32 bits, d;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u32(tile + 4 * chunk), Memory::u16(tile + kElements / 8 + 2 * (chunk >> 2))};
    }

    // Four integers of 0 or 1, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) { return bits4(w.bits, group, 0); }

    // A sign is 2 * bit - 1.
    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const int sum = x.sums_times(0xffffu, 2 * dot_all<Q1_0>(w, x));  // -1 for each half
        return x.scale * half_bits(w.d) * static_cast<float>(sum);
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31; here the same for both.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int) {
        const float d = half_bits(w.d);
        return make_float2(2.f * d, -d);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        const int c = chunk & 3;
        put_u32(tile + 4 * chunk, spread_bits(raw_word<Q1_0>(block + 2 + 4 * c)));
        if (c == 0) put_u16(tile + kElements / 8 + 2 * (chunk >> 2), *reinterpret_cast<const uint16*>(block));
    }
};
