// The products of matmul.cu by warpgroups (sm_90a): the sums of 64 rows of weights and all rows of a pass are one
// instruction for each 16 columns, which reads x from shared memory itself.
//
// A warpgroup takes units of 64 rows, each of its warps 16 of them, and walks along the block's slice of the columns. A
// lane expands whole chunks of 32 elements of two rows straight into the A fragments, as in matmul.cu; four chunks of a
// row, one for each lane of a quad, are a step of 128 columns. Two steps are loaded at once: 128 bytes of a row of 4-bit
// integers, whose blocks of 256 share a head. The next are asked for as soon as these are expanded, also from one unit to
// the next, and while their products are taken.
//
// Slices leave sums of their own, (SLICES, rows, total rows of the weights), which matmul_finish.cu adds.
//
// x is laid out as (passes, kSteps, groups of 4 elements, first and second pair of them, kTiles, eight rows, four chunks)
// times two halves: along k the order of the A fragments. Block (slice + SLICES * column of blocks, pass). Compile-time:
// PASS rows of x a pass: 8, 16, 32 or 64; THREADS; SLICES of SLICE_STEPS steps; HEIGHT, which is 4; and what
// matmul_parts.cuh names.
#include "matmul_parts.cuh"

#include "bulk_copy.cuh"
#include "wgmma.cuh"

constexpr int kTiles = PASS / 8;
constexpr int kTogether = 2;  // steps whose chunks are loaded at once
constexpr int kSteps = ceil_div(COLS, 128 * kTogether) * kTogether;
constexpr int kStepBytes = 128 * PASS * static_cast<int>(sizeof(__half)), kProductBytes = kStepBytes / 8;
constexpr int kGroup = 4 * kWarp;

static_assert(SLICE_STEPS % kTogether == 0 && kUnitRows == 64, "steps come in twos, and a warpgroup takes 64 rows");

// What a launch has to ask for. Read by the host.
extern "C" __device__ const int shared_bytes = SLICE_STEPS * kStepBytes;

// A block's slice of x, and which units a warpgroup takes of it.
struct Slice {
    int first, steps;  // of 128 columns
    int stride;        // from one unit of a warpgroup to its next
    const uint4* x;
    uint8* inputs;    // x in shared memory
    float* scales;    // and what its rows' sums are multiplied with
    uint64* arrived;  // (steps / kTogether,)
    bool asked, here;

    __device__ __forceinline__ void start_barriers() const {
        for (int i = 0; i < SLICE_STEPS / kTogether; ++i) start_barrier(arrived + i, i == 0 ? 1 + PASS : 1);
        publish_barriers();
    }
    // Asks for x, step after step. To be called when the first weights, which nothing before writes, are under way.
    __device__ __forceinline__ void ask(const MatmulArgs& args) {
        if (asked) return;
        asked = true;
        wait_for_previous_kernel();
        constexpr int kBytes = kTogether * kStepBytes;
        for (int i = 0; threadIdx.x == 0 && i < steps / kTogether; ++i) {
            expect_bytes(arrived + i, kBytes);
            copy_bulk(inputs + i * kBytes, reinterpret_cast<const uint8*>(x) + i * kBytes, kBytes, arrived + i);
        }
        if (threadIdx.x >= PASS) return;
        scales[threadIdx.x] = read_scale(args, threadIdx.x);
        arrive(arrived);
    }
    // Returns when the columns of the steps from `step` on are in shared memory.
    __device__ __forceinline__ void wait(int step) const {
        if (!here) wait_arrival(arrived + step / kTogether, 0);
    }
};

// Products queued at once; wide types leave fewer registers.
template <class Q>
constexpr int kBatchOf = sizeof(typename Q::Weight32) <= 48 ? 4 : 2;

// The chunks of this lane: those of the steps loaded at once, of the rows lane / 4 and lane / 4 + 8 of its warp's.
template <class Q>
struct Chunks {
    typename Q::Weight32 of[kTogether][2];
};

// Where a warpgroup's loads stand: they run ahead of its products, from one unit to the next.
template <class S>
struct Loads {
    const uint8* weight;
    int unit, step, row;  // the row of this lane within a unit

    __device__ __forceinline__ void next(const Slice& slice, Chunks<typename S::Q>& chunks) {
        if (unit < S::kUnits) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    // the first step of a load is even, which lets the compiler see that both steps share a head
                    const int first = (slice.first + step) / kTogether * kTogether * 4;
                    chunks.of[i][h] = S::template load<GlobalStream>(weight, unit * kUnitRows + row + 8 * h,
                                                                     first + 4 * i + static_cast<int>(threadIdx.x % 4));
                }
            }
        }
        step += kTogether;
        if (step < slice.steps) return;
        step = 0;
        unit += slice.stride;
    }
};

// The products of the chunks with their columns of x.
template <class S>
__device__ __forceinline__ void add_products(Chunks<typename S::Q>& chunks, Loads<S>& loads, const Slice& slice, uint64 x,
                                             bool adds, float (&sums)[kTiles][4]) {
    using Q = typename S::Q;
    constexpr int kBatch = kBatchOf<Q>;
#pragma unroll
    for (int first = 0; first < 8 * kTogether; first += kBatch) {
        uint32 a[kBatch][4];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const auto& of = chunks.of[(first + i) / 8];
            const uint2 upper = Expand<Q>::halves4(of[0], (first + i) % 8), lower = Expand<Q>::halves4(of[1], (first + i) % 8);
            a[i][0] = upper.x;
            a[i][1] = lower.x;
            a[i][2] = upper.y;
            a[i][3] = lower.y;
        }
        if (first + kBatch == 8 * kTogether) loads.next(slice, chunks);
        wait_for_products();
        begin_products();
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            wgmma_k16(sums, a[i], x + (first + i) * (kProductBytes / 16), adds || first + i > 0);
        }
        end_products();
    }
}

template <class S>
__device__ __forceinline__ void store_sums(const MatmulArgs& args, int first, int column, const float* scales,
                                           const float (&sums)[kTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = tile * 8 + threadIdx.x % 4 * 2 + i, row = blockIdx.y * PASS + token;
            if (row >= args.rows) continue;
            float* out = args.products + of_slice(args, row) * Segments::kTotal + column;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (first + 8 * h < S::kRows) out[first + 8 * h] = sums[tile][2 * h + i] * scales[token];
            }
        }
    }
}

// The units of one segment after another that are this warpgroup's, from number `unit` on; `column` is the segment's first.
template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void run_units(const MatmulArgs& args, int unit, int column, Slice& slice) {
    if (unit < S::kUnits) {
        const int row = threadIdx.x % kGroup / kWarp * 16 + threadIdx.x % kWarp / 4;
        Loads<S> loads{args.weights[kIndex], unit, 0, row};
        Chunks<typename S::Q> chunks;
        loads.next(slice, chunks);
        slice.ask(args);
        const uint64 x = matrix_at(shared_address(slice.inputs), kTiles * 128, 128);
        for (; unit < S::kUnits; unit += slice.stride) {
            float sums[kTiles][4];
#pragma unroll 1
            for (int step = 0; step < slice.steps; step += kTogether) {
                slice.wait(step);
                add_products<S>(chunks, loads, slice, x + step * (kStepBytes / 16), step > 0, sums);
            }
            slice.here = true;
            wait_for_products();
            store_sums<S>(args, unit * kUnitRows + row, column, slice.scales, sums);
        }
    }
    if constexpr (sizeof...(Rest) > 0) run_units<kIndex + 1, Rest...>(args, unit - S::kUnits, column + S::kRows, slice);
}
template <class... S>
__device__ __forceinline__ void run(SegmentList<S...>, const MatmulArgs& args, int unit, Slice& slice) {
    run_units<0, S...>(args, unit, 0, slice);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul_wgmma(const __grid_constant__ MatmulArgs args) {
    extern __shared__ __align__(128) uint8 inputs[];
    __shared__ uint64 arrived[SLICE_STEPS / kTogether];
    __shared__ float scales[PASS];
    const int number = blockIdx.x % SLICES, columns = gridDim.x / SLICES, first = number * SLICE_STEPS;
    // neighbouring blocks take neighbouring units, warpgroup after warpgroup; a warp's lanes are seen to agree on theirs
    const int unit = __shfl_sync(kFullMask, threadIdx.x / kGroup, 0) * columns + blockIdx.x / SLICES;
    Slice slice{first, min(SLICE_STEPS, kSteps - first), columns * (THREADS / kGroup), nullptr, inputs, scales, arrived, false, false};
    slice.x = args.x + (static_cast<size_t>(blockIdx.y) * kSteps + first) * (kStepBytes / 16);

    let_next_kernel_start();
    if (threadIdx.x == 0) slice.start_barriers();
    if (unit < Segments::kUnits) prefetch(Segments{}, args, unit, first, slice.steps, kGroup);
    __syncthreads();
    run(Segments{}, args, unit, slice);
}
