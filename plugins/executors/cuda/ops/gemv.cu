// Matrix-vector products for a few tokens: out = [norm](x) @ weight.T, several weights of one input in one launch, with
// what precedes and follows them fused: norm and quantisation of the input before, bias, activation and residual after.
//
// A warp takes a row group (the rows of one tile) and walks along its columns; its lanes are shared by the rows. Blocks
// loop over row groups, so a launch has as many blocks as the card runs at once. Each block quantises the whole input
// for itself: that costs less than a kernel boundary. Block y takes TOKENS tokens; buffers have room for whole ones.
// Weights come through a ring in shared memory (gemv_ring.cuh) where RING_SLOTS is not 0, else straight to registers.
//
// Compile-time: COLS columns of the input, TOKENS tokens (1 to 8), THREADS a block, NORM (kNoNorm, kRmsNorm,
// kLayerNorm), GATED (the first two segments are gate and up of equal shape), ACTIVATION, QUANTIZE_ACTIVATIONS, and
// SEGMENTS, a list of Segment<type, tile rows, tile columns, rows>, RING_SLOTS of a warp, BLOCKS an SM shares at least.
#include "elementwise.cuh"
#include "gemv_input.cuh"
#include "gemv_ring.cuh"

template <class List>
struct RingOf;
template <class... S>
struct RingOf<SegmentList<S...>> {
    using Type = Ring<kUnits, GATED, RING_SLOTS, S...>;
};
using WarpRing = typename RingOf<Segments>::Type;

constexpr int kRingStart = ceil_div(kInputBytes, 128) * 128;

// What a launch has to ask for: only the traits know which form of the input they take. Read by the host.
extern "C" __device__ const int shared_bytes =
    RING_SLOTS > 0 ? largest(kRingStart + kWarps * WarpRing::kBytes, kLeastShared) : kInputBytes;

// What a warp works with besides its units.
struct Work {
    const GemvArgs& args;
    Input input;
    float factors[TOKENS];
    WarpRing ring;
};

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

// A lane's part of a row group, with the weights straight from memory.
template <class S>
__device__ __forceinline__ void add_from_memory(const uint8* weight, int group, const Input& input, float* sums) {
    constexpr int kLanes = S::T::kRowLanes, kAhead = kInFlight<typename S::Q>;
    const int first = threadIdx.x % kLanes;
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
}

// The same with the weights out of the ring, where they lie in the order of the units.
template <class S>
__device__ __forceinline__ void add_from_ring(Work& work, float* sums) {
    using T = typename S::T;
    constexpr int kTileSteps = ceil_div(T::kRowChunks, T::kRowLanes);
    const int row = threadIdx.x % kWarp / T::kRowLanes, first = threadIdx.x % T::kRowLanes;
#pragma unroll 1
    for (int tile = 0; tile < S::kTilesAcross; ++tile) {
        const uint8* bytes = work.ring.take();
#pragma unroll 4
        for (int step = 0; step < kTileSteps; ++step) {
            const int chunk = first + step * T::kRowLanes;
            if (T::kRowChunks % T::kRowLanes == 0 || chunk < T::kRowChunks) {
                add_chunk<S>(T::template load<SharedTile>(bytes, row, chunk), work.input, tile * T::kRowChunks + chunk, sums);
            }
        }
        work.ring.give_back(work.args);
    }
}

// The products of a row group: sums[token], valid in every lane of the row.
template <class S>
__device__ __forceinline__ void product(Work& work, int segment, int group, float* sums) {
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) sums[token] = 0.f;
    if constexpr (RING_SLOTS > 0) add_from_ring<S>(work, sums);
    else add_from_memory<S>(work.args.segments[segment].weight, group, work.input, sums);
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        sums[token] = lanes_sum<S::T::kRowLanes>(sums[token]);
        if constexpr (NORM == kRmsNorm) sums[token] *= work.factors[token];
    }
}

// What is added to the products of a row group, valid in the lanes that store them. It comes from the L2 cache or from
// memory: of one token it is asked for before the products are made; several need the registers.
struct Added {
    float bias = 0.f, residual[TOKENS] = {};
};
constexpr bool kAddedEarly = TOKENS == 1;

template <class S>
__device__ __forceinline__ Added load_added(const SegmentArgs& args, int group) {
    Added added;
    const int lane = threadIdx.x % kWarp, row = group * S::T::kRows + lane / S::T::kRowLanes;
    if (lane % S::T::kRowLanes != 0) return added;
    if (args.bias != nullptr) added.bias = args.bias[row];
    if (args.residual == nullptr) return added;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        added.residual[token] = args.residual[static_cast<size_t>(blockIdx.y * TOKENS + token) * S::kRows + row];
    }
    return added;
}

template <class S>
__device__ __forceinline__ void finish(const SegmentArgs& args, int group, const float* sums, const Added& added) {
    const int lane = threadIdx.x % kWarp;
    if (lane % S::T::kRowLanes != 0) return;
    const int row = group * S::T::kRows + lane / S::T::kRowLanes;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        float value = sums[token] + added.bias;
        if constexpr (!GATED && ACTIVATION != kIdentity) value = activate<ACTIVATION>(value);
        args.out[static_cast<size_t>(blockIdx.y * TOKENS + token) * S::kRows + row] = value + added.residual[token];
    }
}

// Row groups of all segments are numbered through; this takes number `unit`.
template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void run_unit(Work& work, int unit) {
    if (unit < S::kGroups) {
        float sums[TOKENS];
        Added added;
        if constexpr (kAddedEarly) added = load_added<S>(work.args.segments[kIndex], unit);
        product<S>(work, kIndex, unit, sums);
        if constexpr (!kAddedEarly) added = load_added<S>(work.args.segments[kIndex], unit);
        finish<S>(work.args.segments[kIndex], unit, sums, added);
        return;
    }
    if constexpr (sizeof...(Rest) > 0) run_unit<kIndex + 1, Rest...>(work, unit - S::kGroups);
}

// The products of the `kRows` rows that gate and up share as a unit: sums[token], valid in every lane of the row. Types
// with tiles of different heights may be paired; of the lower ones a unit takes several.
template <class S, int kRows>
__device__ __forceinline__ void unit_products(Work& work, int segment, int unit, float* sums) {
    if constexpr (S::T::kRows == kRows) {
        product<S>(work, segment, unit, sums);
    } else {
        constexpr int kTiles = kRows / S::T::kRows;
        const int row = threadIdx.x % kWarp / (kWarp / kRows);
#pragma unroll 1
        for (int tile = 0; tile < kTiles; ++tile) {
            float part[TOKENS];
            product<S>(work, segment, unit * kTiles + tile, part);
#pragma unroll
            for (int token = 0; token < TOKENS; ++token) {
                const float sum = __shfl_sync(kFullMask, part[token], row % S::T::kRows * S::T::kRowLanes);
                if (row / S::T::kRows == tile) sums[token] = sum;
            }
        }
    }
}

template <class Gate, class Up>
__device__ __forceinline__ void run_gated(Work& work, int unit) {
    static_assert(Gate::kRows == Up::kRows, "gate and up have as many rows");
    constexpr bool kGateIsTaller = Gate::T::kRows >= Up::T::kRows;
    constexpr int kRows = kGateIsTaller ? Gate::T::kRows : Up::T::kRows;
    float gate[TOKENS], up[TOKENS];
    unit_products<Gate, kRows>(work, 0, unit, gate);
    unit_products<Up, kRows>(work, 1, unit, up);
    const SegmentArgs& first = work.args.segments[0];
    const SegmentArgs& second = work.args.segments[1];
    const int row = unit * kRows + threadIdx.x % kWarp / (kWarp / kRows);
    const float gate_bias = first.bias == nullptr ? 0.f : first.bias[row];
    const float up_bias = second.bias == nullptr ? 0.f : second.bias[row];
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) gate[token] = activate<ACTIVATION>(gate[token] + gate_bias) * (up[token] + up_bias);
    SegmentArgs store = first;
    store.bias = nullptr;
    if constexpr (kGateIsTaller) finish<Gate>(store, unit, gate, load_added<Gate>(store, unit));
    else finish<Up>(store, unit, gate, load_added<Up>(store, unit));
}

template <class Gate, class Up>
__device__ __forceinline__ void run(SegmentList<Gate, Up>, Work& work, int unit) {
    if constexpr (GATED) run_gated<Gate, Up>(work, unit);
    else run_unit<0, Gate, Up>(work, unit);
}
template <class... S>
__device__ __forceinline__ void run(SegmentList<S...>, Work& work, int unit) {
    run_unit<0, S...>(work, unit);
}

// Asks the L2 cache for the first bytes of this block's weights; they do not depend on the kernel before.
template <class S>
__device__ __forceinline__ void prefetch(const uint8* weight, int first, int groups) {
    constexpr int kGroupBytes = S::kTilesAcross * S::T::kBytes;
    if (first >= S::kGroups) return;
    const uint8* start = weight + static_cast<uint64>(first) * kGroupBytes;
    for (int at = threadIdx.x % kWarp * 128; at < groups * kGroupBytes; at += kWarp * 128) {
#ifdef __CUDA_ARCH__
        asm volatile("prefetch.global.L2 [%0];" ::"l"(start + at));
#endif
    }
}

template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void prefetch_unit(const GemvArgs& args, int unit) {
    if (unit < S::kGroups) return prefetch<S>(args.segments[kIndex].weight, unit, 1);
    if constexpr (sizeof...(Rest) > 0) prefetch_unit<kIndex + 1, Rest...>(args, unit - S::kGroups);
}
template <class... S>
__device__ __forceinline__ void prefetch_units(SegmentList<S...>, const GemvArgs& args, int unit) {
    if constexpr (GATED) {
        int index = 0;
        ((prefetch<S>(args.segments[index++].weight, unit * (S::kGroups / kUnits), S::kGroups / kUnits)), ...);
    } else {
        prefetch_unit<0, S...>(args, unit);
    }
}

extern "C" __global__ void __launch_bounds__(register_threads(THREADS), BLOCKS) gemv(const __grid_constant__ GemvArgs args) {
    extern __shared__ __align__(128) uint8 shared[];
    __shared__ uint64 barriers[kWarps][RING_SLOTS > 0 ? RING_SLOTS : 1];
    __shared__ float squares[TOKENS][kWarps];
    const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarp, 0);  // known to be one for the warp
    const int stride = gridDim.x * kWarps;
    int unit = warp * gridDim.x + blockIdx.x;

    let_next_kernel_start();
    Work work{args, carve(shared), {}, {shared + kRingStart + warp * WarpRing::kBytes, barriers[warp], unit, stride}};
    if constexpr (RING_SLOTS > 0) {
        work.ring.start(args);
    } else {
        prefetch_units(Segments{}, args, unit);
        prefetch_units(Segments{}, args, unit + stride);
    }
    Beforehand before;
    before.load(args);
    wait_for_previous_kernel();

#pragma unroll 1
    for (int token = 0; token < TOKENS; ++token) read_input(args, before, work.input, token, squares[token]);
    __syncthreads();
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) work.factors[token] = factor_of(args, squares[token]);
    for (; unit < kUnits; unit += stride) run(Segments{}, work, unit);
}
