// Stores K and V of a step's tokens in the paged cache. Block (KV head, row). Compile-time: KV, the cache's element type.
#include "kv_cache.cuh"

__device__ __forceinline__ void put(__half* p, float v) { *p = __float2half_rn(v); }
__device__ __forceinline__ void put(float* p, float v) { *p = v; }

extern "C" __global__ void kv_write(const float* k, const float* v, KV* keys, KV* values, const __grid_constant__ StepRows rows,
                                    int head_dim) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int head = blockIdx.x, row = blockIdx.y, kv_heads = gridDim.x;
    const size_t from = (static_cast<size_t>(row) * kv_heads + head) * head_dim;
    const size_t to = kv_offset(rows, row, rows.positions[row], head, kv_heads, head_dim);
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        put(keys + to + i, k[from + i]);
        put(values + to + i, v[from + i]);
    }
}
