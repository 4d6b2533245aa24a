// The input of matmul_ring.cu's products: read, normed but for RMS norm's factor, scaled, kept in registers as halves.
#pragma once

#include "bulk_copy.cuh"
#include "expand.cuh"
#include "matmul_ring_parts.cuh"

// This warp's columns of x as B fragments.
struct Input {
    uint4 b[STEPS][4][kTiles];
    float2 inverse[kTiles];  // of the scales of this lane's two rows of results
};

// One of two rows' values for the lanes with bit `step` of their number clear, the other for the rest, each joined with
// what the lane `step` away holds of it.
template <class Join>
__device__ __forceinline__ float fold(float low, float high, int step, Join join) {
    const bool upper = threadIdx.x & step;
    return join(upper ? high : low, __shfl_xor_sync(kFullMask, upper ? low : high, step));
}

// Eight values a lane, joined over the warp: lane l gets that of number l / 4.
template <class Join>
__device__ __forceinline__ float fold_eight(float (&v)[8], Join join) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = fold(v[i], v[i + 4], 16, join);
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = fold(v[i], v[i + 2], 8, join);
    float all = fold(v[0], v[1], 4, join);
    all = join(all, __shfl_xor_sync(kFullMask, all, 2));
    return join(all, __shfl_xor_sync(kFullMask, all, 1));
}

// The norm's weight for this lane's columns does not depend on the kernel before.
struct NormWeight {
    float4 v[STEPS] = {};  // past the columns too: x is zero there, and 0 times what is no number is none
    __device__ __forceinline__ void load(const MatmulRingArgs& args) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int column = (threadIdx.x / kWarp * STEPS + i) * 128 + threadIdx.x % kWarp * 4;
            if (NORM == kRmsNorm && column < COLS) v[i] = *reinterpret_cast<const float4*>(args.norm_weight + column);
        }
    }
};

// Two halves times a power of two, as a float.
__device__ __forceinline__ uint32 scaled2(uint32 halves, float factor) {
    const __half2 scale = __float2half2_rn(factor);
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&halves), scale);
    return *reinterpret_cast<const uint32*>(&product);
}

// The exponent of the power of two that brings a value into 2^9 ... 2^10, within what a float can hold and invert.
__device__ __forceinline__ int shift_of(float largest) {
    // largest = m * 2^e with 1 <= m < 2
    return min(max(9 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127), -120), 120);
}
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(static_cast<uint32>(127 + exponent) << 23); }

// Steps whose loads are under way together.
constexpr int kReadAhead = kTiles == 1 && STEPS % 2 == 0 ? 2 : 1;

// Reads this warp's columns of rows `first` … of x, a row's 128 at a time, and hands them round by way of `stage` (2 KiB of
// the warp's own). Steps are scaled as their values allow, and those before again where one has larger values. `squares`
// gets this warp's part of the sum of the squares of each row.
__device__ __forceinline__ void read_input(const MatmulRingArgs& args, const NormWeight& norm, int first, int slice, uint8* stage,
                                           Input& input, float* squares) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    // a lane has group lane % 8 of chunk lane / 8 of eight rows, and needs pairs of groups of chunk lane % 4 of one
    const int pair = lane % 8 / 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const int rows = args.rows - first - 8 * tile;
        int shift = 120;  // of row lane / 4
        float sum[8] = {};
        float4 ahead[kReadAhead][8];
        auto read = [&](int i) {
            const int column = (warp * STEPS + i) * 128 + lane * 4;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float* x = args.x + static_cast<size_t>(first + 8 * tile + j) * COLS + slice * Segments::kCols + column;
                const bool there = j < rows && column < Segments::kCols;
                ahead[i % kReadAhead][j] = there ? *reinterpret_cast<const float4*>(x) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
        };
#pragma unroll
        for (int i = 0; i < kReadAhead; ++i) read(i);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            if (i >= kReadAhead) read(i);
            float4 (&v)[8] = ahead[i % kReadAhead];
            float top[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float4& x = v[j];
                top[j] = 0.f;
                if (j >= rows) continue;
                if constexpr (NORM == kRmsNorm) {
                    sum[j] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
                    x = make_float4(x.x * norm.v[i].x, x.y * norm.v[i].y, x.z * norm.v[i].z, x.w * norm.v[i].w);
                }
                top[j] = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
            }
            const int own = shift_of(fold_eight(top, [](float a, float b) { return fmaxf(a, b); })), next = min(shift, own);
            if (i > 0 && __ballot_sync(kFullMask, next != shift) != 0) {
                const float again = power_of_two(max(next - shift, -126));
#pragma unroll
                for (int before = 0; before < i; ++before) {
#pragma unroll
                    for (int p = 0; p < 4; ++p) {
                        uint4& b = input.b[before][p][tile];
                        b = make_uint4(scaled2(b.x, again), scaled2(b.y, again), scaled2(b.z, again), scaled2(b.w, again));
                    }
                }
            }
            shift = next;
            if (HELPERS > 0 && tile == kTiles - 1 && i == STEPS - 1) arrive_for_part(kInputRead, kThreads, next);
            const float factor = power_of_two(shift);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint8* to = stage + (pair * kWarp + ((4 * j + lane / 8) ^ (2 * pair))) * 16 + lane % 2 * 8;
                if (j < rows) {
                    const float f = __shfl_sync(kFullMask, factor, 4 * j);
                    *reinterpret_cast<uint2*>(to) =
                        make_uint2(half2_word(v[j].x * f, v[j].y * f), half2_word(v[j].z * f, v[j].w * f));
                } else if (i == 0) {
                    *reinterpret_cast<uint2*>(to) = make_uint2(0, 0);
                }
            }
            __syncwarp();
#pragma unroll
            for (int p = 0; p < 4; ++p) input.b[i][p][tile] = reinterpret_cast<const uint4*>(stage)[p * kWarp + (lane ^ (2 * p))];
        }
        if constexpr (NORM == kRmsNorm) {
            const float all = fold_eight(sum, [](float a, float b) { return a + b; });
            if (lane % 4 == 0) squares[(8 * tile + lane / 4) * WARPS + warp] = all;
        }
        const float inverse = power_of_two(-shift);
        input.inverse[tile].x = __shfl_sync(kFullMask, inverse, lane % 4 * 8);
        input.inverse[tile].y = __shfl_sync(kFullMask, inverse, lane % 4 * 8 + 4);
    }
}
