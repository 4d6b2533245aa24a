// What attend.cu is made for, its arguments, and what a block attends to. The compile-time constants are attend.cu's.
#pragma once

#include "context_runs.cuh"
#include "kv_stage.cuh"
#include "norm.cuh"
#include "rope.cuh"

constexpr int kThreads = THREADS;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPairs = DIMS / 2;

constexpr int kMostAhead = 2;
constexpr int kAheadPiece = 2048;

// A part of a weight of the launch after next, in pieces of kAheadPiece bytes: for blocks that ask at once, and late.
struct Ahead {
    const uint8* start;
    int pieces, late_pieces;
};

struct AttendArgs {
    const float* q;  // (rows, KV_HEADS * GROUP, HEAD_DIM)
    const float* k;  // (rows, KV_HEADS, HEAD_DIM)
    const float* v;
    KV* keys;  // the layer's cache
    KV* values;
    float* out;      // like q
    float* partial;  // of each row RunSums of `splits`
    int* arrivals;   // (rows, KV_HEADS), zero before and after
    const float* q_norm;  // (HEAD_DIM,)
    const float* k_norm;
    const double* frequencies;  // (DIMS / 2,)
    StepRows rows;
    float q_eps, k_eps;
    float magnitude;
    float scale;
    float softcap;
    int window;
    int splits;     // runs of a context at most
    int left_runs;  // so many at most are left to who reads the result; 0 for none
    Ahead ahead[kMostAhead];
};

// The heads of a group in shared memory as they were brought: queries, then K and V of the step's own token.
struct Heads {
    alignas(16) float rows[GROUP + 2][HEAD_DIM];
};

// What a block attends to.
struct Run {
    int first_page, pages;  // of the sequence
    int from, to;           // positions in the cache: those of the step's own token and later ones are not
    bool brings;            // and the own token, which is at `to`
};
