// Q3_K: 256 three-bit integers with an offset of 4; each 16 have a 6-bit scale with an offset of 32 over one
// half-precision factor; x = d * (scale - 32) * (q - 4).
// Planes of a tile: low two bits (2-bit plane) | third bits (1-bit plane) | 12 bytes a block: pairs of scales
// (k_scales.cuh), of elements 0-15 and 16-31 of a chunk | d, 2 bytes a block.
// File block, 110 bytes: third bits, those of chunk c at bit c of 32 bytes | low bits as in Q2_K | scales, see
// `scale_in_file` | d.
#pragma once

#include "../k_scales.cuh"

struct Q3_K {
    static constexpr int kBlock = 256, kBlockBytes = 110;
    static constexpr bool kIntegerDot = true;

    struct Weight32 {
        uint2 low;
        uint32 high, scale_lows, scale_highs, d;
        int c;  // chunk within the block

        // Scales of elements 0-15 and 16-31, each plus 32, one a byte.
        __device__ __forceinline__ uint32 pair() const { return six_bit_pair(scale_lows, scale_highs, c); }
        __device__ __forceinline__ int2 scales() const {
            return make_int2(static_cast<int>(pair() & 0xffu) - 32, static_cast<int>(pair() >> 8) - 32);
        }
    };

    template <class Memory, int kElements>
    static __device__ __forceinline__ Weight32 load(const uint8* tile, int chunk) {
        const uint8* scales = tile + kElements / 8 * 3 + 12 * (chunk >> 3);
        const int c = chunk & 7;
        return {Memory::u64(tile + 8 * chunk),
                Memory::u32(tile + kElements / 4 + 4 * chunk),
                Memory::u32(scales + 4 * (c >> 1 & 1)),
                Memory::u32(scales + 8),
                Memory::u16(tile + kElements / 128 * 54 + 2 * (chunk >> 3)),
                c};
    }

    // Four integers of 0 … 7, one a byte.
    static __device__ __forceinline__ uint32 integers4(const Weight32& w, int group) {
        return pairs4(w.low, group, 0) | bits4(w.high, group, 2);
    }

    static __device__ __forceinline__ float dot(const Weight32& w, const Activation32& x) {
        const int2 scales = w.scales();
        const int sums = x.sums_times(0xe0e0u, x.sums_times(w.pair()));  // times the scales: -32 for each half
        const int sum = scales.x * dot_low<Q3_K>(w, x) + scales.y * dot_high<Q3_K>(w, x) - 4 * sums;
        return x.scale * half_bits(w.d) * static_cast<float>(sum);
    }

    // Scale and offset that make values of the integers of elements 0-15 (half 0) or 16-31.
    static __device__ __forceinline__ float2 affine(const Weight32& w, int half) {
        const int2 scales = w.scales();
        const float scale = half_bits(w.d) * static_cast<float>(half == 0 ? scales.x : scales.y);
        return make_float2(scale, -4.f * scale);
    }

    static __device__ __forceinline__ float4 dequantise4(const Weight32& w, int group) {
        return affine4(integers4(w, group), affine(w, group / 4));
    }

    template <int kElements>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* tile, int chunk) {
        const int c = chunk & 7;
        put_u64(tile + 8 * chunk, gather_pairs<Q3_K>(block + 32 + 32 * (c / 4), 2 * (c % 4)));
        put_u32(tile + kElements / 4 + 4 * chunk, gather_bits<Q3_K>(block, c));
        if (c != 0) return;
        uint32 words[3] = {0, 0, 0};
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            put_six_bit_pair(words, pair, scale_in_file(block + 96, 2 * pair), scale_in_file(block + 96, 2 * pair + 1));
        }
        uint8* scales = tile + kElements / 8 * 3 + 12 * (chunk >> 3);
#pragma unroll
        for (int i = 0; i < 3; ++i) put_u32(scales + 4 * i, words[i]);
        put_u16(tile + kElements / 128 * 54 + 2 * (chunk >> 3), *reinterpret_cast<const uint16*>(block + 108));
    }

  private:
    // Scale `j` (0 … 15) in the 12 bytes of the file: low nibble at byte j % 8, bit 4 * (j / 8); high bits at byte
    // 8 + j % 4, bit 2 * (j / 4).
    static __device__ __forceinline__ uint32 scale_in_file(const uint8* bytes, int j) {
        return (bytes[j % 8] >> (4 * (j / 8)) & 15u) | (bytes[8 + j % 4] >> (2 * (j / 4)) & 3u) << 4;
    }
};
