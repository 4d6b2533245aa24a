// Enough of CUDA, in C++, to run kernels whose threads work together: a block is a thread of this process, and its CUDA
// threads take turns in it, changing over where they wait for each other. Stands in for cuda_fp16.h.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "cuda_types.h"

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

using std::max;
using std::min;

static thread_local dim3 blockDim, gridDim, blockIdx, threadIdx;

struct Meeting {
    int arrived = 0, met = 0;
};

struct RunningBlock {
    ucontext_t scheduler;
    std::vector<ucontext_t> threads;
    std::vector<char> ended;
    std::vector<Meeting> warps;
    std::vector<unsigned long long> lanes;
    Meeting all, parts[16];  // of a block, of some of its warps
};
static thread_local RunningBlock* running;

inline void change_over() {
    const unsigned self = threadIdx.x;
    swapcontext(&running->threads[self], &running->scheduler);
    threadIdx.x = self;
}

inline void meet(Meeting& meeting, int members) {
    const int met = meeting.met;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        ++meeting.met;
        return;
    }
    while (meeting.met == met) change_over();
}

inline void __syncthreads() { meet(running->all, static_cast<int>(running->threads.size())); }

inline void __syncwarp(unsigned = 0xffffffffu) { meet(running->warps[threadIdx.x / 32], 32); }

template <class T>
T from_lane(T value, unsigned lane) {
    Meeting& warp = running->warps[threadIdx.x / 32];
    unsigned long long* lanes = &running->lanes[threadIdx.x / 32 * 32];
    std::memcpy(&lanes[threadIdx.x % 32], &value, sizeof value);
    meet(warp, 32);
    std::memcpy(&value, &lanes[lane], sizeof value);
    meet(warp, 32);
    return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) { return from_lane(value, static_cast<unsigned>(lane) % 32); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return from_lane(value, threadIdx.x % 32 ^ mask); }
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
    const int lane = static_cast<int>(threadIdx.x % 32) - step;
    return from_lane(value, lane < 0 ? threadIdx.x % 32 : lane);
}

template <class T>
T atomicAdd(T* p, T value) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {
    change_over();
    std::this_thread::yield();
}
template <class T>
T __ldcg(const T* p) { return *static_cast<const volatile T*>(p); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline void sincospif(float x, float* sine, float* cosine) {
    const double angle = x * 3.14159265358979323846;
    *sine = static_cast<float>(std::sin(angle));
    *cosine = static_cast<float>(std::cos(angle));
}
inline unsigned long long __float2ull_rn(float value) { return static_cast<unsigned long long>(std::nearbyint(value)); }
inline unsigned long long __double2ull_ru(double value) { return static_cast<unsigned long long>(std::ceil(value)); }
inline double __ull2double_rn(unsigned long long value) { return static_cast<double>(value); }

// Runs a kernel: `body` is called once for each thread. All blocks are there at once.
template <class Body>
void launch(dim3 blocks, int threads, Body body) {
    static thread_local Body* current;
    std::vector<std::thread> all;
    for (unsigned block = 0; block < blocks.x * blocks.y * blocks.z; ++block) {
        all.emplace_back([&, block] {
            RunningBlock mine;
            const std::unique_ptr<char[]> stacks(new char[static_cast<size_t>(threads) << 16]);
            mine.threads.resize(threads);
            mine.ended.resize(threads);
            mine.warps.resize(threads / 32);
            mine.lanes.resize(threads);
            running = &mine;
            current = &body;
            blockDim.x = threads;
            gridDim = blocks;
            blockIdx = {block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y};
            for (int i = 0; i < threads; ++i) {
                getcontext(&mine.threads[i]);
                mine.threads[i].uc_stack.ss_sp = &stacks[static_cast<size_t>(i) << 16];
                mine.threads[i].uc_stack.ss_size = 1 << 16;
                mine.threads[i].uc_link = &mine.scheduler;
                makecontext(&mine.threads[i], +[] {
                    (*current)();
                    running->ended[threadIdx.x] = 1;
                }, 0);
            }
            for (int left = threads; left;) {
                left = 0;
                for (int i = 0; i < threads; ++i) {
                    if (mine.ended[i]) continue;
                    ++left;
                    threadIdx.x = i;
                    swapcontext(&mine.scheduler, &mine.threads[i]);
                }
            }
        });
    }
    for (std::thread& one : all) one.join();
}
