// Enough of CUDA, in C++, to run kernels whose threads work together: a block is a thread of this process, and its CUDA
// threads take turns in it, changing over where they wait for each other. Stands in for cuda_fp16.h.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

using std::max;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct __half { unsigned short bits; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half) { std::abort(); }  // not needed so far

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
    Meeting all;
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
template <class T>
T __ldg(const T* p) { return *p; }

template <class To, class From>
To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long __float2ull_rn(float value) { return static_cast<unsigned long long>(std::nearbyint(value)); }
inline unsigned long long __double2ull_ru(double value) { return static_cast<unsigned long long>(std::ceil(value)); }
inline double __ull2double_rn(unsigned long long value) { return static_cast<double>(value); }

// Runs a kernel: `body` is called once for each thread.
template <class Body>
void launch(int blocks, int threads, Body body) {
    static thread_local Body* current;
    std::vector<std::thread> all;
    for (int block = 0; block < blocks; ++block) {
        all.emplace_back([&, block] {
            RunningBlock mine;
            std::vector<char> stacks(static_cast<size_t>(threads) << 16);
            mine.threads.resize(threads);
            mine.ended.resize(threads);
            mine.warps.resize(threads / 32);
            mine.lanes.resize(threads);
            running = &mine;
            current = &body;
            blockDim.x = threads;
            gridDim.x = blocks;
            blockIdx.x = block;
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
