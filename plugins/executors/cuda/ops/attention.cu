// Attention of single tokens over the paged KV cache, split along the context (Flash-Decoding: Dao et al. 2023).
//
// Block (split, KV head, row). The query heads of a group read K and V together. Each warp takes every kWarps-th pair
// of positions; kLanes neighbouring lanes hold a position's head, 8 elements each, so a warp reads kWarp / kLanes
// positions at once. Sums are kept in registers with a running maximum (Milakov and Gimelshein 2018), joined over warps
// in shared memory, and over splits by the block that comes last.
//
// Compile-time: HEAD_DIM, GROUP query heads a KV head, KV (the cache's type), WARPS of a block, SOFTCAP and WINDOWED (0 or
// 1), and RUN_TILE where runs of rows are left to attention_prefill.cu. What fits tensor cores goes to attention_rows.cu.
#include "attention_join.cuh"

constexpr int kPerLane = 8;
constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
constexpr int kLanes = power_of_two_from(HEAD_DIM / kPerLane);  // lanes that share a position; some idle at odd sizes
constexpr int kAtOnce = kWarp / kLanes;                         // positions a warp reads at once
static_assert(HEAD_DIM % kPerLane == 0 && kLanes <= kWarp, "a warp holds whole positions");

struct Running {
    float top = kLowest, total = 0.f;
    float sums[kPerLane] = {};

    __device__ __forceinline__ void add(float score, const Eight& value) {
        const float next = fmaxf(top, score);
        const float keep = __expf(top - next), weight = __expf(score - next);
        total = total * keep + weight;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sums[i] = sums[i] * keep + weight * value.v[i];
        top = next;
    }

    __device__ __forceinline__ void join(float other_top, float other_total, const float* other_sums, int stride) {
        const float next = fmaxf(top, other_top);
        const float keep = __expf(top - next);
        const float take = __expf(other_top - next);
        total = total * keep + other_total * take;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sums[i] = sums[i] * keep + other_sums[i * stride] * take;
        top = next;
    }
};

extern "C" __global__ void __launch_bounds__(kWarps* kWarp) attention(const __grid_constant__ AttentionArgs args) {
    __shared__ WarpSums joined[kWarps];
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, kv_heads = gridDim.y;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int part = lane % kLanes, slot = lane / kLanes;

    let_next_kernel_start();
    wait_for_previous_kernel();
    if (is_in_run(args.rows, row, gridDim.z)) return;
    const int end = args.rows.positions[row] + 1;
    const int begin = WINDOWED ? max(0, end - args.window) : 0;
    // splits are whole runs of positions; a short context uses few of them
    const int each = max(kWarps * kAtOnce, ceil_div(ceil_div(end - begin, args.splits), kAtOnce) * kAtOnce);
    const int used = ceil_div(end - begin, each);
    if (split >= used) return;
    const int from = begin + split * each, to = min(end, from + each);

    const bool holds = part * kPerLane < HEAD_DIM;
    const int at_part = holds ? part : 0;
    float q[GROUP][kPerLane];
    const float* query = args.q + (static_cast<size_t>(row) * kv_heads + head) * GROUP * HEAD_DIM;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        const Eight eight = load8(query + g * HEAD_DIM + at_part * kPerLane);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) q[g][i] = holds ? eight.v[i] * args.scale : 0.f;
    }

    Running running[GROUP];
#pragma unroll 2
    for (int base = from + warp * kAtOnce; base < to; base += kWarps * kAtOnce) {
        const int position = base + slot;
        const bool inside = position < to;
        const int there = inside ? position : from;
        const Eight key = kv_load8(kv_row(args.keys, args.rows, row, there, head, kv_heads, HEAD_DIM), at_part);
        const Eight value = kv_load8(kv_row(args.values, args.rows, row, there, head, kv_heads, HEAD_DIM), at_part);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float score = 0.f;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) score += q[g][i] * key.v[i];
            score = lanes_sum<kLanes>(score);
            if constexpr (SOFTCAP) score = args.softcap * tanhf(score / args.softcap);
            if (inside) running[g].add(score, value);
        }
    }

    // join the slots of a warp, then the warps
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int step = kLanes; step < kWarp; step *= 2) {
            const float top = __shfl_xor_sync(kFullMask, running[g].top, step);
            const float total = __shfl_xor_sync(kFullMask, running[g].total, step);
            float sums[kPerLane];
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) sums[i] = __shfl_xor_sync(kFullMask, running[g].sums[i], step);
            running[g].join(top, total, sums, 1);
        }
        if (slot == 0 && holds) {
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) joined[warp][g][part * kPerLane + i] = running[g].sums[i];
            if (part == 0) {
                joined[warp][g][HEAD_DIM] = running[g].top;
                joined[warp][g][HEAD_DIM + 1] = running[g].total;
            }
        }
    }
    join(args, joined, used);
}
