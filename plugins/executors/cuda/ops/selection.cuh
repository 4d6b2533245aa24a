// The token at which a running count or a running mass, taken in order of rank, reaches a target: found by all blocks of
// a row together and without a sort. A histogram tells in which bin it lies; the few tokens of that bin are listed and
// compared with each other. Masses are fixed-point integers, so that sums depend neither on the order of addition nor on
// the number of blocks: equal logits give equal tokens, always.
#pragma once

#include "common.cuh"

constexpr int kThreads = THREADS;
constexpr int kVocab = VOCAB_SIZE;
constexpr int kMostBlocks = MOST_BLOCKS;    // of a row; the fewer, the more rows run at once
constexpr int kLeastBlocks = LEAST_BLOCKS;
constexpr int kMostOfBlock = ceil_div(kVocab, kLeastBlocks * kThreads) * kThreads;  // tokens
constexpr int kAtOnce = kMostOfBlock < 4 * kThreads ? kMostOfBlock / kThreads : 4;  // tokens a thread loads together
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kListed = kThreads;  // tokens that are compared with each other, one a thread
constexpr int kWarps = kThreads / kWarp;

constexpr int bits_of(int n) { return n > 1 ? 1 + bits_of((n + 1) / 2) : 0; }
// A mass is summed in two halves by 32-bit atomics in shared memory; the halves of a block's tokens must not overflow.
constexpr int kHalfBits = 31 - bits_of(kMostOfBlock);
constexpr float kOne = static_cast<float>(1ull << (2 * kHalfBits));  // the mass of weight 1

static_assert(kBins % kThreads == 0 && kThreads % kWarp == 0 && kMostBlocks <= kThreads, "each thread owns whole bins");
static_assert(2 * kHalfBits + bits_of(kVocab) < 64, "the mass of all tokens fits 64 bits");

__device__ __forceinline__ int block_count() { return static_cast<int>(gridDim.x); }

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

struct Amount {
    uint64 mass = 0;
    uint32 count = 0;

    __device__ __forceinline__ void add(const Amount& other) {
        mass += other.mass;
        count += other.count;
    }
    __device__ __forceinline__ uint64 by(bool mass_counts) const { return mass_counts ? mass : count; }
};

struct Listed {
    uint64 rank;
    uint64 mass;
};

// What blocks tell each other in one round. There are three: one in use, one still read by slow blocks, and one being
// cleared for the next round.
struct Exchange {
    uint64 mass[kBins];
    uint64 likely_mass;
    uint32 count[kBins];
    uint32 likely_count;
    uint32 listed;
    Listed list[kListed];  // not cleared
};
constexpr int kClearedWords = (8 * (kBins + 1) + 4 * (kBins + 2)) / 4;

struct Found {
    uint32 bin;
    Amount before, own;
};

struct Selected {
    uint64 rank;     // of the token
    Amount through;  // of all tokens up to it, itself included
};

struct SelectionMemory {
    uint32 count[kBins], low[kBins], high[kBins];
    Listed list[kListed];
    Amount warps[kWarps];
    Found found;
    Selected selected;
};

// All blocks of a row, which run at the same time. Starts and ends with both counters zero.
struct Grid {
    Exchange* exchanges;
    uint32* arrivals;
    uint32* departures;
    uint32 round = 0;

    __device__ __forceinline__ Exchange& exchange() const { return exchanges[round % 3]; }

    __device__ __forceinline__ void arrive() {
        uint32* cleared = reinterpret_cast<uint32*>(&exchanges[(round + 1) % 3]);
        for (int i = blockIdx.x * kThreads + threadIdx.x; i < kClearedWords; i += block_count() * kThreads) cleared[i] = 0;
        ++round;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(arrivals, 1u);
        }
    }

    __device__ __forceinline__ void wait() const {
        if (threadIdx.x == 0) {
            while (*reinterpret_cast<volatile uint32*>(arrivals) < round * block_count()) __nanosleep(20);
            __threadfence();
        }
        __syncthreads();
    }

    __device__ __forceinline__ void barrier() {
        arrive();
        wait();
    }

    __device__ __forceinline__ void leave() const {
        __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(departures, 1u) == block_count() - 1) *arrivals = *departures = 0;
    }
};

__device__ __forceinline__ int token_id(int i) { return (i * block_count() + static_cast<int>(blockIdx.x)) * kThreads + static_cast<int>(threadIdx.x); }

// Rising with rank: larger values first, then lower ids.
__device__ __forceinline__ uint64 rank_of(float value, int id) {
    const uint32 bits = __float_as_uint(__fadd_rn(value, 0.f));  // -0 becomes 0, with which it ties
    const uint32 falling = bits >> 31 ? bits : ~(bits | 0x80000000u);
    return static_cast<uint64>(falling) << 32 | static_cast<uint32>(id);
}

__device__ __forceinline__ int id_of(uint64 rank) { return static_cast<int>(rank & 0xffffffffu); }

// A row of logits, and how they are weighed and binned.
struct View {
    const float* values;
    float peak;         // the largest of them
    float temperature;
    float scale;        // bins per logit

    // Bins span the distance `spread` from the peak; what lies further down is in the last one.
    __device__ __forceinline__ void set_bins(float spread) { scale = spread > 0.f ? fminf(kBins / spread, 1e30f) : 0.f; }

    __device__ __forceinline__ int bin(float value) const { return static_cast<int>(fminf((peak - value) * scale, kBins - 1)); }

    __device__ __forceinline__ float shifted(float value) const { return __fdiv_rn(__fsub_rn(value, peak), temperature); }

    __device__ __forceinline__ uint64 mass(float value) const { return __float2ull_rn(expf(shifted(value)) * kOne); }

    // Shows this thread's tokens; a few are loaded at once, since their loads then overlap.
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        const int each = ceil_div(kVocab, block_count() * kThreads);
#pragma unroll 1
        for (int start = 0; start < each; start += kAtOnce) {
            float loaded[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) loaded[i] = token_id(start + i) < kVocab ? values[token_id(start + i)] : 0.f;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (token_id(start + i) < kVocab) visit(loaded[i], token_id(start + i));
            }
        }
    }
};

struct RunningSum {
    Amount before, through, total;  // of the threads before this one, with this one, and of all
};

__device__ __forceinline__ RunningSum running_sum(const Amount& own, SelectionMemory& shared) {
    Amount through = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint64 mass = __shfl_up_sync(kFullMask, through.mass, step);
        const uint32 count = __shfl_up_sync(kFullMask, through.count, step);
        if (static_cast<int>(threadIdx.x) % kWarp >= step) through.add({mass, count});
    }
    if (threadIdx.x % kWarp == kWarp - 1) shared.warps[threadIdx.x / kWarp] = through;
    __syncthreads();
    RunningSum sum{{through.mass - own.mass, through.count - own.count}, through, {}};
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp < static_cast<int>(threadIdx.x) / kWarp) {
            sum.before.add(shared.warps[warp]);
            sum.through.add(shared.warps[warp]);
        }
        sum.total.add(shared.warps[warp]);
    }
    __syncthreads();
    return sum;
}

// A histogram over all blocks: this thread's bins, and what lies in the bins before them.
struct Histogram {
    Amount bins[kBinsPerThread];
    Amount before;
    Amount total;
};

// `digit` gives a token's bin, or -1 where it takes no part.
template <class Digit>
__device__ __forceinline__ Histogram histogram(Grid& grid, SelectionMemory& shared, const View& view, Digit digit) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.count[bin] = shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    view.each([&](float value, int id) {
        const int bin = digit(value, id);
        if (bin < 0) return;
        atomicAdd(&shared.count[bin], 1u);
        const uint64 mass = view.mass(value);
        if (mass == 0) return;
        atomicAdd(&shared.low[bin], static_cast<uint32>(mass & ((1u << kHalfBits) - 1)));
        atomicAdd(&shared.high[bin], static_cast<uint32>(mass >> kHalfBits));
    });
    __syncthreads();
    Exchange& sums = grid.exchange();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        if (shared.count[bin] == 0) continue;
        atomicAdd(&sums.count[bin], shared.count[bin]);
        const uint64 mass = (static_cast<uint64>(shared.high[bin]) << kHalfBits) + shared.low[bin];
        if (mass) atomicAdd(&sums.mass[bin], mass);
    }
    grid.barrier();

    Histogram all;
    Amount own;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        const int bin = threadIdx.x * kBinsPerThread + i;
        all.bins[i].mass = __ldcg(&sums.mass[bin]);
        all.bins[i].count = __ldcg(&sums.count[bin]);
        own.add(all.bins[i]);
    }
    const RunningSum sum = running_sum(own, shared);
    all.before = sum.before;
    all.total = sum.total;
    return all;
}

// The bin in which the running amount reaches a target of 1 to the total.
__device__ __forceinline__ Found find(SelectionMemory& shared, const Histogram& histogram, bool by_mass, uint64 target) {
    Amount running = histogram.before;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
        const Amount before = running;
        running.add(histogram.bins[i]);
        if (before.by(by_mass) < target && target <= running.by(by_mass)) {
            shared.found = {threadIdx.x * kBinsPerThread + i, before, histogram.bins[i]};
        }
    }
    __syncthreads();
    const Found found = shared.found;
    __syncthreads();
    return found;
}

// Lists the tokens that `take` names, at most kListed, in shared memory and in no order; returns how many.
template <class Take>
__device__ __forceinline__ int gather(Grid& grid, SelectionMemory& shared, const View& view, Take take) {
    Exchange& lists = grid.exchange();
    view.each([&](float value, int id) {
        if (take(value, id)) lists.list[atomicAdd(&lists.listed, 1u)] = {rank_of(value, id), view.mass(value)};
    });
    grid.barrier();
    const int listed = static_cast<int>(__ldcg(&lists.listed));
    if (static_cast<int>(threadIdx.x) < listed) {
        const Listed* mine = &lists.list[threadIdx.x];
        shared.list[threadIdx.x] = {__ldcg(&mine->rank), __ldcg(&mine->mass)};
    }
    __syncthreads();
    return listed;
}

// The first token in order of rank at which the running count (or mass) reaches `target`, 1 to the total. `coarse` is
// the histogram of View::bin. A bin with more tokens than can be listed is split by the digits of the ranks in it.
__device__ __forceinline__ Selected select(Grid& grid, SelectionMemory& shared, const View& view, const Histogram& coarse, bool by_mass, uint64 target) {
    Found found = find(shared, coarse, by_mass, target);
    const int bin = static_cast<int>(found.bin);
    Amount before = found.before;
    uint64 prefix = 0;
    int shift = 64;
    auto within = [&](float value, int id) { return view.bin(value) == bin && (shift == 64 || rank_of(value, id) >> shift == prefix); };
    while (found.own.count > kListed) {
        const int next = max(shift - kDigitBits, 0);
        const uint32 mask = (1u << (shift - next)) - 1;
        const Histogram fine = histogram(grid, shared, view, [&](float value, int id) {
            return within(value, id) ? static_cast<int>(static_cast<uint32>(rank_of(value, id) >> next) & mask) : -1;
        });
        found = find(shared, fine, by_mass, target - before.by(by_mass));
        before.add(found.before);
        prefix = prefix << (shift - next) | found.bin;
        shift = next;
    }
    const int listed = gather(grid, shared, view, within);
    if (static_cast<int>(threadIdx.x) < listed) {
        const Listed mine = shared.list[threadIdx.x];
        Amount through = before;
        for (int i = 0; i < listed; ++i) {
            if (shared.list[i].rank > mine.rank) continue;
            through.mass += shared.list[i].mass;
            through.count += 1;
        }
        const uint64 own = by_mass ? mine.mass : 1;
        if (through.by(by_mass) >= target && through.by(by_mass) - own < target) shared.selected = {mine.rank, through};
    }
    __syncthreads();
    const Selected selected = shared.selected;
    __syncthreads();
    return selected;
}
