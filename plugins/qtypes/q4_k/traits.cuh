// Q4_K: 256 nibbles; each 32 have a 6-bit scale and a 6-bit minimum over a pair of half-precision factors;
// x = d * scale * q - dmin * min.
// Planes of a tile: nibbles (4-bit plane) | 16 bytes a block: d, dmin, pairs of scale and minimum (k_scales.cuh).
// File block, 144 bytes: d, dmin | scales and minimums (k_scales.cuh) | nibbles, those of chunk c at bit 4 * (c % 2) of
// bytes 32 * (c / 2) … of 128.
#pragma once

#include "../k_scales.cuh"

struct Q4_K {
    static constexpr int kBlock = 256, kBlockBytes = 144;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 q, head;
        int c;  // chunk within the block
    };

    // The eight lanes of a block read the same head.
    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u128(tile + kElements / 2 + 16 * (chunk >> 3)), chunk & 7};
    }

    // Four integers of 0 … 15, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) { return nibbles4(w.q, group); }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        return x.scale * ScaleAndMinimum::of(w.head, w.c).apply(dot_nibbles(w.q, x), x);
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
        put_u128(tile + 16 * chunk, gather_nibbles<Q4_K>(block + 16 + 32 * (c / 2), 4 * (c % 2)));
        if (c == 0) ScaleAndMinimum::repack<Q4_K>(block, tile + kElements / 2 + 16 * (chunk >> 3));
    }
};
