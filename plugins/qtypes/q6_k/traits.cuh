// Q6_K: 256 six-bit integers with an offset of 32; each 16 have a signed 8-bit scale over one half-precision factor;
// x = d * scale * (q - 32).
// Planes of a tile: low nibbles (4-bit plane) | high two bits (2-bit plane) | 16 scales a block | d, 2 bytes a block.
// File block, 210 bytes: nibbles, those of chunk c at bit 4 * (c / 2 % 2) of bytes 64 * (c / 4) + 32 * (c % 2) … of 128
// | high bits, those of chunk c at bit 2 * (c % 4) of bytes 32 * (c / 4) … of 64 | scales | d.
#pragma once

#include "unpack.cuh"

struct Q6_K {
    static constexpr int kBlock = 256, kBlockBytes = 210;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 low;
        uint2 high;
        uint32 scales, d;

        // Scale of elements 0-15 (half 0) or 16-31 (half 1).
        __device__ __forceinline__ int scale(int half) const { return static_cast<int8>(scales >> (8 * half)); }
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u64(tile + kElements / 2 + 8 * chunk),
                Memory::u16(tile + kElements / 4 * 3 + 2 * chunk),
                Memory::u16(tile + kElements / 16 * 13 + 2 * (chunk >> 3))};
    }

    // Four integers of 0 … 63, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return nibbles4(w.low, group) | pairs4(w.high, group, 4);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const int sum = w.scale(0) * dot_low<Q6_K>(w, x) + w.scale(1) * dot_high<Q6_K>(w, x) - 32 * x.sums_times(w.scales);
        return x.scale * half_bits(w.d) * static_cast<float>(sum);
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int half) {
        const float scale = half_bits(w.d) * static_cast<float>(w.scale(half));
        return make_float2(scale, -32.f * scale);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        const int c = chunk & 7;
        put_u128(tile + 16 * chunk, gather_nibbles<Q6_K>(block + 64 * (c / 4) + 32 * (c % 2), 4 * (c / 2 % 2)));
        put_u64(tile + kElements / 2 + 8 * chunk, gather_pairs<Q6_K>(block + 128 + 32 * (c / 4), 2 * (c % 4)));
        put_u16(tile + kElements / 4 * 3 + 2 * chunk, reinterpret_cast<const uint16*>(block + 192)[c]);
        if (c != 0) return;
        put_u16(tile + kElements / 16 * 13 + 2 * (chunk >> 3), *reinterpret_cast<const uint16*>(block + 208));
    }
};
