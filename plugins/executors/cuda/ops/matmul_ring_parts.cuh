// What matmul_ring.cu is made for and its arguments. The compile-time constants are matmul_ring.cu's.
#pragma once

#include "activations.cuh"
#include "norm.cuh"
#include "tile.cuh"

constexpr int kMaxSegments = 4;
constexpr int kUnitRows = 16;
constexpr int kTiles = PASS / 8;
constexpr int kThreads = (WARPS + HELPERS) * kWarp;
constexpr int kFirstAsker = HELPERS > 0 ? WARPS : 0, kAskers = HELPERS > 0 ? HELPERS : WARPS;  // warps that ask and add
constexpr int kEarlySlots = SLOTS > EARLY ? EARLY : SLOTS;
constexpr int kHelpersMeet = 1, kInputRead = 2;  // named barriers

// Lanes of a warp that arrive at a barrier in shared memory: one, when all have come to it. compute-sanitizer's racecheck
// follows such barriers lane by lane and knows nothing of what a warp's lanes have seen of each other: under it all arrive.
#ifndef ARRIVING_LANES
#define ARRIVING_LANES 1
#endif
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

// Sums of the warps, written for a unit while those of the one before are still read: (buffers, parts, warps, rows of x, 16
// and some room against bank conflicts).
constexpr int kSumBuffers = 2;
constexpr int kSumsRow = kUnitRows + 4;
constexpr int kSumsWarp = PASS * kSumsRow + 8;
constexpr int kSumsPart = WARPS * kSumsWarp;
constexpr int kStageBytes = 2048;  // of a warp; the sums come later
constexpr int kSumsBytes = ceil_div(largest(kSumBuffers * kParts * kSumsPart * 4, WARPS * kStageBytes), 128) * 128;

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
