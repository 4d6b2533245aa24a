// Rows of activations, normed where the group begins with a norm, as halves for tensor cores.
//
// A block takes a part of a row: the columns that a slice of the product takes. It multiplies them with the power of two
// that brings the largest to 2^9 … 2^10, and leaves a scale that undoes that, (SCALES, rows): no value overflows a half,
// whatever its size, and nothing is rounded by it. RMS norm's factor needs the whole row, so it is left to those who finish
// the products, with FACTOR_LATER: the block leaves its part of the sum of squares, (SCALES, rows). Where that cannot be,
// or cuBLAS multiplies, a block takes all columns. Block (row, part).
//
// Where the rows are the results of products just taken, JOIN (0 or 1) finishes those here (finish.cuh) instead of in a
// launch of its own.
//
// Compile-time: JOIN, and what finish.cuh names; COLS columns; THREADS; NORM (kNoNorm, kRmsNorm, kLayerNorm) and
// FACTOR_LATER; PART_STEPS of 128 columns a block; SCALES of a row, one a part or each that of the whole row; and PASS: 0
// writes rows in order, (rows, COLS); else the rows of a pass of matmul.cu, or, where WGMMA is 1, of matmul_wgmma.cu as
// those read them, with zeros for rows and columns that are not there.
#include "finish.cuh"
#include "mma.cuh"
#include "norm.cuh"

struct InputArgs {
    const float* x;            // (rows, COLS); not read where JOIN
    const float* norm_weight;  // (COLS,)
    const float* norm_bias;    // (COLS,) or null
    __half* out;
    float* scales;   // (SCALES, rows)
    float* squares;  // (SCALES, rows); written where FACTOR_LATER
    float norm_eps;
    int rows;
    FinishArgs products;  // read where JOIN
};

constexpr int kFours = COLS / 4, kPartFours = PART_STEPS * 32, kEach = ceil_div(kPartFours, THREADS);
constexpr int kSteps = WGMMA ? ceil_div(COLS, 256) * 2 : ceil_div(COLS, 128);
constexpr int kParts = ceil_div(kSteps, PART_STEPS);
constexpr int kPass = PASS == 0 ? 8 : PASS;
constexpr bool kNormsHere = NORM != kNoNorm && !FACTOR_LATER;

static_assert(kParts == 1 ? SCALES <= THREADS : kParts == SCALES, "a scale a part, or all by one block");
static_assert(kParts == 1 || !kNormsHere, "a norm sees whole rows");

// The number within the row of a thread's four elements `i`.
__device__ __forceinline__ int four_of(int i) {
    return static_cast<int>(blockIdx.y) * kPartFours + static_cast<int>(threadIdx.x) + i * THREADS;
}

// The largest value of a block, and the sum of others; `scratch` holds a pair a warp.
__device__ __forceinline__ float2 block_max_sum(float top, float part, float2* scratch) {
    top = lanes_max(top);
    if constexpr (FACTOR_LATER) part = lanes_sum(part);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = make_float2(top, part);
    __syncthreads();
    float2 all = make_float2(0.f, 0.f);
    for (int warp = 0; warp < THREADS / kWarp; ++warp) {
        all = make_float2(fmaxf(all.x, scratch[warp].x), all.y + scratch[warp].y);
    }
    return all;
}

// A norm's weights for this thread's elements. Nothing before writes them, so where registers allow they are on their way
// while the kernel waits.
constexpr bool kWeightsFirst = NORM != kNoNorm && kEach <= 4;

__device__ __forceinline__ void read_weights(const InputArgs& args, float4 (&weights)[kEach]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) weights[i] = reinterpret_cast<const float4*>(args.norm_weight)[min(four_of(i), kFours - 1)];
}

__device__ __forceinline__ float sum_of(const float4& v) { return v.x + v.y + v.z + v.w; }
__device__ __forceinline__ float squares_of(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// Past the end of the row what a thread holds stays zero.
__device__ __forceinline__ void norm_row(const InputArgs& args, const float4 (&weights)[kEach], float4 (&v)[kEach], float* scratch) {
    float mean = 0.f;
    if constexpr (NORM == kLayerNorm) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum += sum_of(v[i]);
        mean = block_sum(sum, scratch) / COLS;
    }
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (four_of(i) >= kFours) continue;
        v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
        squares += squares_of(v[i]);
    }
    const float inverse = rsqrtf(block_sum(squares, scratch) / COLS + args.norm_eps);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (four_of(i) >= kFours) continue;
        const float4 g = weights[i];
        float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
        if (args.norm_bias != nullptr) b = reinterpret_cast<const float4*>(args.norm_bias)[four_of(i)];
        v[i] = make_float4(v[i].x * inverse * g.x + b.x, v[i].y * inverse * g.y + b.y, v[i].z * inverse * g.z + b.z,
                           v[i].w * inverse * g.w + b.w);
    }
}

// This thread's elements of a row; zeros past its end.
__device__ __forceinline__ void read_row(const InputArgs& args, int row, float4 (&v)[kEach]) {
    if constexpr (JOIN) {
        Values<4> results[kEach] = {};
        const Share<4> share{four_of(0), THREADS, min(COLS, (static_cast<int>(blockIdx.y) + 1) * kPartFours * 4)};
        finish(args.products, row, args.products.parts[0], 0, share, results);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            v[i] = make_float4(results[i].v[0], results[i].v[1], results[i].v[2], results[i].v[3]);
        }
    } else {
        const float4* x = reinterpret_cast<const float4*>(args.x + static_cast<size_t>(row) * COLS);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            if (threadIdx.x + i * THREADS < kPartFours && four_of(i) < kFours) v[i] = x[four_of(i)];
        }
    }
}

// Where row `row`'s part of a piece of what matmul.cu or matmul_wgmma.cu reads at once lies, in halves from the start: that
// of piece `piece` of step `step`. A tile of eight rows has kEight halves in it.
template <int kPieces, int kEight>
__device__ __forceinline__ size_t piece_of(int row, int step, int piece) {
    const int token = row % kPass;
    const size_t part = (static_cast<size_t>(row / kPass) * kSteps + step) * kPieces + piece;
    return (part * (kPass / 8) + token / 8) * kEight + token % 8 * (kEight / 8);
}

// Stores four elements as halves: number `at` of the fours of a row, where that is `inside` what the block takes. All
// threads of a warp call with neighbouring numbers.
__device__ __forceinline__ void store4(__half* out, int row, int at, bool inside, uint2 halves) {
    const int chunk = at / 8, group = at % 8, place = chunk % 4;
    inside = inside && at < (PASS == 0 ? kFours : kSteps * 32);
    if constexpr (PASS == 0) {
        if (inside) *reinterpret_cast<uint2*>(out + static_cast<size_t>(row) * COLS + 4 * at) = halves;
    } else if constexpr (WGMMA) {
        // a pair of elements of each of four chunks lie together: lanes of neighbouring chunks exchange theirs
        const bool odd = place % 2 != 0;
        const uint32 other = __shfl_xor_sync(kFullMask, odd ? halves.x : halves.y, 8);
        if (!inside) return;
        __half* to = out + piece_of<16, 64>(row, chunk / 4, 2 * group + odd) + place / 2 * 4;
        *reinterpret_cast<uint2*>(to) = odd ? make_uint2(other, halves.y) : make_uint2(halves.x, other);
    } else if (inside) {
        // a lane's 16 bytes are four elements of each of two groups of its chunk
        *reinterpret_cast<uint2*>(out + piece_of<4, 256>(row, chunk / 4, group / 2) + place * 8 + group % 2 * 4) = halves;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) matmul_input(const __grid_constant__ InputArgs args) {
    __shared__ float2 scratch[kWarp];
    const int row = blockIdx.x;
    const bool there = row < args.rows;
    let_next_kernel_start();
    float4 weights[kEach];
    if constexpr (kWeightsFirst) read_weights(args, weights);
    wait_for_previous_kernel();
    float4 v[kEach] = {};
    if (there) read_row(args, row, v);
    if constexpr (NORM != kNoNorm && !kWeightsFirst) read_weights(args, weights);
    if constexpr (kNormsHere) {
        __shared__ float sums[kWarp];
        norm_row(args, weights, v, sums);
    }
    float top = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if constexpr (FACTOR_LATER) {
            squares += squares_of(v[i]);
            v[i] = make_float4(v[i].x * weights[i].x, v[i].y * weights[i].y, v[i].z * weights[i].z, v[i].w * weights[i].w);
        }
        top = fmaxf(top, fmaxf(fmaxf(fabsf(v[i].x), fabsf(v[i].y)), fmaxf(fabsf(v[i].z), fabsf(v[i].w))));
    }
    const float2 all = block_max_sum(top, squares, scratch);
    // the largest is m * 2^e with 1 <= m < 2; the factor is 2^(9 - e), kept within what a float can hold and invert
    const int exponent = static_cast<int>(__float_as_uint(all.x) >> 23) - 127;
    const int shift = min(max(9 - exponent, -120), 120);
    const float factor = there ? __uint_as_float(static_cast<uint32>(127 + shift) << 23) : 0.f;
    if (there && threadIdx.x < SCALES / kParts) {
        const size_t at = static_cast<size_t>(blockIdx.y + threadIdx.x) * args.rows + row;
        args.scales[at] = __uint_as_float(static_cast<uint32>(127 - shift) << 23);
        if constexpr (FACTOR_LATER) args.squares[at] = all.y;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const uint2 halves = make_uint2(half2_word(v[i].x * factor, v[i].y * factor), half2_word(v[i].z * factor, v[i].w * factor));
        store4(args.out, row, four_of(i), threadIdx.x + i * THREADS < kPartFours, halves);
    }
}
