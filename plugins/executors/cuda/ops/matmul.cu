// Products of a few rows of activations with quantised weights on tensor cores: products = x @ weight.T, several
// weights of one input in one launch.
//
// A block holds one slice of the columns of x in shared memory and passes over weights: a warp takes 16 * HEIGHT rows
// of a weight at a time and walks along the slice. A lane expands whole chunks of 32 elements, of two rows for each 16,
// straight into the A fragments of mma.m16n8k16; the order of k within a fragment is that of the chunks, and x was laid
// out to match (matmul_input.cu). Each weight is read from memory once a pass and expanded in registers.
//
// Slices leave sums of their own, (SLICES, rows, total rows of the weights), which matmul_finish.cu adds.
//
// x is laid out as (passes, kSteps, 4, kTiles, 32) times eight halves. Block (slice + SLICES * column of blocks, pass).
// Compile-time: PASS rows of x a pass (a multiple of 8); THREADS; SLICES of SLICE_STEPS steps of 128 columns; and what
// matmul_parts.cuh names.
#include "matmul_parts.cuh"

constexpr int kTiles = PASS / 8;
constexpr int kSteps = ceil_div(COLS, 128);  // a step is four chunks of 32, one for each lane of a quad
constexpr int kStepParts = 4 * kTiles * kWarp;
constexpr int kTogether = kTiles < 4 ? kTiles : 4;  // tiles whose products follow one another, for none waits for another

// What a launch has to ask for. Read by the host.
extern "C" __device__ const int shared_bytes = SLICE_STEPS * kStepParts * 16;

// Whether a lane loads the next chunks while it uses those before, and the steps whose chunks it loads at once: as many
// as registers allow beside the sums.
template <class Q>
constexpr bool kLoadsAhead = sizeof(typename Q::Weight32) <= 48;
template <class Q>
constexpr int kInFlight = HEIGHT * kTiles == 1 && (!kLoadsAhead<Q> || sizeof(typename Q::Weight32) <= 36) ? 2 : 1;

// One step: the products of 16 rows by 128 columns with all rows of the pass.
template <class Q>
__device__ __forceinline__ void add_step(const typename Q::Weight32 (&w)[HEIGHT][2], const uint4* x,
                                         float (&sums)[HEIGHT][kTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        uint32 a[HEIGHT][2][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; ++h) {
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                const uint2 upper = Expand<Q>::halves4(w[h][0], 2 * pair + g);
                const uint2 lower = Expand<Q>::halves4(w[h][1], 2 * pair + g);
                a[h][g][0] = upper.x;
                a[h][g][1] = lower.x;
                a[h][g][2] = upper.y;
                a[h][g][3] = lower.y;
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += kTogether) {
            uint4 b[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) b[i] = x[(pair * kTiles + tile + i) * kWarp];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
#pragma unroll
                for (int h = 0; h < HEIGHT; ++h) mma_m16n8k16(sums[h][tile + i], a[h][0], b[i].x, b[i].y);
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
#pragma unroll
                for (int h = 0; h < HEIGHT; ++h) mma_m16n8k16(sums[h][tile + i], a[h][1], b[i].z, b[i].w);
            }
        }
    }
}

// The chunks of some steps of a unit.
template <class S>
struct Chunks {
    static constexpr int kSteps = kInFlight<typename S::Q>;
    typename S::Q::Weight32 of[kSteps][HEIGHT][2];

    // Those from step `step` on, of `steps` that begin at `first`: of this lane's rows the chunk that is its own.
    __device__ __forceinline__ void load(const uint8* weight, int unit, int first, int step, int steps) {
        const int lane = threadIdx.x % kWarp, row = unit * kUnitRows + lane / 4;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            if (step + i >= steps) break;
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; ++h) {
                const int chunk = 4 * (first + step + i) + lane % 4;
                of[i][h / 2][h % 2] = S::template load<GlobalStream>(weight, row + 8 * h, chunk);
            }
        }
    }
};

template <class S>
__device__ __forceinline__ void unit_sums(const uint8* weight, int unit, int first, int steps, const uint4* inputs,
                                          float (&sums)[HEIGHT][kTiles][4]) {
    constexpr int kAhead = Chunks<S>::kSteps;
    const int lane = threadIdx.x % kWarp;
    Chunks<S> now, next;
    if constexpr (kLoadsAhead<typename S::Q>) next.load(weight, unit, first, 0, steps);
#pragma unroll 1
    for (int step = 0; step < steps; step += kAhead) {
        if constexpr (kLoadsAhead<typename S::Q>) {
            now = next;
            next.load(weight, unit, first, step + kAhead, steps);
        } else {
            now.load(weight, unit, first, step, steps);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (step + i < steps) add_step<typename S::Q>(now.of[i], inputs + (step + i) * kStepParts + lane, sums);
        }
    }
}

// Units of all segments are numbered through; this takes number `unit`. `column` is the segment's first one.
template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void run_unit(const MatmulArgs& args, int unit, int column, int first, int steps,
                                         const uint4* inputs, const float* scales) {
    if (unit >= S::kUnits) {
        if constexpr (sizeof...(Rest) > 0) {
            run_unit<kIndex + 1, Rest...>(args, unit - S::kUnits, column + S::kRows, first, steps, inputs, scales);
        }
        return;
    }
    float sums[HEIGHT][kTiles][4] = {};
    unit_sums<S>(args.weights[kIndex], unit, first, steps, inputs, sums);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = tile * 8 + threadIdx.x % 4 * 2 + i, row = blockIdx.y * PASS + token;
            if (row >= args.rows) continue;
            float* out = args.products + of_slice(args, row) * Segments::kTotal + column;
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; ++h) {
                const int at = unit * kUnitRows + 8 * h + threadIdx.x % kWarp / 4;
                if (at < S::kRows) out[at] = sums[h / 2][tile][h % 2 * 2 + i] * scales[token];
            }
        }
    }
}
template <class... S>
__device__ __forceinline__ void run(SegmentList<S...>, const MatmulArgs& args, int unit, int first, int steps,
                                    const uint4* inputs, const float* scales) {
    run_unit<0, S...>(args, unit, 0, first, steps, inputs, scales);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul(const __grid_constant__ MatmulArgs args) {
    extern __shared__ __align__(16) uint4 inputs[];
    __shared__ float scales[PASS];
    const int slice = blockIdx.x % SLICES, columns = gridDim.x / SLICES;
    const int first = slice * SLICE_STEPS, steps = min(SLICE_STEPS, kSteps - first);
    // neighbouring blocks take neighbouring units, warp after warp
    int unit = threadIdx.x / kWarp * columns + blockIdx.x / SLICES;

    let_next_kernel_start();
    if (unit < Segments::kUnits) prefetch(Segments{}, args, unit, first, steps, kWarp);
    wait_for_previous_kernel();
    const uint4* x = args.x + (static_cast<size_t>(blockIdx.y) * kSteps + first) * kStepParts;
    for (int i = threadIdx.x; i < steps * kStepParts; i += THREADS) inputs[i] = __ldcg(x + i);
    if (threadIdx.x < PASS) scales[threadIdx.x] = read_scale(args, threadIdx.x);
    __syncthreads();
    for (; unit < Segments::kUnits; unit += columns * (THREADS / kWarp)) run(Segments{}, args, unit, first, steps, inputs, scales);
}
