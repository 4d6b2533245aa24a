// Rows of activations, normed where the group begins with a norm, as halves for tensor cores, with a scale a row.
//
// Each row is multiplied with a power of two that brings its largest value to 2^9 … 2^10, and the scale undoes that:
// no row overflows a half, whatever its size, and nothing is rounded by it. Block x is the row.
//
// Where the rows are the results of products just taken, JOIN (0 or 1) finishes those here (finish.cuh) instead of in a
// launch of its own.
//
// Compile-time: JOIN, GATED and ACTIVATION of what is finished; COLS columns, THREADS, NORM (kNoNorm, kRmsNorm, kLayerNorm), and PASS: 0 writes rows in order,
// (rows, COLS); else the rows of a pass of matmul.cu as that reads them, with zeros for rows and columns that are not
// there. PASS / 8 tiles of eight rows; a lane's 16 bytes are four elements of each of two groups of its chunk:
// (pass, step of 4 chunks, pair of groups, tile, lane, 8 halves).
#include "finish.cuh"
#include "mma.cuh"
#include "norm.cuh"

struct InputArgs {
    const float* x;            // (rows, COLS); not read where JOIN
    const float* norm_weight;  // (COLS,)
    const float* norm_bias;    // (COLS,) or null
    __half* out;
    float* scales;  // (rows,)
    float norm_eps;
    int rows;
    FinishArgs products;  // read where JOIN
};

constexpr int kFours = COLS / 4, kEach = ceil_div(kFours, THREADS);
constexpr int kSteps = ceil_div(COLS, 128);
constexpr int kPass = PASS == 0 ? 8 : PASS;

__device__ __forceinline__ float block_max(float v, float* scratch) {
    v = lanes_max(v);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
    __syncthreads();
    float top = 0.f;
    for (int warp = 0; warp < THREADS / kWarp; ++warp) top = fmaxf(top, scratch[warp]);
    __syncthreads();
    return top;
}

__device__ __forceinline__ void norm_row(const InputArgs& args, float4 (&v)[kEach], float* scratch) {
    float mean = 0.f;
    if constexpr (NORM == kLayerNorm) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum += v[i].x + v[i].y + v[i].z + v[i].w;
        mean = block_sum(sum, scratch) / COLS;
    }
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (threadIdx.x + i * THREADS >= kFours) continue;
        v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
        squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
    const float inverse = rsqrtf(block_sum(squares, scratch) / COLS + args.norm_eps);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int at = min(threadIdx.x + i * THREADS, kFours - 1);
        const float4 g = reinterpret_cast<const float4*>(args.norm_weight)[at];
        float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
        if (args.norm_bias != nullptr) b = reinterpret_cast<const float4*>(args.norm_bias)[at];
        v[i] = make_float4(v[i].x * inverse * g.x + b.x, v[i].y * inverse * g.y + b.y, v[i].z * inverse * g.z + b.z,
                           v[i].w * inverse * g.w + b.w);
    }
}

// This thread's elements of a row.
__device__ __forceinline__ void read_row(const InputArgs& args, int row, float4 (&v)[kEach]) {
    if constexpr (JOIN) {
        Values<4> results[kEach] = {};
        finish(args.products, row, args.products.parts[0], 0, Share<4>{static_cast<int>(threadIdx.x), THREADS, COLS}, results);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            v[i] = make_float4(results[i].v[0], results[i].v[1], results[i].v[2], results[i].v[3]);
        }
    } else {
        const float4* x = reinterpret_cast<const float4*>(args.x + static_cast<size_t>(row) * COLS);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = threadIdx.x + i * THREADS;
            if (at < kFours) v[i] = x[at];
        }
    }
}

// Where four neighbouring elements go, in halves from the start.
__device__ __forceinline__ size_t place_of(int row, int at) {
    if constexpr (PASS == 0) {
        return static_cast<size_t>(row) * COLS + 4 * at;
    } else {
        constexpr int kTiles = kPass / 8;
        const int chunk = at / 8, group = at % 8, token = row % kPass;
        const size_t part = (static_cast<size_t>(row / kPass) * kSteps + chunk / 4) * 4 + group / 2;
        return ((part * kTiles + token / 8) * kWarp + token % 8 * 4 + chunk % 4) * 8 + group % 2 * 4;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) matmul_input(const __grid_constant__ InputArgs args) {
    __shared__ float scratch[kWarp];
    const int row = blockIdx.x;
    let_next_kernel_start();
    wait_for_previous_kernel();
    float4 v[kEach] = {};
    if (row < args.rows) read_row(args, row, v);
    if constexpr (NORM != kNoNorm) norm_row(args, v, scratch);
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        if (threadIdx.x + i * THREADS < kFours) {
            top = fmaxf(top, fmaxf(fmaxf(fabsf(v[i].x), fabsf(v[i].y)), fmaxf(fabsf(v[i].z), fabsf(v[i].w))));
        }
    }
    // top = m * 2^e with 1 <= m < 2; the factor is 2^(9 - e), kept within what a float can hold and invert
    const int exponent = static_cast<int>(__float_as_uint(block_max(top, scratch)) >> 23) - 127;
    const int shift = min(max(9 - exponent, -120), 120);
    const float factor = row < args.rows ? __uint_as_float(static_cast<uint32>(127 + shift) << 23) : 0.f;
    if (threadIdx.x == 0 && row < args.rows) args.scales[row] = __uint_as_float(static_cast<uint32>(127 - shift) << 23);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at < kFours) {
            *reinterpret_cast<uint2*>(args.out + place_of(row, at)) = make_uint2(
                half2_word(v[i].x * factor, v[i].y * factor), half2_word(v[i].z * factor, v[i].w * factor));
        }
    }
    if constexpr (PASS != 0) {
        for (int at = kFours + threadIdx.x; at < kSteps * 32; at += THREADS) {
            *reinterpret_cast<uint2*>(args.out + place_of(row, at)) = make_uint2(0u, 0u);
        }
    }
}
