// The KV cache: pages of kPageTokens tokens. A page of a layer holds, for each KV head, K (or V) of its tokens, head_dim
// elements each. A sequence is a table of page numbers, so that its pages may lie anywhere and be shared.
#pragma once

#include "common.cuh"

constexpr int kPageTokens = 64;

// What a step knows of its tokens, one entry a row. Written by the host before the step, or by the step before it.
struct StepRows {
    const int* token_ids;
    const int* positions;
    const int* tables;     // row -> first entry of its sequence's page table in `pages`
    const int* pages;      // page numbers of all sequences
};

// The K (or V) of `head` at `position`, in elements from the start of the layer's cache.
__device__ __forceinline__ size_t kv_offset(const StepRows& rows, int row, int position, int head, int kv_heads, int head_dim) {
    const int page = rows.pages[rows.tables[row] + position / kPageTokens];
    return ((static_cast<size_t>(page) * kv_heads + head) * kPageTokens + position % kPageTokens) * head_dim;
}
