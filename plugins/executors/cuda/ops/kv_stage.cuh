// Pages of the KV cache brought to shared memory: K and V of one KV head's tokens of a page lie together, so each is one
// copy, asked for ahead. A bulk asynchronous copy on sm_90 and later, asynchronous copies of 16 bytes by all threads before.
#pragma once

#include "bulk_copy.cuh"
#include "kv_cache.cuh"

// K, or V, of a page and head.
template <class T>
constexpr int page_bytes(int head_dim) {
    return kPageTokens * head_dim * static_cast<int>(sizeof(T));
}
template <>
constexpr int page_bytes<Q8>(int head_dim) {
    return kPageTokens * head_dim / kQ8Block * (kQ8Block + static_cast<int>(sizeof(__half)));
}

// Room for kStages pages in shared memory. Pages are asked for in order; the n-th comes to stage n % kStages.
template <class T, int kHeadDim, int kKvHeads, int kStages>
struct Stages {
    static constexpr int kHalf = page_bytes<T>(kHeadDim);
    static constexpr int kBytes = kStages * 2 * kHalf;
    static_assert(kHalf % 16 == 0, "copied 16 bytes at a time");

    uint8* memory;     // kBytes
    uint64* barriers;  // kStages

    // All threads call this first, before a __syncthreads.
    __device__ __forceinline__ void start() const {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) start_barrier(barriers + stage);
            publish_barriers();
        }
#endif
    }

    // All threads call it, for the n-th page: `page` of the cache, or -1 for none.
    __device__ __forceinline__ void ask(T* keys, T* values, int n, int page, int head) const {
        uint8* to = memory + n % kStages * 2 * kHalf;
        if (page >= 0) {
            const void* from[] = {kv_row(keys, page, 0, head, kKvHeads, kHeadDim).values,
                                  kv_row(values, page, 0, head, kKvHeads, kHeadDim).values};
#if __CUDA_ARCH__ >= 900
            if (threadIdx.x == 0) {
                expect_bytes(barriers + n % kStages, 2 * kHalf);
                copy_bulk(to, static_cast<const uint8*>(from[0]), kHalf, barriers + n % kStages);
                copy_bulk(to + kHalf, static_cast<const uint8*>(from[1]), kHalf, barriers + n % kStages);
            }
#else
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                for (int at = 16 * threadIdx.x; at < kHalf; at += 16 * blockDim.x) {
                    copy_16(to + half * kHalf + at, static_cast<const uint8*>(from[half]) + at);
                }
            }
#endif
        }
#if __CUDA_ARCH__ < 900
        end_of_copies();
#endif
    }

    // Waits for the n-th page, kStages - 1 later ones having been asked for. All threads call it.
    __device__ __forceinline__ void wait(int n) const {
#if __CUDA_ARCH__ >= 900
        wait_arrival(barriers + n % kStages, n / kStages % 2);
#else
        wait_for_copies<kStages - 1>();
        __syncthreads();
#endif
    }

    __device__ __forceinline__ T* keys(int n) const { return reinterpret_cast<T*>(memory + n % kStages * 2 * kHalf); }
    __device__ __forceinline__ T* values(int n) const { return reinterpret_cast<T*>(memory + n % kStages * 2 * kHalf + kHalf); }

private:
    static __device__ __forceinline__ void copy_16(uint8* to, const uint8* from) {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32>(__cvta_generic_to_shared(to))), "l"(from)
                     : "memory");
#else
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
    }
    static __device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    template <int kLater>
    static __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
    }
};
