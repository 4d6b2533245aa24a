// IQ4_XS: 256 four-bit codes into a fixed table; each 32 have a 6-bit scale with an offset of 32 over one
// half-precision factor; x = d * (scale - 32) * table[code].
// Planes of a tile: codes, 16 bytes a chunk (iq4_codes.cuh) | the first 8 bytes of each block as in the file.
// File block, 136 bytes: d | high two bits of the scales, 16 bits | their low nibbles, 32 bits | codes, 16 bytes a
// chunk as the nibbles of Q4_0.
#pragma once

#include "../iq4_codes.cuh"

struct IQ4_XS {
    static constexpr int kBlock = 256, kBlockBytes = 136;
    static constexpr bool kIntegerDot = true;
    static constexpr bool kSigned = true;  // bytes of integers4

    struct Weight32 {
        uint4 codes;
        uint2 head;
        int c;  // chunk within the block

        __device__ __forceinline__ float scale() const {
            const uint32 low = head.y >> (4 * c) & 15u, high = head.x >> (16 + 2 * c) & 3u;
            return half_bits(head.x) * static_cast<float>(static_cast<int>(low | high << 4) - 32);
        }
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        return {Memory::u128(tile + 16 * chunk), Memory::u64(tile + kElements / 2 + 8 * (chunk >> 3)), chunk & 7};
    }

    // Four signed integers, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return iq4_entries4(w.codes, group);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        return x.scale * w.scale() * static_cast<float>(dot_all<IQ4_XS>(w, x));
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int ) {
        return make_float2(w.scale(), 0.f);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return scaled4(integers4(w, group), affine(w, group / 4).x);
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        const int c = chunk & 7;
        put_u128(tile + 16 * chunk, gather_iq4_codes<IQ4_XS>(block + 8 + 16 * c));
        if (c == 0) {
            const uint2 head = make_uint2(raw_word<IQ4_XS>(block), raw_word<IQ4_XS>(block + 4));
            put_u64(tile + kElements / 2 + 8 * (chunk >> 3), head);
        }
    }
};
