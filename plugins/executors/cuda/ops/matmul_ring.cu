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
// Compile-time: COLS columns; PASS rows of x a pass (8 or 16); WARPS;
// STEPS a warp; SLOTS of the ring; NORM (kNoNorm, kRmsNorm); GATED (two segments, gate and up, give one result);
// ACTIVATION; SEGMENTS, a list of Segment<type, tile rows, tile columns, rows>.
#include "activations.cuh"
#include "bulk_copy.cuh"
#include "elementwise.cuh"
#include "expand.cuh"
#include "norm.cuh"
#include "tile.cuh"

constexpr int kMaxSegments = 4;
constexpr int kUnitRows = 16;
constexpr int kTiles = PASS / 8;
constexpr int kThreads = WARPS * kWarp;
constexpr int kParts = GATED ? 2 : 1;  // slots of a unit
constexpr bool kAsksEachPart = kParts > 1 && SLOTS < 4;  // else when both are free

template <class Q_, int kTileRows, int kTileCols, int kRows_>
struct Segment {
    using Q = Q_;
    using T = Tile<Q, kTileRows, kTileCols>;
    static constexpr int kRows = kRows_;
    static constexpr int kUnits = ceil_div(kRows, kUnitRows);
    static constexpr int kCols = kTileCols;
    static constexpr int kTilesDown = kUnitRows / kTileRows;
    // Neighbouring rows lie half a line of banks apart: no bank conflict.
    static constexpr int kTileBytes = kTileRows == 1 ? ceil_div(T::kBytes - 64, 128) * 128 + 64 : T::kBytes;

    static_assert(COLS % kTileCols == 0 && kRows % kTileRows == 0, "tiles cover the weight");
    static_assert(kUnitRows % kTileRows == 0, "a unit is whole tiles");

    // The chunk this lane takes in step `step`, of its row of the eight that are number `eight` of a unit in a slot. Past
    // the end of a tile's columns x is zero, whatever the chunk.
    static __device__ __forceinline__ typename Q::Weight32 load(const uint8* slot, int eight, int step) {
        const int lane = threadIdx.x % kWarp, row = 8 * eight + lane / 4;
        const int chunk = min(4 * step + lane % 4, T::kRowChunks - 1);
        return T::template load<SharedTile>(slot + row / kTileRows * kTileBytes, row % kTileRows, chunk);
    }
};

template <class... S>
struct SegmentList {
    static constexpr int kUnits = GATED ? largest(S::kUnits...) : (S::kUnits + ...);
    static constexpr int kTotal = (S::kRows + ...);
    static constexpr int kCols = largest(S::kCols...);
    static constexpr int kSlotBytes = ceil_div(largest(S::kTilesDown * S::kTileBytes...), 128) * 128;
    static_assert(((S::kCols == kCols) && ...), "tiles of one width");
};
using Segments = SegmentList<SEGMENTS>;
constexpr int kSlices = COLS / Segments::kCols;
constexpr int kSteps = ceil_div(Segments::kCols, 128);
static_assert(STEPS * WARPS >= kSteps, "the warps take all columns");
static_assert(NORM == kNoNorm || (NORM == kRmsNorm && kSlices == 1), "norms see whole rows");
static_assert(!GATED || kSlices == 1, "gates see whole sums");

// Sums of the warps, written for a unit while those of the one before are still read: (buffers, parts, warps, rows of x, 16 and some room against bank conflicts).
constexpr int kSumsRow = kUnitRows + 4;
constexpr int kSumsWarp = PASS * kSumsRow + 8;
constexpr int kSumsPart = WARPS * kSumsWarp;
constexpr int kStageBytes = 2048;  // of a warp; the sums come later
constexpr int kSumsBytes = ceil_div(largest(2 * kParts * kSumsPart * 4, WARPS * kStageBytes), 128) * 128;

// What a launch has to ask for. Read by the host.
extern "C" __device__ const int shared_bytes = kSumsBytes + SLOTS * Segments::kSlotBytes;

struct SegmentArgs {
    const uint8* weight;
    const float* bias;      // (rows of the weight,) or null
    const float* residual;  // (rows, rows of the weight) or null
    float* out;             // (rows, rows of the weight)
};

struct MatmulRingArgs {
    const float* x;            // (rows, COLS)
    const float* norm_weight;  // (COLS,)
    float* products;           // where kSlices > 1
    float norm_eps;
    int rows;
    SegmentArgs segments[kMaxSegments];
};

// This warp's columns of x as B fragments.
struct Input {
    uint4 b[STEPS][4][kTiles];
    float2 inverse[kTiles];  // of the scales of this lane's two rows of results
};

// One of two rows' values for the lanes with bit `step` of their number clear, the other for the rest, each joined with
// what the lane `step` away holds of it.
template <class Join>
__device__ __forceinline__ float fold(float low, float high, int step, Join join) {
    const bool upper = threadIdx.x & step;
    return join(upper ? high : low, __shfl_xor_sync(kFullMask, upper ? low : high, step));
}

// Eight values a lane, joined over the warp: lane l gets that of number l / 4.
template <class Join>
__device__ __forceinline__ float fold_eight(float (&v)[8], Join join) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = fold(v[i], v[i + 4], 16, join);
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = fold(v[i], v[i + 2], 8, join);
    float all = fold(v[0], v[1], 4, join);
    all = join(all, __shfl_xor_sync(kFullMask, all, 2));
    return join(all, __shfl_xor_sync(kFullMask, all, 1));
}

// The norm's weight for this lane's columns does not depend on the kernel before.
struct NormWeight {
    float4 v[STEPS] = {};  // past the columns too: x is zero there, and 0 times what is no number is none
    __device__ __forceinline__ void load(const MatmulRingArgs& args) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int column = (threadIdx.x / kWarp * STEPS + i) * 128 + threadIdx.x % kWarp * 4;
            if (NORM == kRmsNorm && column < COLS) v[i] = *reinterpret_cast<const float4*>(args.norm_weight + column);
        }
    }
};

// Two halves times a power of two, as a float.
__device__ __forceinline__ uint32 scaled2(uint32 halves, float factor) {
    const __half2 scale = __float2half2_rn(factor);
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&halves), scale);
    return *reinterpret_cast<const uint32*>(&product);
}

// The exponent of the power of two that brings a value into 2^9 ... 2^10, within what a float can hold and invert.
__device__ __forceinline__ int shift_of(float largest) {
    // largest = m * 2^e with 1 <= m < 2
    return min(max(9 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127), -120), 120);
}
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(static_cast<uint32>(127 + exponent) << 23); }

// Reads this warp's columns of rows `first` … of x, a row's 128 at a time, and hands them round by way of `stage` (2 KiB of
// the warp's own). Steps are scaled as their values allow, and those before again where one has larger values. `squares`
// gets this warp's part of the sum of the squares of each row.
__device__ __forceinline__ void read_input(const MatmulRingArgs& args, const NormWeight& norm, int first, int slice, uint8* stage,
                                           Input& input, float* squares) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    // a lane has group lane % 8 of chunk lane / 8 of eight rows, and needs pairs of groups of chunk lane % 4 of one
    const int pair = lane % 8 / 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        int shift = 120;  // of row lane / 4
        float sum[8] = {};
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int column = (warp * STEPS + i) * 128 + lane * 4;
            float4 v[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int row = first + 8 * tile + j;
                const float* x = args.x + static_cast<size_t>(row) * COLS + slice * Segments::kCols + column;
                const bool there = row < args.rows && column < Segments::kCols;
                v[j] = there ? *reinterpret_cast<const float4*>(x) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            float top[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float4& x = v[j];
                if constexpr (NORM == kRmsNorm) {
                    sum[j] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
                    x = make_float4(x.x * norm.v[i].x, x.y * norm.v[i].y, x.z * norm.v[i].z, x.w * norm.v[i].w);
                }
                top[j] = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
            }
            const int own = shift_of(fold_eight(top, [](float a, float b) { return fmaxf(a, b); })), next = min(shift, own);
            if (i > 0 && __ballot_sync(kFullMask, next != shift) != 0) {
                const float again = power_of_two(max(next - shift, -126));
#pragma unroll
                for (int before = 0; before < i; ++before) {
#pragma unroll
                    for (int p = 0; p < 4; ++p) {
                        uint4& b = input.b[before][p][tile];
                        b = make_uint4(scaled2(b.x, again), scaled2(b.y, again), scaled2(b.z, again), scaled2(b.w, again));
                    }
                }
            }
            shift = next;
            const float factor = power_of_two(shift);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float f = __shfl_sync(kFullMask, factor, 4 * j);
                uint8* to = stage + (pair * kWarp + ((4 * j + lane / 8) ^ (2 * pair))) * 16 + lane % 2 * 8;
                *reinterpret_cast<uint2*>(to) =
                    make_uint2(half2_word(v[j].x * f, v[j].y * f), half2_word(v[j].z * f, v[j].w * f));
            }
            __syncwarp();
#pragma unroll
            for (int p = 0; p < 4; ++p) input.b[i][p][tile] = reinterpret_cast<const uint4*>(stage)[p * kWarp + (lane ^ (2 * p))];
        }
        if constexpr (NORM == kRmsNorm) {
            const float all = fold_eight(sum, [](float a, float b) { return a + b; });
            if (lane % 4 == 0) squares[(8 * tile + lane / 4) * WARPS + warp] = all;
        }
        const float inverse = power_of_two(-shift);
        input.inverse[tile].x = __shfl_sync(kFullMask, inverse, lane % 4 * 8);
        input.inverse[tile].y = __shfl_sync(kFullMask, inverse, lane % 4 * 8 + 4);
    }
}

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
