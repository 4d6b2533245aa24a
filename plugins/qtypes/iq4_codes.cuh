// The 4-bit codes of IQ4_NL and IQ4_XS: indices into a fixed table of sixteen signed integers.
//
// Their plane is not the 4-bit plane of the other types: element l of a chunk is nibble l of 16 bytes, so that the
// four of a group are 16 neighbouring bits, which is what a byte permutation takes as its selectors. And bits 2 and 3
// of each code are exchanged. Bit 2 then tells negative table entries from positive ones, and bit 3 chooses between two
// tables of eight whose entries have equal signs at equal indices; `iq4_entries` needs that.
#pragma once

#include "unpack.cuh"

// Byte i of the result is byte s of the eight in `high`:`low`, s being the low three bits of nibble i of `selectors`;
// where the nibble's fourth bit is set, it is the sign of that byte instead, 0 or 0xff. (PTX: prmt.b32.)
__device__ __forceinline__ uint32 signed_permute(uint32 low, uint32 high, uint32 selectors) {
#ifdef __CUDA_ARCH__
    uint32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selectors));
    return result;
#else
    uint32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32 selector = selectors >> (4 * i) & 15u, word = selector & 4u ? high : low;
        uint32 byte = word >> (8 * (selector & 3u)) & 0xffu;
        if (selector & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        result |= byte << (8 * i);
    }
    return result;
#endif
}

// The two tables. In constant memory because the compiler writes an immediate into a register again before each use.
__constant__ uint32 kIq4First[2] = {0xbfad9881u, 0x26190d01u};   // -127 -104 -83 -65, 1 13 25 38
__constant__ uint32 kIq4Second[2] = {0x09152230u, 0x71594535u};  // ~-49 ~-35 ~-22 ~-10, 53 69 89 113

// Four table entries, one a signed byte, for the codes in the low 16 bits.
//
// Each permutation gives entries where its own bit 3 is clear and signs where it is set; the second one has bit 3
// inverted, so exactly one of the two is an entry. The second table holds its entries as positive numbers, inverted
// where they are negative: its sign bytes are 0, and those of the first table undo the inversion.
__device__ __forceinline__ uint32 iq4_entries(uint32 codes) {
    const uint32 first = signed_permute(kIq4First[0], kIq4First[1], codes);
    const uint32 second = signed_permute(kIq4Second[0], kIq4Second[1], codes ^ 0x8888u);
    return first ^ second;
}

// The entries of group `group` of a chunk.
__device__ __forceinline__ uint32 iq4_entries4(const uint4& codes, int group) {
    const uint32 word = group < 4 ? (group < 2 ? codes.x : codes.y) : (group < 6 ? codes.z : codes.w);
    return iq4_entries(group % 2 ? word >> 16 : word);
}

// The plane of a chunk from the 16 bytes of the file, byte i: element i low, element i + 16 high.
template <class Q>
__device__ __forceinline__ uint4 gather_iq4_codes(const uint8* bytes) {
    uint32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32 word = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // four bytes of the file, one nibble of each: 16 bits of the plane
            uint32 q = raw_word<Q>(bytes + 8 * (i % 2) + 4 * half) >> (i < 2 ? 0 : 4) & 0x0f0f0f0fu;
            q = (q | q >> 4) & 0x00ff00ffu;
            word |= ((q | q >> 8) & 0xffffu) << (16 * half);
        }
        words[i] = (word & 0x33333333u) | (word & 0x44444444u) << 1 | (word & 0x88888888u) >> 1;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}
