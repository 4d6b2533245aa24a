// The input of gemv.cu's products: read, normed, quantised, kept in shared memory.
#pragma once

#include "context_runs.cuh"
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

// A thread takes pieces of kPiece fours, THREADS apart, kEach fours in all: one piece where that is enough.
constexpr int kFours = COLS / 4;
constexpr int kPiece = kFours <= THREADS ? 1 : kFours <= 2 * THREADS ? 2 : 4;
constexpr int kEach = kPiece * ceil_div(kFours / kPiece, THREADS);

__device__ __forceinline__ int piece_of(int i) { return threadIdx.x + i / kPiece * THREADS; }
__device__ __forceinline__ int four_of(int i) { return kPiece * piece_of(i) + i % kPiece; }

// A norm wants all of them at once; else they come in lots, so that registers hold one.
constexpr int kLot = NORM != kNoNorm || kEach <= 16 ? kEach : 16;

// A lot of a thread's part of a row, from number `first` on: zeros past its end.
__device__ __forceinline__ void load_row(const float* row, int first, float4 (&v)[kLot]) {
#pragma unroll
    for (int i = 0; i < kLot; ++i) {
        const int at = four_of(first + i);
        v[i] = at < kFours ? reinterpret_cast<const float4*>(row)[at] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

// What does not depend on the kernel before is there before the input is: the norm's weight; the runs of a context.
struct Beforehand {
    float4 v[kLot];
    int runs = 1;
    __device__ __forceinline__ void load(const GemvArgs& args) {
        if constexpr (NORM != kNoNorm) load_row(args.norm_weight, 0, v);
#if LEFT_RUNS > 0
        runs = ContextRuns(*args.left.position, args.left.window, RUN_PAGES, args.left.splits, LEFT_RUNS).used;
#endif
    }
};

#if LEFT_RUNS > 0
// The input where attend.cu left it in `runs` runs: sums over the context, each with its own maximum and total.
__device__ __forceinline__ void join_row(const LeftArgs& left, int runs, int first, float4 (&v)[kLot]) {
    const RunSums<HEAD_DIM> sums{left.partial, left.splits, COLS};
#pragma unroll
    for (int i = 0; i < kLot; ++i) {
        const int at = min(four_of(first + i), kFours - 1);
        float4 found[LEFT_RUNS];
        float2 peaks[LEFT_RUNS];
        float top = kLowest, total = 0.f;
#pragma unroll
        for (int run = 0; run < LEFT_RUNS; ++run) {  // all are asked for at once
            found[run] = make_float4(0.f, 0.f, 0.f, 0.f), peaks[run] = make_float2(kLowest, 0.f);
            if (run >= runs) continue;
            found[run] = reinterpret_cast<const float4*>(sums.of(run))[at];
            peaks[run] = sums.peaks(run)[4 * at / HEAD_DIM];
        }
#pragma unroll
        for (int run = 0; run < LEFT_RUNS; ++run) top = fmaxf(top, peaks[run].x);
        v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int run = 0; run < LEFT_RUNS; ++run) {
            const float weight = __expf(peaks[run].x - top);
            total += weight * peaks[run].y;
            v[i].x += weight * found[run].x, v[i].y += weight * found[run].y;
            v[i].z += weight * found[run].z, v[i].w += weight * found[run].w;
        }
        const float share = four_of(first + i) < kFours ? reciprocal(total) : 0.f;
        v[i] = make_float4(v[i].x * share, v[i].y * share, v[i].z * share, v[i].w * share);
    }
}
#endif

// Norms a row, all but RMS norm's factor: that is left for the results, so that products need not wait for a sum over the
// row. `squares` gets a part of that sum from each warp.
__device__ __forceinline__ void norm_row(const GemvArgs& args, const Beforehand& before, float4 (&v)[kLot], float* squares) {
    if constexpr (NORM == kLayerNorm) {
        __shared__ float scratch[kWarp];
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kLot; ++i) sum += v[i].x + v[i].y + v[i].z + v[i].w;
        const float mean = block_sum(sum, scratch) / COLS;
        float deviation = 0.f;
#pragma unroll
        for (int i = 0; i < kLot; ++i) {
            if (four_of(i) >= kFours) continue;
            v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
            deviation += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
        }
        const float inverse = rsqrtf(block_sum(deviation, scratch) / COLS + args.norm_eps);
#pragma unroll
        for (int i = 0; i < kLot; ++i) {
            float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
            if (args.norm_bias != nullptr) b = reinterpret_cast<const float4*>(args.norm_bias)[min(four_of(i), kFours - 1)];
            const float4 g = before.v[i];
            v[i] = make_float4(v[i].x * inverse * g.x + b.x, v[i].y * inverse * g.y + b.y,
                               v[i].z * inverse * g.z + b.z, v[i].w * inverse * g.w + b.w);
        }
    } else if constexpr (NORM == kRmsNorm) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kLot; ++i) {
            const float4 g = before.v[i];
            sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
            v[i] = make_float4(v[i].x * g.x, v[i].y * g.y, v[i].z * g.z, v[i].w * g.w);
        }
        sum = lanes_sum(sum);
        if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp] = sum;
    }
}

// A lot to shared memory, in the forms that are needed.
__device__ __forceinline__ void store_lot(const Input& input, int token, int first, const float4 (&v)[kLot]) {
#pragma unroll
    for (int i = 0; i < kLot; i += kPiece) {
        const bool inside = four_of(first + i) < kFours;
        if constexpr (Segments::kAnyInteger) input.quantized[token].template store<kPiece>(piece_of(first + i), v + i, inside);
        if constexpr (Segments::kAnyFloat) {
#pragma unroll
            for (int j = i; j < i + kPiece; ++j) {
                if (inside) input.floats[token].store4(four_of(first + j), v[j]);
            }
        }
    }
}

// The input of one token, with its norm. Every thread takes part.
__device__ __forceinline__ void read_input(const GemvArgs& args, const Beforehand& before, const Input& input, int token,
                                           float* squares) {
#pragma unroll
    for (int first = 0; first < kEach; first += kLot) {
        float4 v[kLot];
#if LEFT_RUNS > 0
        if (before.runs > 1 && before.runs <= LEFT_RUNS) join_row(args.left, before.runs, first, v);
        else
#endif
            load_row(args.x + static_cast<size_t>(blockIdx.y * TOKENS + token) * COLS, first, v);
        norm_row(args, before, v, squares);
        store_lot(input, token, first, v);
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
