// What warps and blocks that share a row's context do with their sums: attention.cu and attention_rows.cu end alike.
#pragma once

#include "runs.cuh"

constexpr int kWarps = WARPS;

struct AttentionArgs {
    const float* q;     // (rows, kv_heads * GROUP, HEAD_DIM)
    KV* keys;           // the layer's cache, only read
    KV* values;
    float* out;         // like q
    float* partial;     // (rows, kv_heads, splits, GROUP, HEAD_DIM + 2): sums, maximum, total
    int* arrivals;      // (rows, kv_heads), zero before and after
    StepRows rows;
    float scale;
    float softcap;
    int window;
    int splits;
};

// Sums of a warp for each head of the group, with their maximum and total at the end.
using WarpSums = float[GROUP][HEAD_DIM + 2];

// Joins the sums of the warps, and of the `used` blocks that share the row: the one that comes last writes the result.
__device__ __forceinline__ void join(const AttentionArgs& args, const WarpSums (&joined)[kWarps], int used) {
    __shared__ bool is_last;
    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, kv_heads = gridDim.y;
    __syncthreads();
    constexpr int kPartial = GROUP * (HEAD_DIM + 2);
    float* partial = args.partial + (static_cast<size_t>(row) * kv_heads + head) * args.splits * kPartial;
    float* out = args.out + (static_cast<size_t>(row) * kv_heads + head) * GROUP * HEAD_DIM;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kWarps * kWarp) {
        const int g = i / HEAD_DIM, d = i % HEAD_DIM;
        float top = kLowest;
        for (int w = 0; w < kWarps; ++w) top = fmaxf(top, joined[w][g][HEAD_DIM]);
        float sum = 0.f, total = 0.f;
        for (int w = 0; w < kWarps; ++w) {
            const float other = joined[w][g][HEAD_DIM];
            const float take = __expf(other - top);
            sum += joined[w][g][d] * take;
            total += joined[w][g][HEAD_DIM + 1] * take;
        }
        if (used == 1) {
            out[i] = sum / total;
        } else {
            float* mine = partial + split * kPartial + g * (HEAD_DIM + 2);
            mine[d] = sum;
            if (d == 0) {
                mine[HEAD_DIM] = top;
                mine[HEAD_DIM + 1] = total;
            }
        }
    }
    if (used == 1) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&args.arrivals[row * kv_heads + head], 1) == used - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kWarps * kWarp) {
        const int g = i / HEAD_DIM, d = i % HEAD_DIM;
        float top = kLowest, sum = 0.f, total = 0.f;
        for (int s = 0; s < used; ++s) {
            const float* other = partial + s * kPartial + g * (HEAD_DIM + 2);
            const float next = fmaxf(top, __ldcg(other + HEAD_DIM));
            const float keep = __expf(top - next), take = __expf(__ldcg(other + HEAD_DIM) - next);
            sum = sum * keep + __ldcg(other + d) * take;
            total = total * keep + __ldcg(other + HEAD_DIM + 1) * take;
            top = next;
        }
        out[i] = sum / total;
    }
    if (threadIdx.x == 0) args.arrivals[row * kv_heads + head] = 0;
}
