// Attention of single tokens over the paged KV cache as attention.cu has it, on tensor cores.
//
// Block (split, KV head, row). A warp takes 16 positions at a time, within a page. Scores = Q x K: the heads of the group
// are the rows (of 16), positions the columns. Sums = V transposed x weights: elements of the head are the rows, heads the
// columns, so that scores are already where the weights have to be. The order of k is free in a product, and so is the
// order of the rows of a result: a lane loads eight neighbouring elements at a time, straight into fragments.
// Scores and sums are float32, what is multiplied is rounded to half precision.
//
// Compile-time: HEAD_DIM (64, 128 or 256), GROUP query heads a KV head (at most 8), KV (the cache's type), WARPS, SOFTCAP and
// WINDOWED (0 or 1), and RUN_TILE where runs of rows are left to attention_prefill.cu.
#include "attention_join.cuh"
#include "mma.cuh"

constexpr int kPiece = 16;                // positions of a warp at a time
constexpr int kKeyParts = HEAD_DIM / 32;  // a quad takes 32 elements of a key at once
constexpr int kValueParts = HEAD_DIM / 64;  // eight lanes take 64 elements of a value at once
constexpr int kHeadTiles = HEAD_DIM / 16;
constexpr bool kValuesAhead = HEAD_DIM <= 128;  // of the scores; registers hold no more
static_assert(HEAD_DIM % 64 == 0 && GROUP <= 8 && kPageTokens % kPiece == 0, "whole fragments");

// Row `group` (of 8; the other 8 are zeros) of the queries, as A fragments of two products for each part of a key.
struct Query {
    uint32 words[kKeyParts][4];

    __device__ __forceinline__ void load(const AttentionArgs& args, const float* heads) {
        const int lane = threadIdx.x % kWarp, head = lane / 4;
#pragma unroll
        for (int part = 0; part < kKeyParts; ++part) {
            Eight q{};
            if (head < GROUP) q = load8(heads + head * HEAD_DIM + 32 * part + 8 * (lane % 4));
#pragma unroll
            for (int i = 0; i < 4; ++i) words[part][i] = half2_word(q.v[2 * i] * args.scale, q.v[2 * i + 1] * args.scale);
        }
    }
};

// K and V of 16 positions as this lane needs them: of keys `group` and `group` + 8 eight elements of each part, of values
// 2 * place, the next, and both again 8 later, elements 8 * group … of each part.
struct Piece {
    uint4 keys[2][kKeyParts], values[4][kValueParts];

    __device__ __forceinline__ void load_keys(const AttentionArgs& args, int page, int first, int head) {
        const int lane = threadIdx.x % kWarp, group = lane / 4, place = lane % 4, kv_heads = gridDim.y;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto from = kv_row(args.keys, page, (first + group + 8 * i) % kPageTokens, head, kv_heads, HEAD_DIM);
#pragma unroll
            for (int part = 0; part < kKeyParts; ++part) keys[i][part] = kv_load8_half(from, 4 * part + place);
        }
    }

    __device__ __forceinline__ void load_values(const AttentionArgs& args, int page, int first, int begin, int end, int head) {
        const int lane = threadIdx.x % kWarp, group = lane / 4, place = lane % 4, kv_heads = gridDim.y;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int position = first + 2 * place + i % 2 + i / 2 * 8;
            const bool inside = position >= begin && position < end;  // 0 times what lies elsewhere may not be 0
            const auto from = kv_row(args.values, page, position % kPageTokens, head, kv_heads, HEAD_DIM);
#pragma unroll
            for (int part = 0; part < kValueParts; ++part) {
                values[i][part] = inside ? kv_load8_half(from, 8 * part + group) : make_uint4(0u, 0u, 0u, 0u);
            }
        }
    }
};

__device__ __forceinline__ uint32 word4(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Of head `group`: the maximum, and this lane's share of the total; of heads 2 * place and the next the sums.
struct Running {
    float top = kLowest, total = 0.f;
    float sums[kHeadTiles][4] = {};

    // The weights of a piece, as the B operand; the sums are scaled for them.
    __device__ __forceinline__ uint2 weigh(const AttentionArgs& args, const Query& query, const Piece& piece, int first, int begin,
                                           int end) {
        const int lane = threadIdx.x % kWarp, place = lane % 4;
        float scores[2][4] = {};
#pragma unroll
        for (int part = 0; part < kKeyParts; ++part) {
            const uint32 low[4] = {query.words[part][0], 0u, query.words[part][1], 0u};
            const uint32 high[4] = {query.words[part][2], 0u, query.words[part][3], 0u};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                mma_m16n8k16(scores[i], low, piece.keys[i][part].x, piece.keys[i][part].y);
                mma_m16n8k16(scores[i], high, piece.keys[i][part].z, piece.keys[i][part].w);
            }
        }
        float next = top;
        bool inside[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][i % 2];
            const int position = first + 8 * (i / 2) + 2 * place + i % 2;
            if constexpr (SOFTCAP) score = args.softcap * tanhf(score / args.softcap);
            inside[i / 2][i % 2] = position >= begin && position < end;
            if (inside[i / 2][i % 2]) next = fmaxf(next, score);
        }
        next = lanes_max<4>(next);
        const float keep = __expf(top - next);
        if (__ballot_sync(kFullMask, next != top) != 0) {
            const float low = __shfl_sync(kFullMask, keep, place * 8), high = __shfl_sync(kFullMask, keep, place * 8 + 4);
#pragma unroll
            for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[tile][i] *= i % 2 ? high : low;
            }
        }
        total *= keep;
        top = next;
        uint32 weights[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float weight[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                weight[j] = inside[i][j] ? __expf(scores[i][j] - next) : 0.f;
                total += weight[j];
            }
            weights[i] = half2_word(weight[0], weight[1]);
        }
        return make_uint2(weights[0], weights[1]);
    }

    __device__ __forceinline__ void add(const Piece& piece, const uint2& weights) {
#pragma unroll
        for (int part = 0; part < kValueParts; ++part) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32 v[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) v[j] = word4(piece.values[j][part], i);
                const uint32 a[4] = {__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632),
                                     __byte_perm(v[2], v[3], 0x5410), __byte_perm(v[2], v[3], 0x7632)};
                mma_m16n8k16(sums[4 * part + i], a, weights.x, weights.y);
            }
        }
    }

    __device__ __forceinline__ void store(WarpSums& out) {
        const int lane = threadIdx.x % kWarp, group = lane / 4, place = lane % 4;
        const float all = lanes_sum<4>(total);
        if (place == 0 && group < GROUP) {
            out[group][HEAD_DIM] = top;
            out[group][HEAD_DIM + 1] = all;
        }
#pragma unroll
        for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int head = 2 * place + i % 2, element = tile / 4 * 64 + 8 * group + tile % 4 * 2 + i / 2;
                if (head < GROUP) out[head][element] = sums[tile][i];
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(kWarps* kWarp) attention_rows(const __grid_constant__ AttentionArgs args) {
    __shared__ WarpSums joined[kWarps];
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, kv_heads = gridDim.y;
    const int warp = threadIdx.x / kWarp;

    let_next_kernel_start();
    wait_for_previous_kernel();
    if (is_in_run(args.rows, row, gridDim.z)) return;
    const int end = args.rows.positions[row] + 1;
    const int begin = WINDOWED ? max(0, end - args.window) : 0;
    // splits are whole pieces, one for each warp at least; a short context uses few of them
    const int pieces = ceil_div(end, kPiece) - begin / kPiece;
    const int wanted = min(args.splits, max(1, pieces / kWarps));
    const int each = ceil_div(pieces, wanted), used = ceil_div(pieces, each);
    if (split >= used) return;
    const int from = begin / kPiece + split * each, to = min(from + each, ceil_div(end, kPiece));

    const int* pages = args.rows.pages + args.rows.tables[row];
    int at = from + warp, page = at < to ? pages[at * kPiece / kPageTokens] : 0;
    Query query;
    query.load(args, args.q + (static_cast<size_t>(row) * kv_heads + head) * GROUP * HEAD_DIM);
    Running running;
    for (; at < to; at += kWarps) {
        const int first = at * kPiece;
        Piece piece;
        piece.load_keys(args, page, first, head);
        if constexpr (kValuesAhead) piece.load_values(args, page, first, begin, end, head);
        const int next = at + kWarps < to ? pages[(at + kWarps) * kPiece / kPageTokens] : 0;
        const uint2 weights = running.weigh(args, query, piece, first, begin, end);
        if constexpr (!kValuesAhead) piece.load_values(args, page, first, begin, end, head);
        running.add(piece, weights);
        page = next;
    }
    running.store(joined[warp]);
    join(args, joined, used);
}
