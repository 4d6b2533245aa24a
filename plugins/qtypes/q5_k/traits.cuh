// Q5_K: 256 five-bit integers; each 32 have a 6-bit scale and a 6-bit minimum over a pair of half-precision factors;
// x = d * scale * q - dmin * min.
// Planes of a tile: low nibbles (4-bit plane) | fifth bits (1-bit plane) | 16 bytes a block: d, dmin, pairs of scale
// and minimum (k_scales.cuh).
// File block, 176 bytes: d, dmin | scales and minimums (k_scales.cuh) | fifth bits, those of chunk c at bit c of 32
// bytes | nibbles as in Q4_K.
#pragma once

#include "../k_scales.cuh"

struct Q5_K {
    static constexpr int kBlock = 256, kBlockBytes = 176;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 low, head;
        uint32 high;
        int c;  // chunk within the block
    };

    // The eight lanes of a block read the same head.
    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u128(tile + kElements / 8 * 5 + 16 * (chunk >> 3)),
                Memory::u32(tile + kElements / 2 + 4 * chunk), chunk & 7};
    }

    // Four integers of 0 … 31, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return nibbles4(w.low, group) | bits4(w.high, group, 4);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        return x.scale * ScaleAndMinimum::of(w.head, w.c).apply(dot_all<Q5_K>(w, x), x);
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int ) {
        return ScaleAndMinimum::of(w.head, w.c).affine();
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        const int c = chunk & 7;
        put_u128(tile + 16 * chunk, gather_nibbles<Q5_K>(block + 48 + 32 * (c / 2), 4 * (c % 2)));
        put_u32(tile + kElements / 2 + 4 * chunk, gather_bits<Q5_K>(block + 16, c));
        if (c == 0) ScaleAndMinimum::repack<Q5_K>(block, tile + kElements / 8 * 5 + 16 * (chunk >> 3));
    }
};
