// Weights of a matrix-vector product through shared memory: each warp has a ring of slots that bulk asynchronous copies
// fill (sm_90 and later). What a warp will read is known from the start, so its first slots are asked for before the
// kernel waits for the one before it, whose work their transfer overlaps; from then on each slot that is read is asked
// for again. Loads need no registers this way, and half a multiprocessor is enough for a kernel, which leaves the other
// half to the next one.
#pragma once

#include "bulk_copy.cuh"

// The tiles a warp reads, in order: those of its units, of a gated unit first the gate's, then the other's. `kUnits` are
// shared by the warps of all blocks; a unit is so many tiles of each segment (gated) or of one.
template <int kUnits, bool kGated, int kSlots, class... S>
struct Ring {
    static constexpr int kSlotBytes = largest(S::T::kBytes...);
    static constexpr int kBytes = kSlots * kSlotBytes;
    static constexpr int kTileBytes[] = {S::T::kBytes...};
    static constexpr int kGroups[] = {S::kGroups...};
    static constexpr int kRun[] = {(kGated ? S::kGroups / kUnits : 1) * S::kTilesAcross...};  // tiles of a unit

    uint8* slots;
    uint64* barriers;
    int unit, stride;  // of the run being asked for
    int part = 0, left = 0, bytes = 0;
    const uint8* from = nullptr;
    int asked = 0, taken = 0;  // slots
    uint32 parity = 0;
    uint64 policy = 0;

    template <class Args>
    __device__ __forceinline__ void start(const Args& args) {
        policy = read_once_policy();
        if (threadIdx.x % kWarp == 0) {
            for (int slot = 0; slot < kSlots; ++slot) start_barrier(barriers + slot);
            publish_barriers();
        }
        __syncwarp();
        open(args);
#pragma unroll 1
        for (int slot = 0; slot < kSlots; ++slot) ask(args);
    }

    // The next tile, when it is there.
    __device__ __forceinline__ const uint8* take() const {
        wait_arrival(barriers + taken, parity);
        return slots + taken * kSlotBytes;
    }

    // All lanes are done with it; its slot is the next to be asked for.
    template <class Args>
    __device__ __forceinline__ void give_back(const Args& args) {
        if (++taken == kSlots) taken = 0, parity ^= 1;
        __syncwarp();
        ask(args);
    }

private:
    template <class Args>
    __device__ __forceinline__ void open(const Args& args) {
        if (unit >= kUnits) return;
        int group = unit;
        if constexpr (!kGated) {
            part = 0;
            while (group >= kGroups[part]) group -= kGroups[part++];
        }
        left = kRun[part], bytes = kTileBytes[part];
        from = args.segments[part].weight + static_cast<uint64>(group) * (left * bytes);
    }

    template <class Args>
    __device__ __forceinline__ void ask(const Args& args) {
        if (left == 0) return;
        if (threadIdx.x % kWarp == 0) {
            expect_bytes(barriers + asked, bytes);
            copy_bulk(slots + asked * kSlotBytes, from, bytes, barriers + asked, policy);
        }
        if (++asked == kSlots) asked = 0;
        from += bytes;
        if (--left > 0) return;
        if (kGated && part == 0) {
            part = 1;
        } else {
            part = 0;
            unit += stride;
        }
        open(args);
    }
};
