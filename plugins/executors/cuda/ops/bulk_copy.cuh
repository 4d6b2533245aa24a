// Bulk asynchronous copies to shared memory, and the barriers that tell of their arrival (sm_90 and later; PTX ISA,
// "cp.async.bulk" and "mbarrier").
#pragma once

#include "shared_address.cuh"

#ifdef __CUDA_ARCH__  // not where kernels run on the CPU

// One slot's barrier: a phase of it ends when all who ask have done so and the bytes asked for have arrived.
__device__ __forceinline__ void start_barrier(uint64* barrier, int askers = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(askers) : "memory");
}

__device__ __forceinline__ void publish_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wait_arrival(const uint64* barrier, uint32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Weights are read once a step: they go first when the L2 cache needs room, activations stay.
__device__ __forceinline__ uint64 read_once_policy() {
    uint64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// So many bytes are going to arrive for this asker.
__device__ __forceinline__ void expect_bytes(uint64* barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void copy_bulk(uint8* to, const uint8* from, uint32 bytes, uint64* barrier, uint64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_bulk(uint8* to, const uint8* from, uint32 bytes, uint64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
        "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// A barrier of some warps, `threads` threads in all: to wait for it, or only to say that this warp is there. What made
// `read` has happened by then.
__device__ __forceinline__ void wait_for_part(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_for_part(int barrier, int threads, int read) {
    asm volatile("// %2\nbar.arrive %0, %1;" ::"r"(barrier), "r"(threads), "r"(read) : "memory");
}

#endif
