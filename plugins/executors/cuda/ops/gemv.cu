// Matrix-vector products for a few tokens: out = [norm](x) @ weight.T, several weights of one input in one launch, with
// what precedes and follows them fused: norm and quantisation of the input before, bias, activation and residual after.
//
// A warp takes a row group (the rows of one tile) and walks along its columns; its lanes are shared by the rows. Blocks
// loop over row groups, so a launch has as many blocks as the card runs at once. Each block quantises the whole input
// for itself: that costs less than a kernel boundary. Block y takes TOKENS tokens; buffers have room for whole ones.
//
// Compile-time: COLS columns of the input, TOKENS tokens (1 to 8), THREADS a block, NORM (kNoNorm, kRmsNorm,
// kLayerNorm), GATED (the first two segments are gate and up of equal shape), ACTIVATION, QUANTIZE_ACTIVATIONS, and
// SEGMENTS, a list of Segment<type, tile rows, tile columns, rows>.
#include "activations.cuh"
#include "elementwise.cuh"
#include "norm.cuh"
#include "tile.cuh"

struct SegmentArgs {
    const uint8* weight;
    const float* bias;      // (rows,) or null
    const float* residual;  // (tokens, rows) or null
    float* out;             // (tokens, rows)
};

constexpr int kMaxSegments = 4;

struct GemvArgs {
    const float* x;            // (tokens, columns)
    const float* norm_weight;  // (columns,)
    const float* norm_bias;    // (columns,) or null
    float norm_eps;
    SegmentArgs segments[kMaxSegments];
};

template <class Q_, int kTileRows, int kTileCols, int kRows_>
struct Segment {
    using Q = Q_;
    using T = Tile<Q, kTileRows, kTileCols>;
    static constexpr int kRows = kRows_;
    static constexpr int kTilesAcross = COLS / kTileCols;
    static constexpr int kGroups = kRows / kTileRows;  // row groups
    static constexpr int kChunks = COLS / 32;          // chunks of a row
    static constexpr int kSteps = ceil_div(kChunks, T::kRowLanes);
    static constexpr bool kInteger = Q::kIntegerDot && QUANTIZE_ACTIVATIONS;

    static_assert(COLS % kTileCols == 0 && kRows % kTileRows == 0, "tiles cover the weight");

    static __device__ __forceinline__ typename Q::Weight32 load(const uint8* weight, int group, int chunk) {
        const int row = threadIdx.x % kWarp / T::kRowLanes;
        const int across = kTilesAcross == 1 ? 0 : chunk / T::kRowChunks;
        const uint8* tile = weight + (static_cast<uint64>(group) * kTilesAcross + across) * T::kBytes;
        return T::template load<GlobalStream>(tile, row, chunk - across * T::kRowChunks);
    }
};

template <class... S>
struct SegmentList {
    static constexpr int kCount = sizeof...(S);
    static constexpr bool kAnyInteger = (S::kInteger || ...);
    static constexpr bool kAnyFloat = (!S::kInteger || ...);
};

using Segments = SegmentList<SEGMENTS>;


// The input of all tokens in shared memory, in the forms the segments need.
struct Input {
    ActivationRow<COLS>* quantized;
    FloatRow<COLS>* floats;
};

// What a launch has to ask for: only the traits know which form of the input they take. Read by the host.
extern "C" __device__ const int shared_bytes =
    TOKENS * (Segments::kAnyInteger * sizeof(ActivationRow<COLS>) + Segments::kAnyFloat * sizeof(FloatRow<COLS>));

__device__ __forceinline__ Input carve(uint8* shared) {
    Input input{};
    if constexpr (Segments::kAnyInteger) {
        input.quantized = reinterpret_cast<ActivationRow<COLS>*>(shared);
        shared += TOKENS * sizeof(ActivationRow<COLS>);
    }
    if constexpr (Segments::kAnyFloat) input.floats = reinterpret_cast<FloatRow<COLS>*>(shared);
    return input;
}

// Norms and stores the input of one token. Every thread of the block takes part.
__device__ __forceinline__ void read_input(const GemvArgs& args, const Input& input, int token, float* scratch) {
    constexpr int kFours = COLS / 4, kEach = ceil_div(kFours, THREADS);
    const float4* x = reinterpret_cast<const float4*>(args.x + static_cast<size_t>(blockIdx.y * TOKENS + token) * COLS);
    float4 v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int at = threadIdx.x + i * THREADS;
        v[i] = at < kFours ? x[at] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    if constexpr (NORM != kNoNorm) {
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
            if (threadIdx.x + i * THREADS < kFours) {
                v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
                squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
            }
        }
        const float inverse = rsqrtf(block_sum(squares, scratch) / COLS + args.norm_eps);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = min(threadIdx.x + i * THREADS, kFours - 1);
            const float4 g = reinterpret_cast<const float4*>(args.norm_weight)[at];
            float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
            if (args.norm_bias != nullptr) b = reinterpret_cast<const float4*>(args.norm_bias)[at];
            v[i] = make_float4(v[i].x * inverse * g.x + b.x, v[i].y * inverse * g.y + b.y,
                               v[i].z * inverse * g.z + b.z, v[i].w * inverse * g.w + b.w);
        }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if constexpr (Segments::kAnyInteger) input.quantized[token].store4(at, v[i], at < kFours);
        if constexpr (Segments::kAnyFloat) {
            if (at < kFours) input.floats[token].store4(at, v[i]);
        }
    }
}

// Chunks a lane loads before it uses the first. Several tokens are bound by arithmetic, and need the registers; so do
// types whose chunk alone fills many.
template <class Q>
constexpr int kInFlight = TOKENS > 1 ? 1 : sizeof(typename Q::Weight32) <= 64 ? 4 : 2;

template <class S>
__device__ __forceinline__ void add_chunk(const typename S::Q::Weight32& w, const Input& input, int chunk, float* sums) {
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        if constexpr (S::kInteger) {
            sums[token] += S::Q::dot(w, input.quantized[token].load(chunk));
        } else {
#pragma unroll
            for (int group = 0; group < 8; ++group) {
                const float4 a = S::Q::dequantise4(w, group), b = input.floats[token].part[group][chunk];
                sums[token] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
    }
}

// The products of a row group: sums[token], valid in every lane of the row.
template <class S>
__device__ __forceinline__ void product(const uint8* weight, int group, const Input& input, float* sums) {
    constexpr int kLanes = S::T::kRowLanes;
    const int first = threadIdx.x % kLanes;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) sums[token] = 0.f;
    constexpr int kAhead = kInFlight<typename S::Q>;
#pragma unroll 1
    for (int step = 0; step < S::kSteps; step += kAhead) {
        typename S::Q::Weight32 w[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int chunk = first + (step + i) * kLanes;
            if (chunk < S::kChunks) w[i] = S::load(weight, group, chunk);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int chunk = first + (step + i) * kLanes;
            if (chunk < S::kChunks) add_chunk<S>(w[i], input, chunk, sums);
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) sums[token] = lanes_sum<kLanes>(sums[token]);
}

template <class S>
__device__ __forceinline__ void finish(const SegmentArgs& args, int group, const float* sums) {
    const int lane = threadIdx.x % kWarp;
    if (lane % S::T::kRowLanes != 0) return;
    const int row = group * S::T::kRows + lane / S::T::kRowLanes;
    const float bias = args.bias == nullptr ? 0.f : args.bias[row];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        const size_t at = static_cast<size_t>(blockIdx.y * TOKENS + token) * S::kRows + row;
        float value = sums[token] + bias;
        if constexpr (!GATED && ACTIVATION != kIdentity) value = activate<ACTIVATION>(value);
        if (args.residual != nullptr) value += args.residual[at];
        args.out[at] = value;
    }
}

// Row groups of all segments are numbered through; this takes number `unit`.
template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void run_unit(const GemvArgs& args, const Input& input, int unit) {
    if (unit < S::kGroups) {
        float sums[TOKENS];
        product<S>(args.segments[kIndex].weight, unit, input, sums);
        finish<S>(args.segments[kIndex], unit, sums);
        return;
    }
    if constexpr (sizeof...(Rest) > 0) run_unit<kIndex + 1, Rest...>(args, input, unit - S::kGroups);
}

template <class Gate, class Up>
__device__ __forceinline__ void run_gated(const GemvArgs& args, const Input& input, int unit) {
    static_assert(Gate::kRows == Up::kRows && Gate::T::kRows == Up::T::kRows, "gate and up have one shape");
    float gate[TOKENS], up[TOKENS];
    product<Gate>(args.segments[0].weight, unit, input, gate);
    product<Up>(args.segments[1].weight, unit, input, up);
    const int row = unit * Gate::T::kRows + threadIdx.x % kWarp / Gate::T::kRowLanes;
    const float gate_bias = args.segments[0].bias == nullptr ? 0.f : args.segments[0].bias[row];
    const float up_bias = args.segments[1].bias == nullptr ? 0.f : args.segments[1].bias[row];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) gate[token] = activate<ACTIVATION>(gate[token] + gate_bias) * (up[token] + up_bias);
    SegmentArgs store = args.segments[0];
    store.bias = nullptr;
    finish<Gate>(store, unit, gate);
}

template <class... S>
__device__ __forceinline__ constexpr int units(SegmentList<S...>) {
    return (S::kGroups + ...);
}
template <class Gate, class Up>
__device__ __forceinline__ void run(SegmentList<Gate, Up>, const GemvArgs& args, const Input& input, int unit) {
    if constexpr (GATED) run_gated<Gate, Up>(args, input, unit);
    else run_unit<0, Gate, Up>(args, input, unit);
}
template <class... S>
__device__ __forceinline__ void run(SegmentList<S...>, const GemvArgs& args, const Input& input, int unit) {
    run_unit<0, S...>(args, input, unit);
}

// Asks the L2 cache for the first bytes of this block's weights; they do not depend on the kernel before.
template <class S>
__device__ __forceinline__ void prefetch(const uint8* weight, int group) {
    constexpr int kGroupBytes = S::kTilesAcross * S::T::kBytes;
    if (group >= S::kGroups) return;
    const uint8* start = weight + static_cast<uint64>(group) * kGroupBytes;
    for (int at = threadIdx.x % kWarp * 128; at < kGroupBytes; at += kWarp * 128) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(start + at));
    }
}

template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void prefetch_unit(const GemvArgs& args, int unit) {
    if (unit < S::kGroups) {
        prefetch<S>(args.segments[kIndex].weight, unit);
        if constexpr (GATED) prefetch<S>(args.segments[kIndex + 1].weight, unit);
        return;
    }
    if constexpr (sizeof...(Rest) > 0 && !GATED) prefetch_unit<kIndex + 1, Rest...>(args, unit - S::kGroups);
}
template <class... S>
__device__ __forceinline__ void prefetch_units(SegmentList<S...>, const GemvArgs& args, int unit) {
    prefetch_unit<0, S...>(args, unit);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) gemv(const __grid_constant__ GemvArgs args) {
    extern __shared__ __align__(16) uint8 shared[];
    __shared__ float scratch[kWarp];
    constexpr int kUnits = GATED ? units(Segments{}) / 2 : units(Segments{});
    const Input input = carve(shared);
    const int stride = gridDim.x * (THREADS / kWarp);
    int unit = threadIdx.x / kWarp * gridDim.x + blockIdx.x;

    let_next_kernel_start();
    prefetch_units(Segments{}, args, unit);
    prefetch_units(Segments{}, args, unit + stride);
    wait_for_previous_kernel();

#pragma unroll 1
    for (int token = 0; token < TOKENS; ++token) read_input(args, input, token, scratch);
    __syncthreads();
    for (; unit < kUnits; unit += stride) run(Segments{}, args, input, unit);
}
