// Which rows of a step attend together: runs of neighbouring rows at neighbouring positions of one sequence, within
// tiles of RUN_TILE (compile-time) rows. attention_prefill.cu takes runs of at least kLeastRun rows, attention.cu the rest.
#pragma once

#include "kv_cache.cuh"

#ifndef RUN_TILE
#define RUN_TILE 0
#endif
constexpr int kRunTile = RUN_TILE;  // at most 32, the lanes of a warp
constexpr int kLeastRun = 4;

#if RUN_TILE > 0
// Bit i: row `first` + i goes on where the row before it in the tile is. All lanes of a warp call.
__device__ __forceinline__ uint32 rows_that_go_on(const StepRows& rows, int first, int count) {
    const int i = threadIdx.x % kWarp, row = first + i;
    bool goes_on = false;
    if (i > 0 && i < count) {
        goes_on = rows.tables[row] == rows.tables[row - 1] && rows.positions[row] == rows.positions[row - 1] + 1;
    }
    return __ballot_sync(kFullMask, goes_on);
}

// One past the last row of the run that row i is in.
__device__ __forceinline__ int run_end(uint32 going_on, int i, int count) {
    const uint32 after = i + 1 < 32 ? ~going_on >> (i + 1) : 0u;  // ones where a run begins
    return after == 0 ? count : min(count, i + __ffs(after));
}
__device__ __forceinline__ int run_begin(uint32 going_on, int i) {
    return 31 - __clz((~going_on | 1u) & (0xffffffffu >> (31 - i)));
}
#endif

// Whether row `row` of `rows` is in a run that attends together. All lanes of a warp call.
__device__ __forceinline__ bool is_in_run(const StepRows& rows, int row, int row_count) {
#if RUN_TILE > 0
    const int tile = row / kRunTile * kRunTile, count = min(kRunTile, row_count - tile);
    const uint32 going_on = rows_that_go_on(rows, tile, count);
    return run_end(going_on, row - tile, count) - run_begin(going_on, row - tile) >= kLeastRun;
#else
    return false;
#endif
}
