// Q8_0: 32 signed bytes and one half-precision scale; x = d * q.
// Planes of a tile: elements 0-15 of each chunk | elements 16-31 | scales, 2 bytes a chunk.
// File block, 34 bytes: scale | bytes.
#pragma once

#include "unpack.cuh"

struct Q8_0 {
    static constexpr int kBlock = 32, kBlockBytes = 34;
    static constexpr bool kIntegerDot = true;
    static constexpr bool kSigned = true;  // bytes of integers4

    struct Weight32 {
        uint4 low, high;
        uint32 d;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u128(tile + kElements / 2 + 16 * chunk),
                Memory::u16(tile + kElements + 2 * chunk)};
    }

    // Four signed integers, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return word8(w.low, w.high, group);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        return x.scale * half_bits(w.d) * static_cast<float>(dot_all<Q8_0>(w, x));
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int ) {
        return make_float2(half_bits(w.d), 0.f);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return scaled4(integers4(w, group), affine(w, group / 4).x);
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        put_u128(tile + 16 * chunk, raw_words4<Q8_0>(block + 2));
        put_u128(tile + kElements / 2 + 16 * chunk, raw_words4<Q8_0>(block + 18));
        put_u16(tile + kElements + 2 * chunk, *reinterpret_cast<const uint16*>(block));
    }
};
