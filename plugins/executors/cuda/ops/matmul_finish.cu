// Products of tensor cores to results in float32, see finish.cuh. Block (columns, row).
//
// Compile-time: what finish.cuh names, and VECTOR: 4, or 1 where a part's columns are not a multiple of 4.
#include "finish.cuh"

extern "C" __global__ void __launch_bounds__(256) matmul_finish(const __grid_constant__ FinishArgs args) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, start = 0;
#pragma unroll
    for (int p = 0; p < (GATED ? 1 : kMaxParts); ++p) {
        const Part& part = args.parts[p];
        if (column < part.columns) {
            Values<VECTOR> results[1];
            finish(args, blockIdx.y, part, start, Share<VECTOR>{column / VECTOR, 0, part.columns}, results);
            return;
        }
        column -= part.columns;
        start += part.columns;
    }
}
