// The runs of pages that attend.cu splits a token's context into, a block each, and what blocks leave of them where there
// are several: for attend.cu itself, and for the product that reads its result.
#pragma once

#include "kv_cache.cuh"

constexpr int kMostLeftPages = 4;  // of a run, for the sake of leaving all runs: more take longer than a join

struct ContextRuns {
    int begin;              // the first position
    int first_page, pages;  // of the sequence
    int each, used;         // pages of a run, runs

    // Of `least` pages at least, `most` runs at most, and no more than `left`, which the reader joins, where that does not
    // make them long; a window of 0 is none.
    __device__ __forceinline__ ContextRuns(int position, int window, int least, int most, int left) {
        begin = window > 0 ? max(0, position + 1 - window) : 0;
        first_page = begin / kPageTokens, pages = position / kPageTokens + 1 - first_page;
        each = max(least, ceil_div(pages, most));
        if (left > 0 && pages <= left * kMostLeftPages) each = max(each, ceil_div(pages, left));
        used = ceil_div(pages, each);
    }
};

// Sums of all query heads, (most, width), then of each run and head its maximum and total.
template <int kHeadDim>
struct RunSums {
    float* memory;
    int most, width;  // runs, heads * kHeadDim

    __device__ __forceinline__ RunSums of_row(int row) const {
        return {memory + static_cast<size_t>(row) * most * (width + 2 * (width / kHeadDim)), most, width};
    }
    __device__ __forceinline__ float* of(int run) const { return memory + run * width; }
    __device__ __forceinline__ float2* peaks(int run) const {
        return reinterpret_cast<float2*>(memory + most * width) + run * (width / kHeadDim);
    }
};
