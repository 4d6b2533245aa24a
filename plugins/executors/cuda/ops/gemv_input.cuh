// The input of gemv.cu's products: read, normed, quantised, kept in shared memory.
#pragma once

#include "gemv_parts.cuh"
#include "norm.cuh"

// The input of all tokens in shared memory, in the forms the segments need.
struct Input {
    ActivationRow<COLS>* quantized;
    FloatRow<COLS>* floats;
};

constexpr int kInputBytes =
    TOKENS * (Segments::kAnyInteger * sizeof(ActivationRow<COLS>) + Segments::kAnyFloat * sizeof(FloatRow<COLS>));

__device__ __forceinline__ Input carve(uint8* shared) {
    Input input{};
    if constexpr (Segments::kAnyInteger) {
        input.quantized = reinterpret_cast<ActivationRow<COLS>*>(shared);
        shared += TOKENS * sizeof(ActivationRow<COLS>);
    }
    if constexpr (Segments::kAnyFloat) input.floats = reinterpret_cast<FloatRow<COLS>*>(shared);
    return input;
}

constexpr int kFours = COLS / 4, kEach = ceil_div(kFours, THREADS);

// A thread's part of a row: zeros past its end.
__device__ __forceinline__ void load_row(const float* row, float4 (&v)[kEach]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int at = threadIdx.x + i * THREADS;
        v[i] = at < kFours ? reinterpret_cast<const float4*>(row)[at] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

// The norm's weight does not depend on the kernel before: it is there before the input is.
struct NormWeight {
    float4 v[kEach];
    __device__ __forceinline__ void load(const GemvArgs& args) {
        if constexpr (NORM != kNoNorm) load_row(args.norm_weight, v);
    }
};

// Norms and stores the input of one token, all but RMS norm's factor: that is left for the results, so that products
// need not wait for a sum over the row. `squares` gets a part of that sum from each warp. Every thread takes part.
__device__ __forceinline__ void read_input(const GemvArgs& args, const NormWeight& weight, const Input& input, int token,
                                           float* squares) {
    float4 v[kEach];
    load_row(args.x + static_cast<size_t>(blockIdx.y * TOKENS + token) * COLS, v);
    if constexpr (NORM == kLayerNorm) {
        __shared__ float scratch[kWarp];
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum += v[i].x + v[i].y + v[i].z + v[i].w;
        const float mean = block_sum(sum, scratch) / COLS;
        float deviation = 0.f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            if (threadIdx.x + i * THREADS >= kFours) continue;
            v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
            deviation += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
        }
        const float inverse = rsqrtf(block_sum(deviation, scratch) / COLS + args.norm_eps);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
            if (args.norm_bias != nullptr) b = reinterpret_cast<const float4*>(args.norm_bias)[min(threadIdx.x + i * THREADS, kFours - 1)];
            const float4 g = weight.v[i];
            v[i] = make_float4(v[i].x * inverse * g.x + b.x, v[i].y * inverse * g.y + b.y,
                               v[i].z * inverse * g.z + b.z, v[i].w * inverse * g.w + b.w);
        }
    } else if constexpr (NORM == kRmsNorm) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const float4 g = weight.v[i];
            sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
            v[i] = make_float4(v[i].x * g.x, v[i].y * g.y, v[i].z * g.z, v[i].w * g.w);
        }
        sum = lanes_sum(sum);
        if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp] = sum;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if constexpr (Segments::kAnyInteger) input.quantized[token].store4(at, v[i], at < kFours);
        if constexpr (Segments::kAnyFloat) {
            if (at < kFours) input.floats[token].store4(at, v[i]);
        }
    }
}

// What the results of a token are still to be multiplied with.
__device__ __forceinline__ float factor_of(const GemvArgs& args, const float* squares) {
    if constexpr (NORM != kRmsNorm) return 1.f;
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += squares[warp];
    return rsqrtf(sum / COLS + args.norm_eps);
}
