// Attention of attend.cu's blocks in float32, for caches of every type and heads of every size. A warp's lanes are shared
// by kAtOnce positions; a slot is what takes every so many positions of a page.
#pragma once

#include "attend_parts.cuh"

#if !TENSOR

constexpr int kPerLane = 8;  // elements of a head a lane holds
constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
constexpr int kLanes = HEAD_DIM <= 32 ? 4 : power_of_two_from(HEAD_DIM / kPerLane);  // that share a position; some may idle
constexpr int kAtOnce = kWarp / kLanes;                                               // positions a warp takes at once
// Query heads a warp serves: more than two crowd its registers. Other warps then take the rest of the group.
constexpr int kShares = GROUP > 2 * kWarps ? kWarps : ceil_div(GROUP, 2);
constexpr int kHeads = ceil_div(GROUP, kShares);
constexpr int kTeams = kWarps / kShares;  // of warps that take the same positions
constexpr int kSlots = kTeams * kAtOnce;
constexpr int kTurns = ceil_div(kPageTokens, kSlots);  // of a warp in a page
constexpr int kDepth = kTurns % 2 == 0 ? 2 : 1;        // turns whose scores are taken together
static_assert(HEAD_DIM % kPerLane == 0 && kLanes <= kWarp && kTeams > 0, "a warp holds whole positions");

// What products need of the heads besides: nothing.
struct Operands {
    __device__ __forceinline__ void prepare(const AttendArgs&, const Heads&, int) {}
};

__device__ __forceinline__ bool holds() { return threadIdx.x % kLanes * kPerLane < HEAD_DIM; }
__device__ __forceinline__ int part() { return holds() ? threadIdx.x % kLanes : 0; }

__device__ __forceinline__ float score_of(const AttendArgs& args, const float (&q)[kPerLane], const Eight& key) {
    float score = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) score += q[i] * key.v[i];
    score = lanes_sum<kLanes>(score);
    if constexpr (SOFTCAP) score = args.softcap * tanhf(score / args.softcap);
    return score;
}

struct Running {
    float top = kLowest, total = 0.f;
    float sums[kPerLane] = {};
};

// A thread's part of the attention of a block.
struct Attending {
    const int team = threadIdx.x / kWarp / kShares, first_head = threadIdx.x / kWarp % kShares * kHeads;
    const int slot = team * kAtOnce + threadIdx.x % kWarp / kLanes;
    float q[kHeads][kPerLane];
    Running running[kHeads];

    __device__ __forceinline__ Attending(const AttendArgs& args, const Heads& heads, const Operands&, const Run& run) {
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
            const float* row = heads.rows[min(first_head + g, GROUP - 1)] + part() * kPerLane;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) q[g][i] = holds() ? row[i] * args.scale : 0.f;
        }
        if (!run.brings || team != 0) return;
        const Eight key = load8(heads.rows[GROUP] + part() * kPerLane), value = load8(heads.rows[GROUP + 1] + part() * kPerLane);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
            const float score = score_of(args, q[g], key);
            if (slot > 0) continue;
            running[g].top = score, running[g].total = 1.f;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) running[g].sums[i] = value.v[i];
        }
    }

    // The positions of a page, which begins at `start`, that are from run.from to run.to - 1. All threads call it.
    __device__ __forceinline__ void add_page(const AttendArgs& args, const Operands&, KV* keys, KV* values, int start, const Run& run) {
        if (team >= kTeams) return;
#pragma unroll 1
        for (int turn = 0; turn < kTurns && start + turn * kSlots < run.to; turn += kDepth) {
            float scores[kDepth][kHeads];
            bool counts[kDepth];
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                const int token = min((turn + i) * kSlots + slot, kPageTokens - 1), position = start + token;
                counts[i] = (turn + i) * kSlots + slot < kPageTokens && position >= run.from && position < run.to;
                const Eight key = kv_load8(kv_row(keys, 0, token, 0, 1, HEAD_DIM), part());
#pragma unroll
                for (int g = 0; g < kHeads; ++g) scores[i][g] = score_of(args, q[g], key);
            }
#pragma unroll
            for (int g = 0; g < kHeads; ++g) {
                float top = running[g].top;
#pragma unroll
                for (int i = 0; i < kDepth; ++i) top = fmaxf(top, counts[i] ? scores[i][g] : kLowest);
                const float keep = __expf(running[g].top - top);
                running[g].top = top;
                running[g].total *= keep;
#pragma unroll
                for (int j = 0; j < kPerLane; ++j) running[g].sums[j] *= keep;
#pragma unroll
                for (int i = 0; i < kDepth; ++i) {
                    scores[i][g] = counts[i] ? __expf(scores[i][g] - top) : 0.f;
                    running[g].total += scores[i][g];
                }
            }
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                const int token = min((turn + i) * kSlots + slot, kPageTokens - 1);
                const Eight value = kv_load8(kv_row(values, 0, token, 0, 1, HEAD_DIM), part());
#pragma unroll
                for (int g = 0; g < kHeads; ++g) {
#pragma unroll
                    for (int j = 0; j < kPerLane; ++j) {
                        if (counts[i]) running[g].sums[j] += scores[i][g] * value.v[j];  // what was never written may be no number
                    }
                }
            }
        }
    }

    // What was found, to shared memory: (kSlots, GROUP, HEAD_DIM) sums, each slot's maxima and totals.
    __device__ __forceinline__ void keep(float* all_sums, float (*tops)[GROUP], float (*totals)[GROUP]) const {
        if (team >= kTeams) return;
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
            const int head = first_head + g;
            if (head >= GROUP) continue;
            if (holds()) {
                float4* to = reinterpret_cast<float4*>(all_sums + (slot * GROUP + head) * HEAD_DIM + part() * kPerLane);
                const float* from = running[g].sums;
                to[0] = make_float4(from[0], from[1], from[2], from[3]);
                to[1] = make_float4(from[4], from[5], from[6], from[7]);
            }
            if (threadIdx.x % kLanes == 0) tops[slot][head] = running[g].top, totals[slot][head] = running[g].total;
        }
    }
};

#endif
