// Pairs of 6-bit numbers, one pair a chunk: 12 bytes for the eight chunks of 256 elements. Q3_K keeps two scales so,
// Q4_K and Q5_K a scale and a minimum.
//
// Words 0 and 1 hold the low four bits: chunk c in word c / 2 % 2, 16-bit half c % 2, at bit 4 * (c / 4); the first
// number in the low byte of the half, the second in the high one. Word 2 holds the high two bits: half c % 2, at bit
// 2 * (c / 2). So a pair comes out as two neighbouring bytes after two shifts and two masks.
#pragma once

#include "unpack.cuh"

// The pair of chunk `c` (0 … 7), first number in byte 0, second in byte 1. `lows` is word c / 2 % 2.
__device__ __forceinline__ uint32 six_bit_pair(uint32 lows, uint32 highs, int c) {
    const int half = 16 * (c & 1);
    const uint32 low = lows >> (half + (c & 4));
    const uint32 high = __funnelshift_r(highs, highs, half + (c & 6) + 28);  // the bit moves to 4
    return (low & 0x0f0fu) | (high & 0x3030u);
}

// Adds a pair to the three words; `c` is a compile-time constant.
__device__ __forceinline__ void put_six_bit_pair(uint32* words, int c, uint32 first, uint32 second) {
    words[c / 2 % 2] |= ((first & 15u) | (second & 15u) << 8) << (16 * (c % 2) + 4 * (c / 4));
    words[2] |= (first >> 4 | second >> 4 << 8) << (16 * (c % 2) + 2 * (c / 2));
}

// The head of a block as Q4_K and Q5_K have it.
struct ScaleAndMinimum {
    uint32 pair;     // of one chunk, each 0 … 63: scale in byte 0, minimum in byte 1
    float2 factors;  // d, dmin

    // From the 16 bytes in a tile: d, dmin, pairs. `c` is the chunk within the block.
    static __device__ __forceinline__ ScaleAndMinimum of(const uint4& head, int c) {
        return {six_bit_pair(c & 2 ? head.z : head.y, head.w, c), half2_bits(head.x)};
    }

    // Of a chunk's products, a sum of integers, and its activations; exact until the floats.
    __device__ __forceinline__ float apply(int products, const Activation32& x) const {
        const int minimums = x.sums_times(__byte_perm(pair, 0u, 0x4411));  // the minimum for each half
        return factors.x * static_cast<float>(scale() * products) - factors.y * static_cast<float>(minimums);
    }

    __device__ __forceinline__ float2 affine() const {
        return make_float2(factors.x * static_cast<float>(scale()), -(factors.y * static_cast<float>(pair >> 8)));
    }

    // The 16 bytes of a tile from the 16 at the start of a block in the file.
    template <class Q>
    static __device__ __forceinline__ void repack(const uint8* block, uint8* head) {
        uint32 words[3] = {0, 0, 0};
#pragma unroll
        for (int c = 0; c < 8; ++c) put_six_bit_pair(words, c, in_file(block + 4, 0, c), in_file(block + 4, 4, c));
        put_u128(head, make_uint4(raw_word<Q>(block), words[0], words[1], words[2]));
    }

  private:
    __device__ __forceinline__ int scale() const { return static_cast<int>(pair & 0xffu); }

    // The scale (`at` 0) or minimum (`at` 4) of chunk `c` in the 12 bytes of the file: chunks 0-3 in the low six bits
    // of byte at + c; chunks 4-7 with their low nibble in byte 8 + c % 4, at bit `at`, and their high bits above those
    // six.
    static __device__ __forceinline__ uint32 in_file(const uint8* bytes, int at, int c) {
        if (c < 4) return bytes[at + c] & 63u;
        return (bytes[8 + c % 4] >> at & 15u) | static_cast<uint32>(bytes[at + c % 4] >> 6) << 4;
    }
};
