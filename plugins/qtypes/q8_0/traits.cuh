// Q8_0: 32 signed bytes and one half-precision scale; x = d * q.
// Planes of a tile: elements 0-15 of each block | elements 16-31 | scales.
#pragma once

#include "activations.cuh"

struct Q8_0 {
    static constexpr int kBlock = 32;
    static constexpr bool kIntegerDot = true;
    static constexpr int bytes(int elements) { return elements / 32 * 34; }

    struct Weight32 {
        uint4 low, high;
        float d;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        constexpr int kChunks = kElements / 32;
        return {Memory::u128(tile + 16 * chunk), Memory::u128(tile + 16 * (kChunks + chunk)),
                half_bits(Memory::u16(tile + 32 * kChunks + 2 * chunk))};
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        int sum = dot4(w.low.x, x.low.x, 0);
        sum = dot4(w.low.y, x.low.y, sum);
        sum = dot4(w.low.z, x.low.z, sum);
        sum = dot4(w.low.w, x.low.w, sum);
        sum = dot4(w.high.x, x.high.x, sum);
        sum = dot4(w.high.y, x.high.y, sum);
        sum = dot4(w.high.z, x.high.z, sum);
        sum = dot4(w.high.w, x.high.w, sum);
        return w.d * x.scale * static_cast<float>(sum);
    }

    // Element 4 * group + i of the 32, for i = 0 … 3; `group` is a compile-time constant after unrolling.
    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        const uint32 q = word8(w.low, w.high, group);
        return make_float4(w.d * byte_at(q, 0), w.d * byte_at(q, 1), w.d * byte_at(q, 2), w.d * byte_at(q, 3));
    }
};
