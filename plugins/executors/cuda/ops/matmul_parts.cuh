// What the kernels that multiply a few rows on tensor cores have in common: what they are given, and how they find their
// weights. A unit is 16 * HEIGHT rows of a weight; units of all weights are numbered through.
//
// Compile-time: COLS; PASS rows of x a pass; SLICES; HEIGHT; SEGMENTS, a list of Segment<type, tile rows, tile columns, rows>.
#pragma once

#include "expand.cuh"
#include "tile.cuh"

constexpr int kMaxSegments = 4;
constexpr int kUnitRows = 16 * HEIGHT;

struct MatmulArgs {
    const uint4* x;       // as matmul_input.cu lays it out, eight halves each
    const float* scales;  // (SLICES, rows): what undoes those of x
    float* products;      // (SLICES, rows, total)
    const uint8* weights[kMaxSegments];
    int rows;
};

// Memory that only asks the L2 cache for what a type would load.
struct L2Prefetch {
    static __device__ __forceinline__ uint32 touch(const uint8* p) {
#ifdef __CUDA_ARCH__
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
        return 0;
    }
    static __device__ __forceinline__ uint4 u128(const uint8* p) { return make_uint4(touch(p), 0, 0, 0); }
    static __device__ __forceinline__ uint2 u64(const uint8* p) { return make_uint2(touch(p), 0); }
    static __device__ __forceinline__ uint32 u32(const uint8* p) { return touch(p); }
    static __device__ __forceinline__ uint32 u16(const uint8* p) { return touch(p); }
    static __device__ __forceinline__ uint32 u8(const uint8* p) { return touch(p); }
};

template <class Q_, int kTileRows, int kTileCols, int kRows_>
struct Segment {
    using Q = Q_;
    using T = Tile<Q, kTileRows, kTileCols>;
    static constexpr int kRows = kRows_;
    static constexpr int kUnits = ceil_div(kRows, kUnitRows);
    static constexpr int kTilesAcross = COLS / kTileCols;

    static_assert(COLS % kTileCols == 0 && kRows % kTileRows == 0, "tiles cover the weight");

    // Rows past the end are the last one again; past the end of the columns x is zero, whatever the chunk.
    template <class Memory>
    static __device__ __forceinline__ typename Q::Weight32 load(const uint8* weight, int row, int chunk) {
        row = min(row, kRows - 1);
        if constexpr (COLS % 256 != 0) chunk = min(chunk, COLS / 32 - 1);  // no kernel goes further than whole 256
        const int across = kTilesAcross == 1 ? 0 : chunk / T::kRowChunks;
        const uint8* tile = weight + (static_cast<uint64>(row / T::kRows) * kTilesAcross + across) * T::kBytes;
        return T::template load<Memory>(tile, row % T::kRows, chunk - across * T::kRowChunks);
    }

    // Asks the L2 cache for `count` times eight chunks of each row of a unit, from chunk `first` on: 128 bytes of a plane
    // of 4-bit integers, and no more of any other. `lanes` threads share the work.
    static __device__ __forceinline__ void prefetch(const uint8* weight, int unit, int first, int count, int lanes) {
        for (int i = threadIdx.x % lanes; i < count * kUnitRows; i += lanes) {
            load<L2Prefetch>(weight, unit * kUnitRows + i % kUnitRows, first + i / kUnitRows * 8);
        }
    }
};

template <class... S>
struct SegmentList {
    static constexpr int kUnits = (S::kUnits + ...);
    static constexpr int kTotal = (S::kRows + ...);
};
using Segments = SegmentList<SEGMENTS>;

// Asks the L2 cache for the first weights of a unit; they do not depend on the kernel before.
template <int kIndex, class S, class... Rest>
__device__ __forceinline__ void prefetch_unit(const MatmulArgs& args, int unit, int first, int steps, int lanes) {
    if (unit >= S::kUnits) {
        if constexpr (sizeof...(Rest) > 0) prefetch_unit<kIndex + 1, Rest...>(args, unit - S::kUnits, first, steps, lanes);
        return;
    }
    S::prefetch(args.weights[kIndex], unit, 4 * first, ceil_div(min(steps, 8), 2), lanes);
}
template <class... S>
__device__ __forceinline__ void prefetch(SegmentList<S...>, const MatmulArgs& args, int unit, int first, int steps, int lanes) {
    prefetch_unit<0, S...>(args, unit, first, steps, lanes);
}

// Where a row of the block's slice begins among (SLICES, rows).
__device__ __forceinline__ size_t of_slice(const MatmulArgs& args, int row) {
    return static_cast<size_t>(blockIdx.x % SLICES) * args.rows + row;
}

// The scale of row `i` of the block's pass. They are kept in shared memory until there are sums: stores between would have
// each wait for the one before.
__device__ __forceinline__ float read_scale(const MatmulArgs& args, int i) {
    return args.scales[of_slice(args, min(static_cast<int>(blockIdx.y) * PASS + i, args.rows - 1))];
}
