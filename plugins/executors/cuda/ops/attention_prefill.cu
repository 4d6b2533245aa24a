// Attention of many rows of a sequence at once, on tensor cores (FlashAttention-2: Dao 2023).
//
// Block (tile of rows, query heads that share a KV head). A warp takes 16 of the block's row-head pairs, row by row; K
// and V come in parts of kKeys tokens through shared memory, copied while the part before is used. Scores and sums are
// float32, what is multiplied is rounded to half precision.
//
// Compile-time: HEAD_DIM, a multiple of 16 up to 256; HEADS query heads a block, GROUP a KV head, KV_HEADS; KV, the
// cache's type; SOFTCAP and WINDOWED (0 or 1).
#include "mma.cuh"
#include "runs.cuh"

constexpr int kKeys = HEAD_DIM > 128 ? 32 : 64;  // within a page, so one lies whole in it
constexpr int kRowsOfBlock = kRunTile * HEADS;
constexpr int kWarps = kRowsOfBlock / 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kStride = HEAD_DIM + 8;  // halves; an odd number of 16 bytes, so that no bank is met twice
constexpr int kDims = HEAD_DIM / 16;
constexpr bool kQueryStays = HEAD_DIM <= 128;  // in registers; else it is read again from shared memory
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float unseen() { return __uint_as_float(0xff800000u); }  // minus infinity

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "heads are whole steps of a product");
static_assert(kRowsOfBlock % 16 == 0 && kThreads <= 1024 && GROUP % HEADS == 0, "whole warps, whole groups");

struct AttentionArgs {
    const float* q;  // (rows, KV_HEADS * GROUP, HEAD_DIM)
    KV* keys;        // the layer's cache, only read
    KV* values;
    float* out;  // like q
    StepRows rows;
    float scale;
    float softcap;
    int window;
    int count;  // rows
};

constexpr int kPartHalves = kKeys * kStride;
struct Shared {
    __half keys[2][kPartHalves];
    __half values[2][kPartHalves];
    __half queries[kQueryStays ? 16 : kRowsOfBlock * kStride];
};
extern "C" __device__ const int shared_bytes = sizeof(Shared);

// Eight elements of a token to shared memory; zeros where not `inside`.
template <class T>
__device__ __forceinline__ void bring8(__half* to, KvRow<T> from, int part, bool inside) {
    *reinterpret_cast<uint4*>(to) = inside ? kv_load8_half(from, part) : make_uint4(0u, 0u, 0u, 0u);
}
__device__ __forceinline__ void bring8(__half* to, KvRow<__half> from, int part, bool inside) {
    copy_async16(shared_address(to), from.values + 8 * part, inside);
}

// Brings tokens `first` … `first` + kKeys - 1 of a sequence; zeros from `end` on, for 0 times what lies there may not
// be 0.
__device__ __forceinline__ void bring(KV* cache, __half* to, const AttentionArgs& args, int row, int first, int end, int head) {
    constexpr int kParts = HEAD_DIM / 8;
    const int page = args.rows.pages[args.rows.tables[row] + first / kPageTokens];
    for (int i = threadIdx.x; i < kKeys * kParts; i += kThreads) {
        const int token = i / kParts, part = i % kParts;
        const auto from = kv_row(cache, page, (first + token) % kPageTokens, head, KV_HEADS, HEAD_DIM);
        bring8(to + token * kStride + part * 8, from, part, first + token < end);
    }
}

// The 16 row-head pairs of a warp, as the A operand.
struct Query {
    uint32 a[kQueryStays ? kDims : 1][4];
};

__device__ __forceinline__ float2 query_pair(const AttentionArgs& args, int row, int head, int dim) {
    const float2 q = *reinterpret_cast<const float2*>(
        args.q + (static_cast<size_t>(row) * KV_HEADS * GROUP + head) * HEAD_DIM + dim);
    return make_float2(q.x * args.scale, q.y * args.scale);
}

struct Warp {
    float sums[HEAD_DIM / 8][4] = {};
    float top[2] = {unseen(), unseen()};
    float total[2] = {0.f, 0.f};
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) attention_prefill(const __grid_constant__ AttentionArgs args) {
    extern __shared__ __align__(16) uint8 raw[];
    Shared& shared = *reinterpret_cast<Shared*>(raw);
    const int lane = threadIdx.x % kWarp, group = lane / 4, place = lane % 4;
    const int tile = (gridDim.x - 1 - blockIdx.x) * kRunTile;  // the last rows see most: first
    const int first_head = blockIdx.y * HEADS, kv_head = first_head / GROUP;
    const int pair = threadIdx.x / kWarp * 16;  // first row-head pair of the warp

    let_next_kernel_start();
    wait_for_previous_kernel();
    const int count = min(kRunTile, args.count - tile);
    const uint32 going_on = rows_that_go_on(args.rows, tile, count);

    for (int begin = 0; begin < count;) {
        const int end = run_end(going_on, begin, count);
        if (end - begin < kLeastRun) {
            begin = end;
            continue;
        }
        const int row0 = tile + begin, position0 = args.rows.positions[row0];
        const int last = position0 + end - begin;  // one past the last key of all
        const int from = WINDOWED ? max(0, position0 - args.window + 1) / kKeys * kKeys : 0;

        // rows and positions of this lane's two pairs; those outside the run are computed and not stored
        int row[2], position[2], head[2];
        bool mine[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = pair + group + 8 * half, i = at / HEADS;
            mine[half] = i >= begin && i < end;
            row[half] = tile + min(max(i, begin), end - 1);
            position[half] = position0 + row[half] - row0;
            head[half] = first_head + at % HEADS;
        }

        __syncthreads();  // the run before may still read
        bring(args.keys, shared.keys[0], args, row0, from, last, kv_head);
        bring(args.values, shared.values[0], args, row0, from, last, kv_head);
        end_copies();

        Query query;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
            uint32 a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 q = query_pair(args, row[i % 2], head[i % 2], d * 16 + 2 * place + i / 2 * 8);
                a[i] = half2_word(q.x, q.y);
            }
            if constexpr (kQueryStays) {
#pragma unroll
                for (int i = 0; i < 4; ++i) query.a[d][i] = a[i];
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32* to = reinterpret_cast<uint32*>(shared.queries + (pair + group + i % 2 * 8) * kStride +
                                                           d * 16 + 2 * place + i / 2 * 8);
                    *to = a[i];
                }
            }
        }

        Warp warp;
        int stage = 0;
        for (int key0 = from; key0 < last; key0 += kKeys, stage ^= 1) {
            __syncthreads();  // all are done with the part before, whose place the next one takes
            if (key0 + kKeys < last) {
                bring(args.keys, shared.keys[stage ^ 1], args, row0, key0 + kKeys, last, kv_head);
                bring(args.values, shared.values[stage ^ 1], args, row0, key0 + kKeys, last, kv_head);
            }
            end_copies();
            wait_for_copies<1>();
            __syncthreads();

            float scores[kKeys / 8][4] = {};
            const uint32 keys = shared_address(shared.keys[stage] + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8);
#pragma unroll
            for (int d = 0; d < kDims; ++d) {
                uint32 a[4];
                if constexpr (kQueryStays) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[i] = query.a[d][i];
                } else {
                    load_matrices(a, shared_address(shared.queries + (pair + lane % 16) * kStride + d * 16 + lane / 16 * 8));
                }
#pragma unroll
                for (int k = 0; k < kKeys / 16; ++k) {
                    uint32 b[4];
                    load_matrices(b, keys + (k * 16 * kStride + d * 16) * 2);
                    mma_m16n8k16(scores[2 * k], a, b[0], b[1]);
                    mma_m16n8k16(scores[2 * k + 1], a, b[2], b[3]);
                }
            }

            if constexpr (SOFTCAP) {
#pragma unroll
                for (int k = 0; k < kKeys / 8; ++k) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) scores[k][i] = args.softcap * tanhf(scores[k][i] / args.softcap);
                }
            }
            const bool all_seen = key0 + kKeys <= position0 + 1 && (!WINDOWED || key0 > last - 1 - args.window);
            if (!all_seen) {
#pragma unroll
                for (int k = 0; k < kKeys / 8; ++k) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int key = key0 + k * 8 + 2 * place + i % 2;
                        const bool seen = key <= position[i / 2] && (!WINDOWED || key > position[i / 2] - args.window);
                        if (!seen) scores[k][i] = unseen();
                    }
                }
            }

#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = warp.top[half];
#pragma unroll
                for (int k = 0; k < kKeys / 8; ++k) top = fmaxf(top, fmaxf(scores[k][2 * half], scores[k][2 * half + 1]));
                top = lanes_max<4>(top);
                const float base = top == unseen() ? 0.f : top;  // a row that has seen nothing yet
                const float keep = exp2f((warp.top[half] - base) * kLog2e);
                warp.top[half] = top;
                float total = 0.f;
#pragma unroll
                for (int k = 0; k < kKeys / 8; ++k) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[k][2 * half + i];
                        score = exp2f((score - base) * kLog2e);
                        total += score;
                    }
                }
                warp.total[half] = warp.total[half] * keep + total;
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; ++n) {
                    warp.sums[n][2 * half] *= keep;
                    warp.sums[n][2 * half + 1] *= keep;
                }
            }

            const uint32 values = shared_address(shared.values[stage] + (lane % 16) * kStride + lane / 16 * 8);
#pragma unroll
            for (int k = 0; k < kKeys / 16; ++k) {
                const uint32 a[4] = {half2_word(scores[2 * k][0], scores[2 * k][1]),
                                     half2_word(scores[2 * k][2], scores[2 * k][3]),
                                     half2_word(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                                     half2_word(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
                for (int n = 0; n < kDims; ++n) {
                    uint32 b[4];
                    load_matrices_transposed(b, values + (k * 16 * kStride + n * 16) * 2);
                    mma_m16n8k16(warp.sums[2 * n], a, b[0], b[1]);
                    mma_m16n8k16(warp.sums[2 * n + 1], a, b[2], b[3]);
                }
            }
        }
        wait_for_copies<0>();

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = 1.f / lanes_sum<4>(warp.total[half]);
            if (!mine[half]) continue;
            float* out = args.out + (static_cast<size_t>(row[half]) * KV_HEADS * GROUP + head[half]) * HEAD_DIM + 2 * place;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) {
                *reinterpret_cast<float2*>(out + n * 8) =
                    make_float2(warp.sums[n][2 * half] * inverse, warp.sums[n][2 * half + 1] * inverse);
            }
        }
        begin = end;
    }
}
