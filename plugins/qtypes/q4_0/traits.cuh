// Q4_0: 32 nibbles with an offset of 8 and one half-precision scale; x = d * (q - 8).
// Planes of a tile: nibbles (4-bit plane) | scales, 2 bytes a chunk.
// File block, 18 bytes: scale | nibbles, byte i: element i low, element i + 16 high.
#pragma once

#include "unpack.cuh"

struct Q4_0 {
    static constexpr int kBlock = 32, kBlockBytes = 18;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint4 q;
        uint32 d;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u16(tile + kElements / 2 + 2 * chunk)};
    }

    // Four integers of 0 … 15, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) { return nibbles4(w.q, group); }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const int sum = x.sums_times(0xf8f8u, dot_nibbles(w.q, x));  // -8 for each half
        return x.scale * half_bits(w.d) * static_cast<float>(sum);
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int ) {
        const float d = half_bits(w.d);
        return make_float2(d, -8.f * d);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        put_u128(tile + 16 * chunk, raw_words4<Q4_0>(block + 2));
        put_u16(tile + kElements / 2 + 2 * chunk, *reinterpret_cast<const uint16*>(block));
    }
};
