// The best token of a row of logits, its log-probability, and the rows of the step after: one launch ends a decode step
// and begins the next, so that no token waits for the host. Ties go to the lower id, as in mortice.core.text.sampling.
#include "kv_cache.cuh"

struct Best {
    float logit = kLowest;
    int id = 0x7fffffff;
    float total = 0.f;  // sum of exp(x - logit)

    __device__ __forceinline__ void join(float other_logit, int other_id, float other_total) {
        const bool other_wins = other_logit > logit || (other_logit == logit && other_id < id);
        const float top = other_wins ? other_logit : logit;
        total = total * __expf(logit - top) + other_total * __expf(other_logit - top);
        if (other_wins) {
            logit = other_logit;
            id = other_id;
        }
    }
};

struct Chosen {
    int id;
    float logprob;
};

struct GreedyArgs {
    const float* logits;  // (vocab_size,)
    int vocab_size;
    Best* partial;        // one a block
    int* arrivals;        // zero before and after
    int* token_ids;       // the next step's only row
    int* positions;
    int* steps;           // steps taken
    Chosen* chosen;       // ring of results in host memory
    int ring;             // its length
};

constexpr int kThreads = 256;

__device__ __forceinline__ Best block_best(Best best) {
    __shared__ Best warps[kThreads / kWarp];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const float logit = __shfl_xor_sync(kFullMask, best.logit, step), total = __shfl_xor_sync(kFullMask, best.total, step);
        best.join(logit, __shfl_xor_sync(kFullMask, best.id, step), total);
    }
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
    __syncthreads();
    best = warps[0];
    for (int warp = 1; warp < kThreads / kWarp; ++warp) best.join(warps[warp].logit, warps[warp].id, warps[warp].total);
    __syncthreads();
    return best;
}

extern "C" __global__ void __launch_bounds__(kThreads) greedy(const __grid_constant__ GreedyArgs args) {
    __shared__ bool is_last;
    let_next_kernel_start();
    wait_for_previous_kernel();
    Best best;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < args.vocab_size; i += gridDim.x * kThreads) best.join(args.logits[i], i, 1.f);
    best = block_best(best);
    if (threadIdx.x == 0) {
        args.partial[blockIdx.x] = best;
        __threadfence();
        is_last = atomicAdd(args.arrivals, 1) == static_cast<int>(gridDim.x) - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    best = Best{};
    for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kThreads) {
        const Best* other = args.partial + i;
        best.join(__ldcg(&other->logit), __ldcg(&other->id), __ldcg(&other->total));
    }
    best = block_best(best);
    if (threadIdx.x == 0) {
        *args.arrivals = 0;
        args.token_ids[0] = best.id;
        args.positions[0] += 1;
        const int step = *args.steps;
        *args.steps = step + 1;
        args.chosen[step % args.ring] = {best.id, -logf(best.total)};
        __threadfence_system();
    }
}
