// Activations of one token as the products with quantised weights want them.
#pragma once

#include "common.cuh"

// 32 activations as int8 with one scale: x[i] ~ scale * q[i]. `low` holds elements 0-15, `high` 16-31; the sums are of
// the integers, for weight types whose elements carry an offset or a minimum.
struct Activation32 {
    uint4 low, high;
    float scale;
    int sum_low, sum_high;
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
    short2 sums[kChunks];

    __device__ __forceinline__ Activation32 load(int chunk) const {
        const short2 s = sums[chunk];
        return {low[chunk], high[chunk], scale[chunk], s.x, s.y};
    }

    // Quantises four neighbouring values held by one lane; eight neighbouring lanes hold a chunk. `lane4` is the index
    // of the four within the row. All lanes of the warp must call; those past the end say so.
    __device__ __forceinline__ void store4(int lane4, float4 v, bool inside) {
        const float largest =
            lanes_max<8>(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        const float inverse = largest > 0.f ? 127.f / largest : 0.f;
        const int a = __float2int_rn(v.x * inverse), b = __float2int_rn(v.y * inverse);
        const int c = __float2int_rn(v.z * inverse), d = __float2int_rn(v.w * inverse);
        const uint32 packed = (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | (d & 0xff) << 24;
        int sum = a + b + c + d;
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
        const int other = __shfl_xor_sync(kFullMask, sum, 4);
        if (!inside) return;
        const int chunk = lane4 / 8, place = lane4 % 8;
        uint32* half = reinterpret_cast<uint32*>(place < 4 ? &low[chunk] : &high[chunk]);
        half[place % 4] = packed;
        if (place == 0) {
            scale[chunk] = largest / 127.f;
            sums[chunk] = make_short2(static_cast<short>(sum), static_cast<short>(other));
        }
    }
};

// A row kept as it is, in float32: for weights that are floats, and to see what int8 activations cost. Same planes idea:
// element i of every chunk lies with element i of the next, in groups of four.
template <int kCols>
struct FloatRow {
    static constexpr int kChunks = kCols / 32;

    float4 part[8][kChunks];

    __device__ __forceinline__ void store4(int lane4, float4 v) { part[lane4 % 8][lane4 / 8] = v; }
};

__device__ __forceinline__ int dot4(uint32 weights, uint32 activations, int sum) {
    return __dp4a(static_cast<int>(weights), static_cast<int>(activations), sum);
}
