// What gemv.cu is made for and its arguments: segments, units of work. The compile-time constants are gemv.cu's.
#pragma once

#include "activations.cuh"
#include "tile.cuh"

struct SegmentArgs {
    const uint8* weight;
    const float* bias;      // (rows,) or null
    const float* residual;  // (tokens, rows) or null
    float* out;             // (tokens, rows)
};

constexpr int kMaxSegments = 4;

// Where LEFT_RUNS is not 0: what attend.cu split the context of the input by.
struct LeftArgs {
    float* partial;
    const int* position;
    int window, splits;
};

struct GemvArgs {
    const float* x;            // (tokens, columns)
    const float* norm_weight;  // (columns,)
    const float* norm_bias;    // (columns,) or null
    float norm_eps;
    SegmentArgs segments[kMaxSegments];
    LeftArgs left;
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

template <class... S>
constexpr int units(SegmentList<S...>) {
    if constexpr (!GATED) return (S::kGroups + ...);
    int fewest = 1 << 30;
    ((fewest = S::kGroups < fewest ? S::kGroups : fewest), ...);
    return fewest;
}
constexpr int kUnits = units(Segments{});
constexpr int kWarps = THREADS / kWarp;
