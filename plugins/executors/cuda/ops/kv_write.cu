// Stores K and V of a step's tokens in the paged cache. Block (KV head, row). Compile-time: KV, the cache's type.
#include "kv_cache.cuh"

extern "C" __global__ void kv_write(const float* k, const float* v, KV* keys, KV* values, const __grid_constant__ StepRows rows,
                                    int head_dim) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int head = blockIdx.x, row = blockIdx.y, kv_heads = gridDim.x;
    const size_t from = (static_cast<size_t>(row) * kv_heads + head) * head_dim;
    const int position = rows.positions[row];
    const KvRow<KV> key = kv_row(keys, rows, row, position, head, kv_heads, head_dim);
    const KvRow<KV> value = kv_row(values, rows, row, position, head, kv_heads, head_dim);
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        kv_store(key, i, k[from + i]);
        kv_store(value, i, v[from + i]);
    }
}
