// What traits headers share: how the planes of a tile become words of four small integers, and how the blocks of a
// GGUF file become planes.
//
// A *chunk* is 32 neighbouring elements of a row; its *groups* 0 … 7 are four elements each, one word of four bytes.
// A group is a compile-time constant wherever it is used (loops are unrolled), so that every shift is one too.
//
//   plane   bytes a chunk   group g
//   4 bits  16              (uint4, word g % 4) >> (g < 4 ? 0 : 4) & 0x0f0f0f0f    as in GGML's own Q4_0
//   2 bits   8              (uint2, word g / 4) >> 2 * (g % 4)     & 0x03030303
//   1 bit    4              word >> g                              & 0x01010101
//   8 bits  16 + 16         word g % 4 of the first or the second plane
#pragma once

#include "activations.cuh"

// ---- words of a chunk

// Word `group` of eight: four in `low`, four in `high`.
__device__ __forceinline__ uint32 word8(const uint4& low, const uint4& high, int group) {
    const uint4& half = group < 4 ? low : high;
    const int place = group % 4;
    return place == 0 ? half.x : place == 1 ? half.y : place == 2 ? half.z : half.w;
}

// Moves bit `from` of a word to bit `to`.
__device__ __forceinline__ uint32 move_bits(uint32 word, int from, int to) {
    return to > from ? word << (to - from) : word >> (from - to);
}

__device__ __forceinline__ uint32 nibbles4(const uint4& plane, int group) {
    return word8(plane, plane, group) >> (group < 4 ? 0 : 4) & 0x0f0f0f0fu;
}

// The bit pairs of a group, at bit `to` of each byte.
__device__ __forceinline__ uint32 pairs4(const uint2& plane, int group, int to) {
    return move_bits(group < 4 ? plane.x : plane.y, 2 * (group % 4), to) & 0x03030303u << to;
}

// The single bits of a group, at bit `to` of each byte.
__device__ __forceinline__ uint32 bits4(uint32 plane, int group, int to) {
    return move_bits(plane, group, to) & 0x01010101u << to;
}

// ---- integers times activations

// Groups `first` … `first` + 3 of the products of a chunk, added to `sum`.
template <class Q>
__device__ __forceinline__ int dot_groups(const typename Q::Weight32& w, const Activation32& x, int first, int sum) {
#pragma unroll
    for (int group = first; group < first + 4; ++group) {
        sum = dot4(Q::integers4(w, group), word8(x.low, x.high, group), sum);
    }
    return sum;
}

template <class Q>
__device__ __forceinline__ int dot_low(const typename Q::Weight32& w, const Activation32& x) {
    return dot_groups<Q>(w, x, 0, 0);
}

template <class Q>
__device__ __forceinline__ int dot_high(const typename Q::Weight32& w, const Activation32& x) {
    return dot_groups<Q>(w, x, 4, 0);
}

template <class Q>
__device__ __forceinline__ int dot_all(const typename Q::Weight32& w, const Activation32& x) {
    return dot_groups<Q>(w, x, 4, dot_low<Q>(w, x));
}

// Four unsigned bytes times four signed ones.
__device__ __forceinline__ int dot4_unsigned(uint32 weights, uint32 activations, int sum) {
#ifdef __CUDA_ARCH__
    int result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(weights), "r"(activations), "r"(sum));
    return result;
#else
    for (int i = 0; i < 4; ++i) {
        sum += static_cast<int>(weights >> (8 * i) & 0xffu) * static_cast<int8>(activations >> (8 * i));
    }
    return sum;
#endif
}

// As `dot_all` for a plain 4-bit plane. The high nibbles stay where they are, as sixteen times themselves, and the sum
// is shifted: one shift instead of four.
__device__ __forceinline__ int dot_nibbles(const uint4& plane, const Activation32& x) {
    int sum = 0;
#pragma unroll
    for (int group = 4; group < 8; ++group) {
        sum = dot4_unsigned(word8(plane, plane, group) & 0xf0f0f0f0u, word8(x.low, x.high, group), sum);
    }
    sum >>= 4;
#pragma unroll
    for (int group = 0; group < 4; ++group) sum = dot4(nibbles4(plane, group), word8(x.low, x.high, group), sum);
    return sum;
}

// ---- integers to floats

// Scale times byte plus offset (`affine`, x and y) for four unsigned bytes. The product is exact in every type here (at
// most 24 bits), so fusing the two rounds once, as GGML's multiply and add do.
__device__ __forceinline__ float4 affine4(uint32 bytes, float2 affine) {
    return make_float4(fmaf(affine.x, static_cast<float>(bytes & 0xffu), affine.y),
                       fmaf(affine.x, static_cast<float>(bytes >> 8 & 0xffu), affine.y),
                       fmaf(affine.x, static_cast<float>(bytes >> 16 & 0xffu), affine.y),
                       fmaf(affine.x, static_cast<float>(bytes >> 24), affine.y));
}

// scale * byte for four signed bytes.
__device__ __forceinline__ float4 scaled4(uint32 bytes, float scale) {
    return make_float4(scale * static_cast<float>(static_cast<int8>(bytes)),
                       scale * static_cast<float>(static_cast<int8>(bytes >> 8)),
                       scale * static_cast<float>(static_cast<int8>(bytes >> 16)),
                       scale * static_cast<float>(static_cast<int8>(bytes >> 24)));
}

// ---- blocks of a file to planes

// Four bytes of a block as the file has them. Blocks of 4 n bytes start at multiples of four, others at even addresses.
template <class Q>
__device__ __forceinline__ uint32 raw_word(const uint8* p) {
    if constexpr (Q::kBlockBytes % 4 == 0) {
        return *reinterpret_cast<const uint32*>(p);
    } else {
        const uint16* halves = reinterpret_cast<const uint16*>(p);
        return halves[0] | static_cast<uint32>(halves[1]) << 16;
    }
}

template <class Q>
__device__ __forceinline__ uint4 raw_words4(const uint8* p) {
    return make_uint4(raw_word<Q>(p), raw_word<Q>(p + 4), raw_word<Q>(p + 8), raw_word<Q>(p + 12));
}

__device__ __forceinline__ void put_u128(uint8* p, const uint4& v) { *reinterpret_cast<uint4*>(p) = v; }
__device__ __forceinline__ void put_u64(uint8* p, const uint2& v) { *reinterpret_cast<uint2*>(p) = v; }
__device__ __forceinline__ void put_u32(uint8* p, uint32 v) { *reinterpret_cast<uint32*>(p) = v; }
__device__ __forceinline__ void put_u16(uint8* p, uint32 v) { *reinterpret_cast<uint16*>(p) = static_cast<uint16>(v); }

// 4-bit plane of a chunk whose element l is bits `shift` … `shift` + 3 of byte l of 32.
template <class Q>
__device__ __forceinline__ uint4 gather_nibbles(const uint8* bytes, int shift) {
    constexpr uint32 kMask = 0x0f0f0f0fu;
    const uint4 a = raw_words4<Q>(bytes), b = raw_words4<Q>(bytes + 16);
    return make_uint4((a.x >> shift & kMask) | (b.x >> shift & kMask) << 4,
                      (a.y >> shift & kMask) | (b.y >> shift & kMask) << 4,
                      (a.z >> shift & kMask) | (b.z >> shift & kMask) << 4,
                      (a.w >> shift & kMask) | (b.w >> shift & kMask) << 4);
}

// 2-bit plane of a chunk whose element l is bits `shift` and `shift` + 1 of byte l of 32.
template <class Q>
__device__ __forceinline__ uint2 gather_pairs(const uint8* bytes, int shift) {
    uint32 words[2] = {0, 0};
#pragma unroll
    for (int group = 0; group < 8; ++group) {
        words[group / 4] |= (raw_word<Q>(bytes + 4 * group) >> shift & 0x03030303u) << (2 * (group % 4));
    }
    return make_uint2(words[0], words[1]);
}

// 1-bit plane of a chunk whose element l is bit `shift` of byte l of 32.
template <class Q>
__device__ __forceinline__ uint32 gather_bits(const uint8* bytes, int shift) {
    uint32 word = 0;
#pragma unroll
    for (int group = 0; group < 8; ++group) {
        word |= (raw_word<Q>(bytes + 4 * group) >> shift & 0x01010101u) << group;
    }
    return word;
}

// 1-bit plane of a chunk whose element l is bit l of a word.
__device__ __forceinline__ uint32 spread_bits(uint32 in_order) {
    uint32 word = 0;
#pragma unroll
    for (int group = 0; group < 8; ++group) {
        const uint32 four = in_order >> (4 * group) & 15u;
        word |= (four * 0x00204081u & 0x01010101u) << group;  // bit i to bit 8 * i
    }
    return word;
}
