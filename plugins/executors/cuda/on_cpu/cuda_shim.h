// The little of CUDA that the traits headers and ops/repack.cu use, in C++: the same text then runs without a GPU.
// Stands in for cuda_fp16.h. One thread of one block: grid-stride loops do all the work.
#pragma once

#include "cuda_types.h"

#define __device__
#define __host__
#define __constant__ static
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

static const dim3 blockDim{}, gridDim{}, blockIdx{0, 0, 0}, threadIdx{0, 0, 0};

// There are no other lanes here; what asks for them must not be called.
template <class T>
T __shfl_xor_sync(unsigned, T, int) { std::abort(); }
inline void __syncthreads() {}
