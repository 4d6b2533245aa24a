// Activations of one token as the products with quantised weights want them.
#pragma once

#include "common.cuh"
#include "float_math.cuh"

__device__ __forceinline__ int dot4(uint32 weights, uint32 activations, int sum) {
    return __dp4a(static_cast<int>(weights), static_cast<int>(activations), sum);
}

// 32 activations as int8 with one scale: x[i] ~ scale * q[i]. `low` holds elements 0-15, `high` 16-31.
struct Activation32 {
    uint4 low, high;
    float scale;
    uint32 sums;  // of the integers of `low` and of `high`, 16 bits each with their sign

    // The two sums, each times a signed byte of `factors` (bits 0-7, bits 8-15), added to `sum`: for weight types whose
    // elements carry an offset or a minimum. One instruction.
    __device__ __forceinline__ int sums_times(uint32 factors, int sum = 0) const {
        return __dp2a_lo(static_cast<int>(sums), static_cast<int>(factors), sum);
    }
    // The sum of all 32 integers.
    __device__ __forceinline__ int sum() const { return sums_times(0x0101u); }
};

// A row of activations in shared memory. The two halves of each 32 lie in planes of their own, so that neighbouring
// lanes read neighbouring 16 bytes: no bank conflict.
template <int kCols>
struct ActivationRow {
    static_assert(kCols % 32 == 0, "activations are quantised in groups of 32");
    static constexpr int kChunks = kCols / 32;

    uint4 low[kChunks];
    uint4 high[kChunks];
    float scale[kChunks];
    uint32 sums[kChunks];

    __device__ __forceinline__ Activation32 load(int chunk) const {
        return {low[chunk], high[chunk], scale[chunk], sums[chunk]};
    }

    // Quantises 4 * kFours neighbouring values held by one lane; 8 / kFours neighbouring lanes hold a chunk. `piece` numbers
    // such values within the row. All lanes of a warp call; those past the end of the row say so. What is no number, or
    // infinite, makes the whole chunk so. A chunk of values below 2^-100 is zeros.
    template <int kFours>
    __device__ __forceinline__ void store(int piece, const float4* v, bool inside) {
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            largest = max_or_nan(largest, max_or_nan(max_or_nan(fabsf(v[i].x), fabsf(v[i].y)), max_or_nan(fabsf(v[i].z), fabsf(v[i].w))));
        }
#pragma unroll
        for (int step = 1; step < 8 / kFours; step *= 2) largest = max_or_nan(largest, __shfl_xor_sync(kFullMask, largest, step));
        const float inverse = inverse_of(largest);
        Words<kFours> words;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            words.w[i] = rounded4(make_float4(v[i].x * inverse, v[i].y * inverse, v[i].z * inverse, v[i].w * inverse));
            sum = dot4(words.w[i], 0x01010101u, sum);
        }
#pragma unroll
        for (int step = 1; step < 4 / kFours; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
        if (!inside) return;
        constexpr int kLanes = 4 / kFours;  // of half a chunk
        const int half = piece / kLanes, chunk = half / 2;
        uint4* plane = half % 2 == 0 ? low : high;
        reinterpret_cast<Words<kFours>*>(plane + chunk)[piece % kLanes] = words;
        if (piece % kLanes == 0) reinterpret_cast<short*>(sums)[half] = static_cast<short>(sum);
        if (piece % (2 * kLanes) == 0) scale[chunk] = over_127(largest);
    }

private:
    template <int kCount>
    struct alignas(4 * kCount) Words {
        uint32 w[kCount];
    };

    // 127 / `largest` as IEEE rounds it, without the branches of a division: none of its special cases comes here.
    static __device__ __forceinline__ float inverse_of(float largest) {
        if (!(largest > 0x1p-100f && largest < 0x1p100f)) return 0.f;
        const float first = reciprocal(largest), better = fmaf(first, fmaf(-largest, first, 1.f), first);
        const float quotient = 127.f * better;
        return fmaf(better, fmaf(-largest, quotient, 127.f), quotient);
    }

    // `largest` / 127 likewise; infinite where what it scales is not finite or too large, and all integers are zeros.
    static __device__ __forceinline__ float over_127(float largest) {
        if (!(largest < 0x1p100f)) return __uint_as_float(0x7f800000u);
        constexpr float kFirst = 1.f / 127.f;
        const float quotient = largest * kFirst;
        return fmaf(kFirst, fmaf(-127.f, quotient, largest), quotient);
    }

    // To the nearest integers, ties to even, as bytes: the sum with 1.5 * 2^23 has them in its last places.
    static __device__ __forceinline__ uint32 rounded4(float4 v) {
        constexpr float kShift = 12582912.f;
        const uint32 a = __float_as_uint(v.x + kShift), b = __float_as_uint(v.y + kShift);
        const uint32 c = __float_as_uint(v.z + kShift), d = __float_as_uint(v.w + kShift);
        return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    }
};

// A row kept as it is, in float32: for weights that are floats, and to see what int8 activations cost. Same planes idea:
// element i of every chunk lies with element i of the next, in groups of four.
template <int kCols>
struct FloatRow {
    static constexpr int kChunks = kCols / 32;

    float4 part[8][kChunks];

    // The four elements number `four` of the row.
    __device__ __forceinline__ void store4(int four, float4 v) { part[four % 8][four / 8] = v; }
};
