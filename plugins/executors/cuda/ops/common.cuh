// Small things every kernel uses: loads, reductions, programmatic dependent launch.
#pragma once

#include <cuda_fp16.h>

using int8 = signed char;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

constexpr float kLowest = -3.4e38f;  // below every score; exp(kLowest - x) is 0, and no difference of two is NaN
constexpr int kWarp = 32;
constexpr uint32 kFullMask = 0xffffffffu;

__device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int largest(int a) { return a; }
template <class... Rest>
constexpr int largest(int a, int b, Rest... rest) {
    return largest(a > b ? a : b, rest...);
}

// Shared memory that a block of a step of one token asks for at least: more than a third of what a multiprocessor has, so
// that it never holds three. Kernels of such a step have one block for each multiprocessor, and each waits for the kernel
// before, even where it has nothing to do. So whenever a kernel's blocks are placed, each multiprocessor has just one
// half free: all get a block, none gets two.
constexpr int kLeastShared = 80 << 10;

// Threads whose registers a block is to be counted with. A multiprocessor has four parts, each with a quarter of its
// registers, and deals warps out to them in turn: nine warps take as much room as twelve.
constexpr int register_threads(int threads) { return ceil_div(threads, 4 * kWarp) * 4 * kWarp; }

// How a weight's bytes are read. Weights in global memory are read once per step and must not push activations out of
// L1; weights that a bulk copy brought into shared memory are read with plain loads. A traits header is written
// against this interface and works from either place.
struct GlobalStream {
    static __device__ __forceinline__ uint4 u128(const uint8* p) {
        uint4 v;
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(p));
        return v;
    }
    static __device__ __forceinline__ uint2 u64(const uint8* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }
    static __device__ __forceinline__ uint32 u32(const uint8* p) { return __ldg(reinterpret_cast<const uint32*>(p)); }
    static __device__ __forceinline__ uint32 u16(const uint8* p) { return __ldg(reinterpret_cast<const uint16*>(p)); }
    static __device__ __forceinline__ uint32 u8(const uint8* p) { return __ldg(p); }
};

struct SharedTile {
    static __device__ __forceinline__ uint4 u128(const uint8* p) { return *reinterpret_cast<const uint4*>(p); }
    static __device__ __forceinline__ uint2 u64(const uint8* p) { return *reinterpret_cast<const uint2*>(p); }
    static __device__ __forceinline__ uint32 u32(const uint8* p) { return *reinterpret_cast<const uint32*>(p); }
    static __device__ __forceinline__ uint32 u16(const uint8* p) { return *reinterpret_cast<const uint16*>(p); }
    static __device__ __forceinline__ uint32 u8(const uint8* p) { return *p; }
};

__device__ __forceinline__ float half_bits(uint32 bits) { return __half2float(__ushort_as_half(static_cast<uint16>(bits))); }
__device__ __forceinline__ float2 half2_bits(uint32 bits) {
    return make_float2(half_bits(bits & 0xffffu), half_bits(bits >> 16));
}

// Asks for bytes to be in the L2 cache; their address and number are multiples of 16.
__device__ __forceinline__ void ask_l2(const uint8* from, uint32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Sum over groups of `kLanes` neighbouring lanes; every lane gets the result.
template <int kLanes = kWarp>
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullMask, v, step);
    return v;
}

template <int kLanes = kWarp>
__device__ __forceinline__ float lanes_max(float v) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kFullMask, v, step));
    return v;
}

// Sum over the block, for all threads; `scratch` holds one float a warp. Ends with a barrier.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
    v = lanes_sum(v);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
    __syncthreads();
    float total = 0.f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

// Programmatic dependent launch (sm_90 and later): the next kernel may start while this one runs, and waits where it
// first needs what this one wrote. Nothing written by an earlier kernel of the chain may be read before the wait.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
