// The KV cache: pages of kPageTokens tokens. A page of a layer holds, for each KV head, K (or V) of its tokens, head_dim
// elements each. A sequence is a table of page numbers, so that its pages may lie anywhere and be shared.
//
// Everything that depends on the type of the cache is here, behind functions templated on that type: __half, float, or
// Q8. A kernel takes the cache of a layer as `KV*`, asks for the row of a token with `kv_row`, and reads it with
// `kv_load8` or `kv_load8_half` and writes it with `kv_store`.
#pragma once

#include "common.cuh"

constexpr int kPageTokens = 64;

// Blocks of 32 neighbouring elements: int8 and a half that they are multiplied with. The int8 of all tokens of a page
// and head lie together, then their halves, so that eight elements are one aligned load.
struct Q8;
constexpr int kQ8Block = 32;

// What a step knows of its tokens, one entry a row. Written by the host before the step, or by the step before it.
struct StepRows {
    const int* token_ids;
    const int* positions;
    const int* tables;     // row -> first entry of its sequence's page table in `pages`
    const int* pages;      // page numbers of all sequences
};

// K (or V) of one token and head.
template <class T>
struct KvRow {
    T* values;
};

template <>
struct KvRow<Q8> {
    int8* values;
    __half* scales;
};

// The row of a token within a page, whose number among those of the layer is known. Elements of float and of __half are
// at kv_row(...).values, 16 bytes aligned where head_dim is a multiple of 8, row after row.
template <class T>
__device__ __forceinline__ KvRow<T> kv_row(T* cache, int page, int token, int head, int kv_heads, int head_dim) {
    return {cache + ((static_cast<size_t>(page) * kv_heads + head) * kPageTokens + token) * head_dim};
}

__device__ __forceinline__ KvRow<Q8> kv_row(Q8* cache, int page, int token, int head, int kv_heads, int head_dim) {
    const int blocks = head_dim / kQ8Block;
    const int page_bytes = kPageTokens * blocks * (kQ8Block + static_cast<int>(sizeof(__half)));
    int8* values = reinterpret_cast<int8*>(cache) + (static_cast<size_t>(page) * kv_heads + head) * page_bytes;
    __half* scales = reinterpret_cast<__half*>(values + kPageTokens * head_dim);
    return {values + token * head_dim, scales + token * blocks};
}

// The row of `position` in the sequence that row `row` of the step belongs to.
template <class T>
__device__ __forceinline__ KvRow<T> kv_row(T* cache, const StepRows& rows, int row, int position, int head, int kv_heads,
                                           int head_dim) {
    const int page = rows.pages[rows.tables[row] + position / kPageTokens];
    return kv_row(cache, page, position % kPageTokens, head, kv_heads, head_dim);
}

struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight load8(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// Elements 8 * part to 8 * part + 7 as the cache has them: few registers to hold while more are asked for.
template <class T>
struct KvEight;
template <>
struct KvEight<float> {
    Eight values;
};
template <>
struct KvEight<__half> {
    uint4 values;
};
template <>
struct KvEight<Q8> {
    uint2 values;
    __half scale;
};

__device__ __forceinline__ KvEight<float> kv_ask8(KvRow<float> row, int part) { return {load8(row.values + 8 * part)}; }
__device__ __forceinline__ KvEight<__half> kv_ask8(KvRow<__half> row, int part) {
    return {reinterpret_cast<const uint4*>(row.values)[part]};
}
__device__ __forceinline__ KvEight<Q8> kv_ask8(KvRow<Q8> row, int part) {
    return {reinterpret_cast<const uint2*>(row.values)[part], row.scales[8 * part / kQ8Block]};
}

__device__ __forceinline__ Eight kv_take8(const KvEight<float>& asked) { return asked.values; }
__device__ __forceinline__ Eight kv_take8(const KvEight<__half>& asked) {
    const uint4 bits = asked.values;
    const float2 a = half2_bits(bits.x), b = half2_bits(bits.y), c = half2_bits(bits.z), d = half2_bits(bits.w);
    return {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
}
__device__ __forceinline__ Eight kv_take8(const KvEight<Q8>& asked) {
    const float scale = __half2float(asked.scale);
    Eight eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        eight.v[i] = scale * static_cast<int8>((i < 4 ? asked.values.x : asked.values.y) >> 8 * (i % 4));
    }
    return eight;
}

template <class T>
__device__ __forceinline__ Eight kv_load8(KvRow<T> row, int part) {
    return kv_take8(kv_ask8(row, part));
}

// The same as eight halves, for tensor cores.
template <class T>
__device__ __forceinline__ uint4 kv_load8_half(KvRow<T> row, int part) {
    const Eight eight = kv_load8(row, part);
    uint32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        bits[i] = __half_as_ushort(__float2half_rn(eight.v[2 * i])) |
                  static_cast<uint32>(__half_as_ushort(__float2half_rn(eight.v[2 * i + 1]))) << 16;
    }
    return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

__device__ __forceinline__ uint4 kv_load8_half(KvRow<__half> row, int part) {
    return reinterpret_cast<const uint4*>(row.values)[part];
}

// Writes element i; what a later load gives for it. For every type, so that Q8 works too: whole warps call it, whose
// lanes hold the elements of a block (i % 32 is the lane). Only where head_dim is not a multiple of 32, which Q8 refuses,
// may lanes stay away. A value that is no number, or too large for the type, is read as such: nothing hides it.
__device__ __forceinline__ float kv_store(KvRow<float> row, int i, float value) { return row.values[i] = value; }
__device__ __forceinline__ float kv_store(KvRow<__half> row, int i, float value) {
    return __half2float(row.values[i] = __float2half_rn(value));
}
__device__ __forceinline__ float kv_store(KvRow<Q8> row, int i, float value) {
    const float scale = lanes_max(value == value ? fabsf(value) : __int_as_float(0x7f800000)) / 127.f;
    const int8 stored = static_cast<int8>(__float2int_rn(scale > 0.f ? value / scale : 0.f));
    const __half half_scale = __float2half_rn(scale);
    row.values[i] = stored;
    if (i % kQ8Block == 0) row.scales[i / kQ8Block] = half_scale;
    return __half2float(half_scale) * stored;
}
