// Enough of CUDA, in C++, to run kernels whose threads work together: threads of this process run a block each at a time,
// and its CUDA threads take turns there, changing over where they wait for each other. Stands in for cuda_fp16.h.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
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

// A CUDA thread. It begins as a context and is switched by jumps after that, which ask nothing of the system.
struct Thread {
    ucontext_t beginning;
    jmp_buf place;
    bool begun = false, ended = false;
};

// Who runs the blocks of a kernel: as many at once as the machine has cores, and another for each that waits for others.
struct Crew {
    std::atomic<unsigned> next{0};
    unsigned blocks;
    std::function<void(unsigned block)> run;
    std::mutex lock;
    std::deque<std::thread> members;
    void grow() {
        const std::lock_guard<std::mutex> held(lock);
        members.emplace_back([this] {
            for (unsigned block; (block = next++) < blocks;) run(block);
        });
    }
    void join() {  // members may come meanwhile, made by one that is waited for
        for (size_t i = 0;; ++i) {
            std::thread* member;
            {
                const std::lock_guard<std::mutex> held(lock);
                if (i == members.size()) return;
                member = &members[i];
            }
            member->join();
        }
    }
};

struct RunningBlock {
    Crew* crew;
    std::function<void()> body;
    bool waited;  // for another block
    std::unique_ptr<char[]> stacks;
    jmp_buf scheduler;
    std::vector<Thread> threads;
    std::vector<Meeting> warps;
    std::vector<unsigned long long> lanes[2];
    Meeting all, parts[16];  // of a block, of some of its warps
};
static thread_local RunningBlock* running;

// Goes on where a thread of this block has got to.
[[noreturn]] inline void enter(unsigned i) {
    Thread& thread = running->threads[i];
    threadIdx.x = i;
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
    std::abort();
}

inline void change_over() {
    const unsigned self = threadIdx.x;
    if (!_setjmp(running->threads[self].place)) _longjmp(running->scheduler, 1);
    threadIdx.x = self;
}

// To the next thread of the warp, without the others: what a warp works on stays in the cache.
inline void change_over_in_warp() {
    const unsigned self = threadIdx.x;
    unsigned next = self;
    do next = next / 32 * 32 + (next + 1) % 32;
    while (running->threads[next].ended);
    if (!_setjmp(running->threads[self].place)) enter(next);
    threadIdx.x = self;
}

inline bool is_last_to(Meeting& meeting, int members) {
    if (++meeting.arrived < members) return false;
    meeting.arrived = 0;
    ++meeting.met;
    return true;
}
inline void meet(Meeting& meeting, int members) {
    const int met = meeting.met;
    if (is_last_to(meeting, members)) return;
    while (meeting.met == met) change_over();
}
inline void meet_in_warp() {
    Meeting& warp = running->warps[threadIdx.x / 32];
    const int met = warp.met;
    if (is_last_to(warp, 32)) return;
    while (warp.met == met) change_over_in_warp();
}

inline void __syncthreads() { meet(running->all, static_cast<int>(running->threads.size())); }

inline void __syncwarp(unsigned = 0xffffffffu) { meet_in_warp(); }

template <class T>
T from_lane(T value, unsigned lane) {
    // two places by turns: who is ahead puts the next value out while another still has to read this one
    const unsigned first = threadIdx.x / 32 * 32, turn = running->warps[first / 32].met & 1;
    std::memcpy(&running->lanes[turn][threadIdx.x], &value, sizeof value);
    meet_in_warp();
    std::memcpy(&value, &running->lanes[turn][first + lane], sizeof value);
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
    if (!running->waited && running->crew->next < running->crew->blocks) running->crew->grow();
    running->waited = true;
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

// Runs all threads of a block, each until it waits, again and again until all have ended.
inline void take_turns(RunningBlock& block) {
    for (bool left = true; left;) {
        left = false;
        for (unsigned i = 0; i < block.threads.size(); ++i) {
            if (block.threads[i].ended) continue;
            left = true;
            if (!_setjmp(block.scheduler)) enter(i);
        }
    }
}

// A thread runs what its block runs, waits at the end, and does so again for the next block: begun once, for beginning
// asks the system for much. That may be in another thread of the process, so nothing that stays on its stack meanwhile
// may remember where thread-local memory lies.
__attribute__((noinline)) inline void run_thread() {
    running->body();
    Thread& self = running->threads[threadIdx.x];
    self.ended = true;
    if (!_setjmp(self.place)) _longjmp(running->scheduler, 1);
}
inline void live() {
    for (;;) run_thread();
}

inline void begin_threads(RunningBlock& block, unsigned count) {
    constexpr size_t kStack = 1 << 16;
    block.stacks.reset(new char[count * kStack]);
    block.threads.resize(count);
    for (unsigned i = 0; i < count; ++i) {
        ucontext_t& context = block.threads[i].beginning;
        getcontext(&context);
        context.uc_stack.ss_sp = block.stacks.get() + i * kStack;
        context.uc_stack.ss_size = kStack;
        makecontext(&context, live, 0);
    }
}

// Blocks that have run, to be used again.
struct RestingBlocks {
    std::mutex lock;
    std::map<unsigned, std::vector<std::unique_ptr<RunningBlock>>> by_size;
    std::unique_ptr<RunningBlock> take(unsigned threads) {
        const std::lock_guard<std::mutex> held(lock);
        auto& resting = by_size[threads];
        std::unique_ptr<RunningBlock> block;
        if (resting.empty()) {
            block.reset(new RunningBlock);
            begin_threads(*block, threads);
        } else {
            block = std::move(resting.back());
            resting.pop_back();
        }
        return block;
    }
    void put(std::unique_ptr<RunningBlock> block) {
        const std::lock_guard<std::mutex> held(lock);
        by_size[block->threads.size()].push_back(std::move(block));
    }
};
static RestingBlocks resting_blocks;

inline void run_block(Crew& crew, const std::function<void()>& body, unsigned threads) {
    std::unique_ptr<RunningBlock> block = resting_blocks.take(threads);
    block->crew = &crew;
    block->body = body;
    block->waited = false;
    for (Thread& thread : block->threads) thread.ended = false;
    block->all = {};
    std::fill(std::begin(block->parts), std::end(block->parts), Meeting{});
    block->warps.assign((threads + 31) / 32, {});
    for (auto& lanes : block->lanes) lanes.resize(threads);
    running = block.get();
    take_turns(*block);
    resting_blocks.put(std::move(block));
}

// Runs a kernel: `body` is called once for each thread.
template <class Body>
void launch(dim3 blocks, int threads, Body body) {
    Crew crew;
    crew.blocks = blocks.x * blocks.y * blocks.z;
    crew.run = [&](unsigned block) {
        blockDim.x = threads;
        gridDim = blocks;
        blockIdx = {block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y};
        run_block(crew, body, threads);
    };
    for (unsigned i = 0; i < std::min(crew.blocks, std::max(1u, std::thread::hardware_concurrency())); ++i) crew.grow();
    crew.join();
}
