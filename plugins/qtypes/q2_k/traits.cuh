// Q2_K: 256 two-bit integers; each 16 have a 4-bit scale and a 4-bit minimum over a pair of half-precision factors;
// x = d * scale * q - dmin * min.
// Planes of a tile: integers (2-bit plane) | 16 bytes a block: scale low, minimum high, for each 16 elements | d and
// dmin, 4 bytes a block.
// File block, 84 bytes: scales and minimums | integers, those of chunk c at bit 2 * (c % 4) of bytes 32 * (c / 4) …
// | d, dmin.
#pragma once

#include "unpack.cuh"

struct Q2_K {
    static constexpr int kBlock = 256, kBlockBytes = 84;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint2 q;
        uint32 scales;   // of elements 0-15 in byte 0, of 16-31 in byte 1; scale low, minimum high
        uint32 factors;  // d, dmin

        __device__ __forceinline__ int scale(int half) const { return scales >> (8 * half) & 15; }
        __device__ __forceinline__ int minimum(int half) const { return scales >> (8 * half + 4) & 15; }
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u64(tile + 8 * chunk), Memory::u16(tile + kElements / 4 + 2 * chunk),
                Memory::u32(tile + kElements / 16 * 5 + 4 * (chunk >> 3))};
    }

    // Four integers of 0 … 3, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) { return pairs4(w.q, group, 0); }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const float2 d = half2_bits(w.factors);
        const int sum = w.scale(0) * dot_low<Q2_K>(w, x) + w.scale(1) * dot_high<Q2_K>(w, x);
        const int minimum = x.sums_times(w.scales >> 4 & 0x0f0fu);
        return x.scale * (d.x * static_cast<float>(sum) - d.y * static_cast<float>(minimum));
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int half) {
        const float2 d = half2_bits(w.factors);
        return make_float2(d.x * static_cast<float>(w.scale(half)), -(d.y * static_cast<float>(w.minimum(half))));
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        const int c = chunk & 7;
        put_u64(tile + 8 * chunk, gather_pairs<Q2_K>(block + 16 + 32 * (c / 4), 2 * (c % 4)));
        put_u16(tile + kElements / 4 + 2 * chunk, reinterpret_cast<const uint16*>(block)[c]);
        if (c == 0) put_u32(tile + kElements / 16 * 5 + 4 * (chunk >> 3), raw_word<Q2_K>(block + 80));
    }
};
