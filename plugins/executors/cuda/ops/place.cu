// What lies between the Q, K and V products and attention, in one launch: the per-head norm of Q and K, RoPE, and the
// write of K and V to the paged cache. Block (head, row): the query heads, then the KV heads.
//
// Compile-time: HEAD_DIM, Q_HEADS, KV_HEADS, DIMS rotated elements (0: no RoPE), HALVES (0: adjacent pairs), HEAD_NORM
// (kNoNorm, kRmsNorm, kLayerNorm), KV, the cache's type.
#include "kv_cache.cuh"
#include "norm.cuh"
#include "rope.cuh"

struct PlaceArgs {
    const float* q;  // (rows, Q_HEADS, HEAD_DIM)
    const float* k;  // (rows, KV_HEADS, HEAD_DIM)
    const float* v;
    float* q_out;  // like q
    KV* keys;      // the layer's cache
    KV* values;
    const float* q_norm;  // (HEAD_DIM,)
    const float* k_norm;
    const double* frequencies;  // (DIMS / 2,)
    StepRows rows;
    float q_eps, k_eps;
    float magnitude;
};

constexpr int kThreads = 64;

extern "C" __global__ void __launch_bounds__(kThreads) place(const __grid_constant__ PlaceArgs args) {
    __shared__ float head[HEAD_DIM];
    __shared__ float scratch[kWarp];
    const int row = blockIdx.y;
    const bool is_query = blockIdx.x < Q_HEADS;
    const int index = is_query ? blockIdx.x : blockIdx.x - Q_HEADS;

    let_next_kernel_start();
    wait_for_previous_kernel();
    const int position = args.rows.positions[row];
    const size_t from = (static_cast<size_t>(row) * (is_query ? Q_HEADS : KV_HEADS) + index) * HEAD_DIM;
    const float* source = (is_query ? args.q : args.k) + from;
    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) head[i] = source[i];
    if constexpr (HEAD_NORM != kNoNorm) {
        const float* weight = is_query ? args.q_norm : args.k_norm;
        float mean = 0.f, squares = 0.f;
        if constexpr (HEAD_NORM == kLayerNorm) {
            float sum = 0.f;
            for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) sum += head[i];
            mean = block_sum(sum, scratch) / HEAD_DIM;
        }
        for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) squares += (head[i] - mean) * (head[i] - mean);
        const float inverse = rsqrtf(block_sum(squares, scratch) / HEAD_DIM + (is_query ? args.q_eps : args.k_eps));
        for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) head[i] = (head[i] - mean) * inverse * weight[i];
    }
    __syncthreads();

    for (int i = threadIdx.x; i < DIMS / 2; i += kThreads) {
        const int first = HALVES ? i : 2 * i, second = HALVES ? i + DIMS / 2 : 2 * i + 1;
        const float2 turn = rope_turn(position, args.frequencies[i], args.magnitude);
        const float a = head[first], b = head[second];
        head[first] = a * turn.x - b * turn.y;
        head[second] = a * turn.y + b * turn.x;
    }
    __syncthreads();
    if (is_query) {
        for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) args.q_out[from + i] = head[i];
        return;
    }
    const KvRow<KV> key = kv_row(args.keys, args.rows, row, position, index, KV_HEADS, HEAD_DIM);
    const KvRow<KV> value = kv_row(args.values, args.rows, row, position, index, KV_HEADS, HEAD_DIM);
    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
        kv_store(key, i, head[i]);
        kv_store(value, i, args.v[from + i]);
    }
}
