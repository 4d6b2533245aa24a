// Addresses in shared memory as instructions take them.
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH__  // not where kernels run on the CPU
__device__ __forceinline__ uint32 shared_address(const void* p) { return static_cast<uint32>(__cvta_generic_to_shared(p)); }
#endif
