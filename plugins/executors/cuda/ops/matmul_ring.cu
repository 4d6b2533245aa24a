// Products of a few rows of activations with quantised weights on tensor cores, from the input as it is to results:
// out = [norm](x) @ weight.T, then bias, activation, gate, residual; several weights of one input in one launch.
//
// The warps of a block share the columns of a tile, each a few steps of 128, and keep their columns of x in registers,
// as halves in the order that mma.m16n8k16 takes them, scaled by a power of two a row (each warp its own). Weights come
// 16 rows (a unit) at a time through a ring of shared memory that bulk copies fill, the first slots before the kernel waits
// for the one before it. A warp expands its columns of a unit into fragments (expand.cuh); the sums of the warps are added
// in shared memory, and what follows the products is done there.
//
// Where rows are several tiles long (kSlices), a block takes one tile of each, and its sums go to `products`, (slices,
// rows, total rows of the weights), which matmul_finish.cu adds.
//
// A block takes PASS rows of x; the blocks of further passes take the same weights at the same time, which then come out
// of the L2 cache. Block x is slice + kSlices * (pass + passes * column of blocks).
//
// Compile-time: COLS columns; PASS rows of x a pass (8 or 16); WARPS; STEPS a warp; SLOTS of the ring; NORM (kNoNorm,
// kRmsNorm); GATED (two segments, gate and up, give one result); ACTIVATION; SEGMENTS, a list of Segment<type, tile rows,
// tile columns, rows>.
#include "bulk_copy.cuh"
#include "elementwise.cuh"
#include "matmul_ring_input.cuh"

// The weights a block reads, in order, and the slots they come to.
struct Ring {
    uint8* slots;
    uint64* barriers;
    int unit, part = 0;  // to be asked for next
    int asked = 0, taken = 0;
    uint32 parity = 0;
    uint64 policy;

    __device__ __forceinline__ const uint8* take() const {
        wait_arrival(barriers + taken, parity);
        return slots + taken * Segments::kSlotBytes;
    }
    __device__ __forceinline__ void next() {
        if (++taken == SLOTS) taken = 0, parity ^= 1;
    }

    // This warp's share of the tiles of a slot.
    template <class S>
    __device__ __forceinline__ void copy(const uint8* weight, int of_unit, int slice) {
        const int tiles = min(S::kTilesDown, S::kRows / S::T::kRows - of_unit * S::kTilesDown);
        if (threadIdx.x % kWarp != 0) return;
        const int first = threadIdx.x / kWarp, count = max(0, ceil_div(tiles - first, WARPS));
        expect_bytes(barriers + asked, count * S::T::kBytes);
        for (int tile = first; tile < tiles; tile += WARPS) {
            const uint8* from = weight + (static_cast<uint64>(of_unit * S::kTilesDown + tile) * kSlices + slice) * S::T::kBytes;
            copy_bulk(slots + asked * Segments::kSlotBytes + tile * S::kTileBytes, from, S::T::kBytes, barriers + asked, policy);
        }
    }
    template <int kIndex, class S, class... Rest>
    __device__ __forceinline__ void ask_segment(const MatmulRingArgs& args, int of_unit, int slice) {
        if (GATED ? part == kIndex : of_unit < S::kUnits) return copy<S>(args.segments[kIndex].weight, of_unit, slice);
        if constexpr (sizeof...(Rest) > 0) ask_segment<kIndex + 1, Rest...>(args, GATED ? of_unit : of_unit - S::kUnits, slice);
    }
    // All warps ask, each for its share.
    template <class... S>
    __device__ __forceinline__ void ask(SegmentList<S...>, const MatmulRingArgs& args, int slice, int stride) {
        if (unit >= Segments::kUnits) return;
        ask_segment<0, S...>(args, unit, slice);
        if (++asked == SLOTS) asked = 0;
        if (++part == kParts) part = 0, unit += stride;
    }
};

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

// This warp's sums of the 16 rows in a slot, to shared memory.
template <class S>
__device__ __forceinline__ void add_slot(const uint8* slot, const Input& input, float* out) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    float sums[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int step = warp * STEPS + i;
        if (kSteps % STEPS != 0 && step >= kSteps) break;
        const typename S::Q::Weight32 w[2] = {S::load(slot, 0, step), S::load(slot, 1, step)};
        add_step<typename S::Q>(w, input.b[i], sums);
    }
    out += warp * kSumsWarp + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        float* at = out + (8 * tile + lane % 4 * 2) * kSumsRow;
        at[0] = sums[tile][0] * input.inverse[tile].x;
        at[kSumsRow] = sums[tile][1] * input.inverse[tile].y;
        at[8] = sums[tile][2] * input.inverse[tile].x;
        at[kSumsRow + 8] = sums[tile][3] * input.inverse[tile].y;
    }
}

template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void add_segment(const uint8* slot, int index, int unit, const Input& input, float* out) {
    if (GATED ? index == kIndex : unit < S::kUnits) return add_slot<S>(slot, input, out);
    if constexpr (sizeof...(Rest) > 0) add_segment<kIndex + 1, Rest...>(slot, index, GATED ? unit : unit - S::kUnits, input, out);
}
template <class... S>
__device__ __forceinline__ void add(SegmentList<S...>, const uint8* slot, int part, int unit, const Input& input, float* out) {
    add_segment<0, S...>(slot, part, unit, input, out);
}

// Four neighbouring lanes add the sums of the warps for one result; one of them goes on with it.
constexpr int kResultLanes = 4;
constexpr int kResultRounds = ceil_div(kUnitRows * PASS, kThreads / kResultLanes);

struct Result {
    int row, at;  // of the pass, of the unit
    __device__ __forceinline__ explicit Result(int round) {
        const int index = round * (kThreads / kResultLanes) + static_cast<int>(threadIdx.x) / kResultLanes;
        at = index % kUnitRows, row = index / kUnitRows;
    }
    __device__ __forceinline__ bool inside() const { return row < PASS; }
};

__device__ __forceinline__ float whole_sum(const float* sums, const Result& result) {
    float sum = 0.f;
    if (result.inside()) {
        const float* p = sums + result.row * kSumsRow + result.at;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp += kResultLanes) {
            const int mine = warp + static_cast<int>(threadIdx.x) % kResultLanes;
            if (WARPS % kResultLanes == 0 || mine < WARPS) sum += p[mine * kSumsWarp];
        }
    }
    return lanes_sum<kResultLanes>(sum);
}

// Where the results of a unit go, and what is added to them: asked for before the products.
struct Target {
    int rows = 0, first = 0, column = 0;  // of the weight; the unit's first row in it; the weight's first row in all
    float bias[kParts][kResultRounds], residual[kResultRounds];
    float* out;

    template <int kIndex, class S, class... Rest>
    __device__ __forceinline__ void find(const MatmulRingArgs& args, int pass_first, int unit) {
        if (!GATED && unit >= S::kUnits) {
            column += S::kRows;
            if constexpr (sizeof...(Rest) > 0) find<kIndex + 1, Rest...>(args, pass_first, unit - S::kUnits);
            return;
        }
        rows = S::kRows, first = unit * kUnitRows, out = args.segments[kIndex].out;
#pragma unroll
        for (int round = 0; round < kResultRounds; ++round) {
            const Result result(round);
            const int row = first + result.at, x_row = pass_first + result.row;
            const bool there = kSlices == 1 && result.inside() && x_row < args.rows && row < rows;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const float* from = args.segments[kIndex + part].bias;
                bias[part][round] = there && from != nullptr ? from[row] : 0.f;
            }
            const float* from = args.segments[kIndex].residual;
            residual[round] = there && from != nullptr ? from[static_cast<size_t>(x_row) * rows + row] : 0.f;
        }
    }
};
template <class... S>
__device__ __forceinline__ void find_target(SegmentList<S...>, const MatmulRingArgs& args, int first, int unit, Target& target) {
    target.find<0, S...>(args, first, unit);
}

__device__ __forceinline__ void store(const MatmulRingArgs& args, int first, int slice, const Target& target, const float* sums,
                                      const float* factors) {
#pragma unroll
    for (int round = 0; round < kResultRounds; ++round) {
        const Result result(round);
        float value = whole_sum(sums, result);
        const float other = GATED ? whole_sum(sums + kSumsPart, result) : 0.f;
        const int row = target.first + result.at, x_row = first + result.row;
        if (threadIdx.x % kResultLanes != 0 || !result.inside() || x_row >= args.rows || row >= target.rows) continue;
        if constexpr (kSlices > 1) {
            args.products[(static_cast<size_t>(slice) * args.rows + x_row) * Segments::kTotal + target.column + row] = value;
        } else {
            const float factor = NORM == kRmsNorm ? factors[result.row] : 1.f;
            value = activate<ACTIVATION>(value * factor + target.bias[0][round]);
            if constexpr (GATED) value *= other * factor + target.bias[kParts - 1][round];
            target.out[static_cast<size_t>(x_row) * target.rows + row] = value + target.residual[round];
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) matmul_ring(const __grid_constant__ MatmulRingArgs args) {
    extern __shared__ __align__(128) uint8 shared[];
    __shared__ uint64 barriers[SLOTS];
    __shared__ float squares[PASS * WARPS], factors[PASS];
    const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);  // known to be one for the warp
    const int passes = ceil_div(args.rows, PASS), stride = gridDim.x / (kSlices * passes);
    const int slice = blockIdx.x % kSlices, first = blockIdx.x / kSlices % passes * PASS;
    int unit = blockIdx.x / (kSlices * passes);
    float* sums = reinterpret_cast<float*>(shared);
    Ring ring{shared + kSumsBytes, barriers, unit};

    let_next_kernel_start();
    ring.policy = read_once_policy();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) start_barrier(barriers + slot, WARPS);
        publish_barriers();
    }
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) ring.ask(Segments{}, args, slice, stride);
    NormWeight norm;
    norm.load(args);
    wait_for_previous_kernel();
    Input input;
    read_input(args, norm, first, slice, shared + warp * kStageBytes, input, squares);
    __syncthreads();
    if constexpr (NORM == kRmsNorm) {
        if (threadIdx.x < PASS) {
            float sum = 0.f;
            for (int i = 0; i < WARPS; ++i) sum += squares[threadIdx.x * WARPS + i];
            factors[threadIdx.x] = rsqrtf(sum / COLS + args.norm_eps);  // read after the next barrier
        }
    }
    int buffer = 0;
#pragma unroll 1
    for (; unit < Segments::kUnits; unit += stride, buffer ^= 1) {
        float* mine = sums + buffer * kParts * kSumsPart;
        Target target;
        find_target(Segments{}, args, first, unit, target);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const uint8* slot = ring.take();
            add(Segments{}, slot, part, unit, input, mine + part * kSumsPart);
            ring.next();
            if (part < kParts - 1 && !kAsksEachPart) continue;
            __syncthreads();  // all sums are there, and the slots are free
            ring.ask(Segments{}, args, slice, stride);
            if constexpr (kParts > 1 && !kAsksEachPart) ring.ask(Segments{}, args, slice, stride);
        }
        store(args, first, slice, target, mine, factors);
    }
}
