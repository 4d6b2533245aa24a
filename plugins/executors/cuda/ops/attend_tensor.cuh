// Attention of attend.cu's blocks on tensor cores, for a cache of halves. A warp takes 16 positions of a page and some
// elements of their values; a slot is the warps that take the same positions.
//
// As in attention_rows.cu: scores = Q x K with the heads of the group as rows and positions as columns, sums = V transposed
// x weights with elements as rows and heads as columns, so that scores are already where the weights have to be; the order
// of k, and that of the rows of a result, is free, so that lanes load neighbouring elements. Nothing is lost to halves: the
// 8 rows that heads leave free take what rounding Q took away, a second product what rounding the weights did. A scaled
// query that no half can hold gives what is no number.
#pragma once

#include "attend_parts.cuh"
#include "mma.cuh"

#if TENSOR

constexpr int kPiece = 16;  // positions of a warp
constexpr int kSlots = kPageTokens / kPiece;
constexpr int kShares = 2;  // warps that take the same positions
constexpr int kKeyParts = HEAD_DIM / 32;         // a quad takes 32 elements of a key at once
constexpr int kTiles = HEAD_DIM / kShares / 16;  // of sums of a warp
static_assert(HEAD_DIM % 64 == 0 && GROUP <= 8 && kWarps >= kSlots * kShares, "whole fragments");

// What products need of the heads: Q scaled and in two halves, K and V as the cache has them.
struct Operands {
    alignas(16) __half high[GROUP][HEAD_DIM], low[GROUP][HEAD_DIM], key[HEAD_DIM], value[HEAD_DIM];

    // From a row that this warp brought.
    __device__ __forceinline__ void prepare(const AttendArgs& args, const Heads& heads, int row) {
        for (int i = threadIdx.x % kWarp; i < HEAD_DIM; i += kWarp) {
            const float x = heads.rows[row][i];
            if (row >= GROUP) {
                (row == GROUP ? key : value)[i] = __float2half_rn(x);
                continue;
            }
            high[row][i] = __float2half_rn(x * args.scale);
            low[row][i] = __float2half_rn(x * args.scale - __half2float(high[row][i]));
        }
    }
};

// Words that lie together, as many as one load takes.
template <int kWords>
struct alignas(kWords < 4 ? 4 * kWords : 16) Words {
    uint32 w[kWords];
};

// A thread's part of the attention of a block: of head `group` the maximum and this lane's share of the total, of heads
// 2 * place and the next the sums.
struct Attending {
    const int first = threadIdx.x / kWarp % kSlots * kPiece, share = threadIdx.x / kWarp / kSlots;
    const int group = threadIdx.x % kWarp / 4, place = threadIdx.x % 4;
    float top = kLowest, total = 0.f;
    float sums[kTiles][4] = {};

    __device__ __forceinline__ Attending(const AttendArgs&, const Heads&, const Operands&, const Run&) {}

    // The positions of a page, which begins at `start`, that are from run.from to run.to - 1, and the own one.
    __device__ __forceinline__ void add_page(const AttendArgs& args, const Operands& operands, __half* keys, __half* values, int start,
                                             const Run& run) {
        const int own = run.brings ? run.to - start : -1, begin = run.from - start, end = run.to - start + run.brings;
        if (share >= kShares || first >= end || first + kPiece <= begin) return;
        float scores[2][2];
        score(args, operands, keys, own, scores);
        float next = top;
        bool counts[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = first + 8 * (i / 2) + 2 * place + i % 2;
            counts[i / 2][i % 2] = token >= begin && token < end;
            if (counts[i / 2][i % 2]) next = fmaxf(next, scores[i / 2][i % 2]);
        }
        next = lanes_max<4>(next);
        const float keep = __expf(top - next);
        top = next, total *= keep;
        uint32 high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float weight[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                weight[j] = counts[i][j] ? __expf(scores[i][j] - next) : 0.f;
                total += weight[j];
            }
            high[i] = half2_word(weight[0], weight[1]);
            const float2 rounded = half2_bits(high[i]);
            low[i] = half2_word(weight[0] - rounded.x, weight[1] - rounded.y);
        }
        // heads 2 * place and the next are other lanes'
        const float keeps[2] = {__shfl_sync(kFullMask, keep, place * 8), __shfl_sync(kFullMask, keep, place * 8 + 4)};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][i] *= keeps[i % 2];
        }
        add(operands, values, own, begin, end, high, low);
    }

    // What was found, to shared memory: (kSlots, GROUP, HEAD_DIM) sums, each slot's maxima and totals.
    __device__ __forceinline__ void keep(float* all_sums, float (*tops)[GROUP], float (*totals)[GROUP]) const {
        if (share >= kShares) return;
        const int slot = first / kPiece;
        const float all = lanes_sum<4>(total);
        if (share == 0 && place == 0 && group < GROUP) tops[slot][group] = top, totals[slot][group] = all;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int head = 2 * place + i;
            if (head >= GROUP) continue;
            float2* to = reinterpret_cast<float2*>(all_sums + (slot * GROUP + head) * HEAD_DIM) + element() / 2;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) to[tile] = make_float2(sums[tile][i], sums[tile][2 + i]);
        }
    }

private:
    // The first of the 2 * kTiles elements of a value that this lane loads: a pair for each tile, rows `group` and `group` + 8.
    __device__ __forceinline__ int element() const { return (share * 8 + group) * 2 * kTiles; }

    // Of head `group` those of positions first + 8 * i + 2 * place and the next.
    __device__ __forceinline__ void score(const AttendArgs& args, const Operands& operands, const __half* keys, int own,
                                          float (&scores)[2][2]) const {
        const int head = min(group, GROUP - 1);
        float products[2][2][4] = {};
#pragma unroll
        for (int part = 0; part < kKeyParts; ++part) {
            const int at = 32 * part + 8 * place;
            const auto q = *reinterpret_cast<const Words<4>*>(operands.high[head] + at);
            const auto rest = *reinterpret_cast<const Words<4>*>(operands.low[head] + at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = first + 8 * i + group;
                const auto k = *reinterpret_cast<const Words<4>*>((token == own ? operands.key : keys + token * HEAD_DIM) + at);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32 a[4] = {q.w[2 * half], rest.w[2 * half], q.w[2 * half + 1], rest.w[2 * half + 1]};
                    mma_m16n8k16(products[i][half], a, k.w[2 * half], k.w[2 * half + 1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][i % 2];
            score = 0.f;
#pragma unroll
            for (int half = 0; half < 2; ++half) score += products[i / 2][half][i % 2] + products[i / 2][half][2 + i % 2];
            if constexpr (SOFTCAP) score = args.softcap * tanhf(score / args.softcap);
        }
    }

    // Values by their weights.
    __device__ __forceinline__ void add(const Operands& operands, const __half* values, int own, int begin, int end, const uint32 (&high)[2],
                                        const uint32 (&low)[2]) {
        constexpr int kWords = kTiles < 4 ? kTiles : 4;
#pragma unroll
        for (int lot = 0; lot < kTiles; lot += kWords) {
            Words<kWords> v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = first + 2 * place + i % 2 + i / 2 * 8;
                const __half* row = token == own ? operands.value : values + token * HEAD_DIM;
                v[i] = reinterpret_cast<const Words<kWords>*>(row + element())[lot / kWords];
#pragma unroll
                for (uint32& word : v[i].w) word = token >= begin && token < end ? word : 0u;  // else 0 times it may not be 0
            }
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                const uint32 a[4] = {__byte_perm(v[0].w[i], v[1].w[i], 0x5410), __byte_perm(v[0].w[i], v[1].w[i], 0x7632),
                                     __byte_perm(v[2].w[i], v[3].w[i], 0x5410), __byte_perm(v[2].w[i], v[3].w[i], 0x7632)};
                mma_m16n8k16(sums[lot + i], a, high[0], high[1]);
                mma_m16n8k16(sums[lot + i], a, low[0], low[1]);
            }
        }
    }
};

#endif
