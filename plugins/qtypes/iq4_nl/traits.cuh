// IQ4_NL: 32 four-bit codes into a fixed table and one half-precision scale; x = d * table[code].
// Planes of a tile: codes, 16 bytes a chunk (iq4_codes.cuh) | scales, 2 bytes a chunk.
// File block, 18 bytes: scale | codes as the nibbles of Q4_0.
#pragma once

#include "../iq4_codes.cuh"

struct IQ4_NL {
    static constexpr int kBlock = 32, kBlockBytes = 18;
    static constexpr bool kIntegerDot = true;
    static constexpr bool kSigned = true;  // bytes of integers4

    struct Weight32 {
        uint4 codes;
        uint32 d;
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u16(tile + kElements / 2 + 2 * chunk)};
    }

    // Four signed integers, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return iq4_entries4(w.codes, group);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        return x.scale * half_bits(w.d) * static_cast<float>(dot_all<IQ4_NL>(w, x));
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
        put_u128(tile + 16 * chunk, gather_iq4_codes<IQ4_NL>(block + 2));
        put_u16(tile + kElements / 2 + 2 * chunk, *reinterpret_cast<const uint16*>(block));
    }
};
