// The sums of matmul_ring.cu's warps: where they lie in shared memory, how they are added, and what follows them.
#pragma once

#include "elementwise.cuh"
#include "matmul_ring_input.cuh"

// This warp's sums of 16 rows of a weight, to its place among a part's.
__device__ __forceinline__ void put_sums(const float (&sums)[kTiles][4], const Input& input, float* part) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    part += warp * kSumsWarp + lane % 4 * 2 * kSumsRow + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        float* at = part + 8 * tile * kSumsRow;
        at[0] = sums[tile][0] * input.inverse[tile].x;
        at[kSumsRow] = sums[tile][1] * input.inverse[tile].y;
        at[8] = sums[tile][2] * input.inverse[tile].x;
        at[kSumsRow + 8] = sums[tile][3] * input.inverse[tile].y;
    }
}

// A thread of those who ask and add.
__device__ __forceinline__ int asking_thread() { return static_cast<int>(threadIdx.x) - kFirstAsker * kWarp; }

// The factors of RMS norm, from the warps' sums of squares.
__device__ __forceinline__ void find_factors(const MatmulRingArgs& args, const float* squares, float* factors) {
    const int row = asking_thread();
    if (NORM != kRmsNorm || row >= PASS) return;
    float sum = 0.f;
    for (int i = 0; i < WARPS; ++i) sum += squares[row * WARPS + i];
    factors[row] = rsqrtf(sum / COLS + args.norm_eps);
}

// The results of a unit that a thread has: one in each round.
constexpr int kRounds = ceil_div(PASS * kUnitRows, kAskers * kWarp);
struct Result {
    int row, at;  // of the pass, of the unit
    __device__ __forceinline__ explicit Result(int round) {
        const int index = round * kAskers * kWarp + asking_thread();
        row = index / kUnitRows, at = index % kUnitRows;
    }
};

// Where the results of a unit go, and what is added to them: asked for before the sums are there.
struct Target {
    int rows = 0, first = 0, column = 0;  // of the weight; the unit's first row in it; the weight's first row in all
    float bias[kParts][kRounds], residual[kRounds];
    float* out;

    template <int kIndex, class S, class... Rest>
    __device__ __forceinline__ void find(const MatmulRingArgs& args, int pass_first, int unit) {
        if (!GATED && unit >= S::kUnits) {
            column += S::kRows;
            if constexpr (sizeof...(Rest) > 0) find<kIndex + 1, Rest...>(args, pass_first, unit - S::kUnits);
            return;
        }
        rows = S::kRows, first = unit * kUnitRows, out = args.segments[kIndex].out;
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const Result result(round);
            const int row = first + result.at, x_row = pass_first + result.row;
            const bool there = kSlices == 1 && result.row < PASS && x_row < args.rows && row < rows;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const float* from = args.segments[kIndex + part].bias;
                bias[part][round] = there && from != nullptr ? from[row] : 0.f;
            }
            const float* from = args.segments[kIndex].residual;
            residual[round] = there && from != nullptr ? from[static_cast<size_t>(x_row) * rows + row] : 0.f;
        }
    }
};
template <class... S>
__device__ __forceinline__ void find_target(SegmentList<S...>, const MatmulRingArgs& args, int first, int unit, Target& target) {
    target.find<0, S...>(args, first, unit);
}

__device__ __forceinline__ float whole_sum(const float* part, const Result& result) {
    const float* p = part + result.row * kSumsRow + result.at;
    float sums[2] = {};
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sums[warp % 2] += p[warp * kSumsWarp];
    return sums[0] + sums[1];
}

__device__ __forceinline__ void store(const MatmulRingArgs& args, int first, int slice, const Target& target, const float* sums,
                                      const float* factors) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const Result result(round);
        const int row = target.first + result.at, x_row = first + result.row;
        if (result.row >= PASS || x_row >= args.rows || row >= target.rows) continue;
        float value = whole_sum(sums, result);
        if constexpr (kSlices > 1) {
            args.products[(static_cast<size_t>(slice) * args.rows + x_row) * Segments::kTotal + target.column + row] = value;
        } else {
            const float factor = NORM == kRmsNorm ? factors[result.row] : 1.f;
            value = activate<ACTIVATION>(value * factor + target.bias[0][round]);
            if constexpr (GATED) value *= whole_sum(sums + kSumsPart, result) * factor + target.bias[kParts - 1][round];
            target.out[static_cast<size_t>(x_row) * target.rows + row] = value + target.residual[round];
        }
    }
}
