// Products of a few rows of activations with quantised weights on tensor cores, from the input as it is to results:
// out = [norm](x) @ weight.T, then bias, activation, gate, residual; several weights of one input in one launch.
//
// The warps of a block share the columns of a tile, each a few steps of 128, and keep their columns of x in registers,
// as halves in the order that mma.m16n8k16 takes them, scaled by a power of two a row (each warp its own). Weights come
// 16 rows (a unit) at a time through a ring of shared memory that bulk copies fill, the first slots before the kernel waits
// for the one before it. A warp expands its columns of a unit into fragments (expand.cuh) and leaves its sums in shared
// memory, where they are added; what follows the products is done there.
//
// With HELPERS, that many further warps ask for weights, add the sums of the others and go on with them; barriers in shared
// memory tell who may go on, and no warp waits for all others. They leave the others fewer registers (a quarter of a
// multiprocessor has five warps instead of four). Without, all warps do so between two barriers of the block.
//
// Where rows are several tiles long (kSlices), a block takes one tile of each, and its sums go to `products`, (slices,
// rows, total rows of the weights), which matmul_finish.cu adds.
//
// A block takes PASS rows of x; the blocks of further passes take the same weights at the same time, which then come out
// of the L2 cache. Block x is slice + kSlices * (pass + passes * column of blocks).
//
// Compile-time: COLS columns; PASS rows of x a pass (8 or 16); WARPS that multiply; HELPERS; STEPS a warp; SLOTS of the
// ring, EARLY of them asked for before the input is read, where there are helpers: what is under way delays the input; NORM
// (kNoNorm, kRmsNorm); GATED (two segments, gate and up, give one result); ACTIVATION; SEGMENTS, a list of Segment<type,
// tile rows, tile columns, rows>.
#include "bulk_copy.cuh"
#include "elementwise.cuh"
#include "matmul_ring_input.cuh"
#include "matmul_ring_sums.cuh"

// A place in a ring, and the parity of its round.
template <int kPlaces>
struct Place {
    int at = 0;
    uint32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == kPlaces) at = 0, parity ^= 1;
    }
};

struct Barriers {
    uint64 filled[SLOTS], left[SLOTS];               // slots: the weights are there; all warps have read them
    uint64 summed[kSumBuffers], added[kSumBuffers];  // buffers: the sums of all warps are there; they have been added

    __device__ __forceinline__ void start() {
        constexpr int kLanes = ARRIVING_LANES;
        for (int i = 0; i < SLOTS; ++i) start_barrier(filled + i, kAskers), start_barrier(left + i, WARPS * kLanes);
        for (int i = 0; i < kSumBuffers; ++i) start_barrier(summed + i, WARPS * kLanes), start_barrier(added + i, kAskers * kLanes);
        publish_barriers();
    }
};

// Tells a barrier that this warp has done its part; who waits for it sees what the lanes did before.
__device__ __forceinline__ void warp_arrives(uint64* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarp < ARRIVING_LANES) arrive(barrier);
}

// Where in the launch a block is.
struct Share {
    int slice, first;  // tile of each row; row of x
    int unit, stride;  // the first of its units, and to the next
    __device__ __forceinline__ explicit Share(const MatmulRingArgs& args) {
        const int block = blockIdx.x, passes = ceil_div(args.rows, PASS);
        slice = block % kSlices, first = block / kSlices % passes * PASS;
        unit = block / (kSlices * passes), stride = gridDim.x / (kSlices * passes);
    }
};

// ---- weights

// The weights a block reads, in order, and the slots they come to. Those who ask do so each for its share.
struct Asking {
    uint8* slots;
    uint64* filled;
    int slice, unit, stride;
    int part = 0, slot = 0;  // to be asked for next, and where it comes to
    uint64 policy = read_once_policy();

    template <class S>
    __device__ __forceinline__ void copy(const uint8* weight, int of_unit) {
        const int tiles = min(S::kTilesDown, S::kRows / S::T::kRows - of_unit * S::kTilesDown);
        if (threadIdx.x % kWarp != 0) return;
        const int mine = asking_thread() / kWarp, count = max(0, ceil_div(tiles - mine, kAskers));
        expect_bytes(filled + slot, count * S::T::kBytes);
        for (int tile = mine; tile < tiles; tile += kAskers) {
            const uint8* from = weight + (static_cast<uint64>(of_unit * S::kTilesDown + tile) * kSlices + slice) * S::T::kBytes;
            copy_bulk(slots + slot * Segments::kSlotBytes + tile * S::kTileBytes, from, S::T::kBytes, filled + slot, policy);
        }
    }
    template <int kIndex, class S, class... Rest>
    __device__ __forceinline__ void ask_segment(const MatmulRingArgs& args, int of_unit) {
        if (GATED ? part == kIndex : of_unit < S::kUnits) return copy<S>(args.segments[kIndex].weight, of_unit);
        if constexpr (sizeof...(Rest) > 0) ask_segment<kIndex + 1, Rest...>(args, GATED ? of_unit : of_unit - S::kUnits);
    }
    template <class... S>
    __device__ __forceinline__ void ask(SegmentList<S...>, const MatmulRingArgs& args) {
        if (unit >= Segments::kUnits) return;
        ask_segment<0, S...>(args, unit);
        if (++slot == SLOTS) slot = 0;
        if (++part == kParts) part = 0, unit += stride;
    }
};

// ---- products

// One step: the products of 16 rows by 128 columns with all rows of x.
template <class Q>
__device__ __forceinline__ void add_step(const typename Q::Weight32 (&w)[2], const uint4 (&x)[4][kTiles], float (&sums)[kTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        uint32 a[2][4];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            const uint2 upper = Expand<Q>::halves4(w[0], 2 * pair + g);
            const uint2 lower = Expand<Q>::halves4(w[1], 2 * pair + g);
            a[g][0] = upper.x;
            a[g][1] = lower.x;
            a[g][2] = upper.y;
            a[g][3] = lower.y;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_m16n8k16(sums[tile], a[0], x[pair][tile].x, x[pair][tile].y);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_m16n8k16(sums[tile], a[1], x[pair][tile].z, x[pair][tile].w);
    }
}

// This warp's sums of the 16 rows in a slot, which it then leaves.
template <class S>
__device__ __forceinline__ void add_slot(const uint8* slot, uint64* left, const Input& input, float (&sums)[kTiles][4]) {
    const int first = static_cast<int>(threadIdx.x) / kWarp * STEPS;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {  // past the last step x is zero
        const typename S::Q::Weight32 w[2] = {S::load(slot, 0, first + i), S::load(slot, 1, first + i)};
        if (HELPERS > 0 && i == STEPS - 1) warp_arrives(left);
        add_step<typename S::Q>(w, input.b[i], sums);
    }
}

template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void add_segment(const uint8* slot, uint64* left, int part, int unit, const Input& input,
                                            float (&sums)[kTiles][4]) {
    if (GATED ? part == kIndex : unit < S::kUnits) return add_slot<S>(slot, left, input, sums);
    if constexpr (sizeof...(Rest) > 0) {
        add_segment<kIndex + 1, Rest...>(slot, left, part, GATED ? unit : unit - S::kUnits, input, sums);
    }
}
template <class... S>
__device__ __forceinline__ void add(SegmentList<S...>, const uint8* slot, uint64* left, int part, int unit, const Input& input,
                                    float (&sums)[kTiles][4]) {
    add_segment<0, S...>(slot, left, part, unit, input, sums);
}

// ---- who does what

// A warp that multiplies.
struct Multiplying {
    Barriers& barriers;
    const uint8* slots;
    float* sums;
    const Input& input;
    Place<SLOTS> slot = {};

    // The products of part `part` of a unit, to a buffer of sums; where there are helpers, when they have `added` what was
    // there.
    __device__ __forceinline__ void multiply(int unit, int part, int buffer, uint32 added) {
        float mine[kTiles][4] = {};
        wait_arrival(barriers.filled + slot.at, slot.parity);
        add(Segments{}, slots + slot.at * Segments::kSlotBytes, barriers.left + slot.at, part, unit, input, mine);
        slot.next();
        if (HELPERS > 0 && part == 0) wait_arrival(barriers.added + buffer, added);
        put_sums(mine, input, sums + (buffer * kParts + part) * kSumsPart);
    }
};

__device__ __forceinline__ void multiply_all(Multiplying& multiplying, const Share& share) {
    Place<kSumBuffers> buffer;
#pragma unroll 1
    for (int unit = share.unit; unit < Segments::kUnits; unit += share.stride, buffer.next()) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) multiplying.multiply(unit, part, buffer.at, buffer.parity ^ 1);
        warp_arrives(multiplying.barriers.summed + buffer.at);
    }
}

// What the helpers do: ask for what comes to a slot that all warps have left, and go on with sums.
__device__ __forceinline__ void help(const MatmulRingArgs& args, Barriers& barriers, Asking& asking, const float* sums,
                                     const float* factors, const Share& share) {
    Place<SLOTS> slot;
    Place<kSumBuffers> buffer;
#pragma unroll 1
    for (int unit = share.unit; unit < Segments::kUnits; unit += share.stride, buffer.next()) {
        Target target;
        find_target(Segments{}, args, share.first, unit, target);
#pragma unroll 1
        for (int part = 0; part < kParts; ++part, slot.next()) {
            wait_arrival(barriers.left + slot.at, slot.parity);
            asking.ask(Segments{}, args);
        }
        wait_arrival(barriers.summed + buffer.at, buffer.parity);
        store(args, share.first, share.slice, target, sums + buffer.at * kParts * kSumsPart, factors);
        warp_arrives(barriers.added + buffer.at);
    }
}

// All that without helpers.
__device__ __forceinline__ void take_turns(const MatmulRingArgs& args, Multiplying& multiplying, Asking& asking, const float* factors,
                                           const Share& share) {
    int buffer = 0;
#pragma unroll 1
    for (int unit = share.unit; unit < Segments::kUnits; unit += share.stride, buffer ^= 1) {
        Target target;
        find_target(Segments{}, args, share.first, unit, target);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            multiplying.multiply(unit, part, buffer, 0);
            if (part < kParts - 1 && !kAsksEachPart) continue;
            __syncthreads();  // all sums are there, and the slots are free
            asking.ask(Segments{}, args);
            if constexpr (kParts > 1 && !kAsksEachPart) asking.ask(Segments{}, args);
        }
        store(args, share.first, share.slice, target, multiplying.sums + buffer * kParts * kSumsPart, factors);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) matmul_ring(const __grid_constant__ MatmulRingArgs args) {
    extern __shared__ __align__(128) uint8 shared[];
    __shared__ Barriers barriers;
    __shared__ float squares[PASS * WARPS], factors[PASS];
    const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);  // known to be one for the warp
    const Share share(args);
    float* sums = reinterpret_cast<float*>(shared);
    Asking asking{shared + kSumsBytes, barriers.filled, share.slice, share.unit, share.stride};

    const bool helps = HELPERS > 0 && warp >= WARPS;
    Input input;

    let_next_kernel_start();
    if (helps) {
        if (threadIdx.x == WARPS * kWarp) barriers.start();
        wait_for_part(kHelpersMeet, HELPERS * kWarp);
#pragma unroll 1
        for (int slot = 0; slot < kEarlySlots; ++slot) asking.ask(Segments{}, args);
        wait_for_previous_kernel();
        wait_for_part(kInputRead, kThreads);
#pragma unroll 1
        for (int slot = kEarlySlots; slot < SLOTS; ++slot) asking.ask(Segments{}, args);
    } else {
        if constexpr (HELPERS == 0) {
            if (threadIdx.x == 0) barriers.start();
            __syncthreads();
#pragma unroll 1
            for (int slot = 0; slot < SLOTS; ++slot) asking.ask(Segments{}, args);
        }
        NormWeight norm;
        norm.load(args);
        wait_for_previous_kernel();
        read_input(args, norm, share.first, share.slice, shared + warp * kStageBytes, input, squares);
    }
    __syncthreads();  // the stages become sums, and the barriers are there

    Multiplying multiplying{barriers, asking.slots, sums, input};
    if constexpr (HELPERS == 0) {
        find_factors(args, squares, factors);  // read after the next barrier
        take_turns(args, multiplying, asking, factors, share);
    } else if (helps) {
        find_factors(args, squares, factors);
        wait_for_part(kHelpersMeet, HELPERS * kWarp);
        help(args, barriers, asking, sums, factors, share);
    } else {
        multiply_all(multiplying, share);
    }
}
