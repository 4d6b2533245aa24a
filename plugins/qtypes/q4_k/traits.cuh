// Q4_K: 256 nibbles in 8 groups of 32, each with a 6-bit scale and a 6-bit minimum, over a pair of half-precision
// factors; x = d * scale * q - dmin * min.
// Planes of a tile: nibbles, 16 bytes a group (byte i: element i low, element i + 16 high) | 16 bytes a block: d, dmin,
// 8 bytes of scale and min (low 4 bits each), 4 bytes of their high 2 bits, two groups a byte.
#pragma once

#include "activations.cuh"

struct Q4_K {
    static constexpr int kBlock = 256;
    static constexpr bool kIntegerDot = true;
    static constexpr int bytes(int elements) { return elements / 256 * 144; }

    struct Weight32 {
        uint4 q;
        float scale, minimum;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        const uint8* head = tile + kElements / 2 + 16 * (chunk / 8);
        const int group = chunk % 8;
        const float2 d = half2_bits(Memory::u32(head));
        const uint32 lows = Memory::u8(head + 4 + group);
        const uint32 highs = Memory::u8(head + 12 + group / 2) >> (4 * (group % 2));
        return {Memory::u128(tile + 16 * chunk), d.x * static_cast<float>((lows & 15u) | (highs & 3u) << 4),
                d.y * static_cast<float>(lows >> 4 | (highs & 12u) << 2)};
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const int sum = dot_nibbles(w.q, x);
        return x.scale * (w.scale * static_cast<float>(sum) - w.minimum * static_cast<float>(x.sum_low + x.sum_high));
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        const uint32 q = nibbles4(w.q, group);
        return make_float4(w.scale * byte_at(q, 0) - w.minimum, w.scale * byte_at(q, 1) - w.minimum,
                           w.scale * byte_at(q, 2) - w.minimum, w.scale * byte_at(q, 3) - w.minimum);
    }
};
