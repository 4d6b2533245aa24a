// What follows products of tensor cores: the sums of all slices, a factor of each row, bias, activation, gate, residual.
//
// Compile-time: SLICES; NORM_COLS: where RMS norm's factor has been left, the columns of the products' input, else 0; GATED
// (two parts of equal shape, gate and up, give one); ACTIVATION.
#pragma once

#include "elementwise.cuh"

constexpr int kMaxParts = 4;

// Neighbouring columns of the products that belong to one weight.
struct Part {
    const float* bias;      // of the first column, or null
    const float* residual;  // (rows, stride), at the first column, or null
    float* out;             // (rows, stride), at the first column
    int columns;
    int stride;
};

struct FinishArgs {
    const float* products;  // (SLICES, rows, width): the columns of the parts, one after the other
    const float* scales;    // (rows,), or null where the products are whole; not read where NORM_COLS
    const float* squares;   // (SLICES, rows): sums of them, of the products' input; read where NORM_COLS
    float norm_eps;
    int rows;
    int width;
    Part parts[kMaxParts];
};

// Neighbouring columns that a thread takes at once.
template <int kCount>
struct alignas(4 * kCount) Values {
    float v[kCount];
};

template <int kCount>
__device__ __forceinline__ Values<kCount> read(const float* p) {
    return *reinterpret_cast<const Values<kCount>*>(p);
}

// Which columns of a part a thread takes: kCount at a time, its own of every `stride`.
template <int kCount>
struct Share {
    int first, stride, columns;

    __device__ __forceinline__ int column(int i) const { return (first + i * stride) * kCount; }
    __device__ __forceinline__ bool holds(int i) const { return column(i) < columns; }
};

// What the sums of a row are still to be multiplied with. All that is read here and below is asked for before any of it is
// used, for it comes from far.
struct RowFactor {
    float of[NORM_COLS > 0 ? SLICES : 1];

    __device__ __forceinline__ void ask(const FinishArgs& args, int row) {
        if constexpr (NORM_COLS > 0) {
#pragma unroll
            for (int slice = 0; slice < SLICES; ++slice) of[slice] = args.squares[slice * args.rows + row];
        } else {
            of[0] = args.scales == nullptr ? 1.f : args.scales[row];
        }
    }
    __device__ __forceinline__ float value(const FinishArgs& args) const {
        if constexpr (NORM_COLS == 0) return of[0];
        float squares = 0.f;
        for (float part : of) squares += part;
        return rsqrtf(squares * (1.f / (NORM_COLS > 0 ? NORM_COLS : 1)) + args.norm_eps);
    }
};

// A thread's share of the products of the part that begins at column `start`.
template <int kCount, int kTimes>
struct PartSums {
    // slices under way together, as far as registers allow
    static constexpr int kMost = kTimes > 2 ? 1 : 16 / (kTimes * (GATED ? 2 : 1));
    static constexpr int kAtOnce = SLICES < kMost ? SLICES : kMost;
    Values<kCount> slices[kAtOnce][kTimes];
    Values<kCount> shift[kTimes] = {};
    const float* from;

    __device__ __forceinline__ void ask(const FinishArgs& args, int row, int start, const float* bias, const Share<kCount>& share) {
        from = args.products + static_cast<size_t>(row) * args.width + start;
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            if (!share.holds(i)) continue;
            if (bias != nullptr) shift[i] = read<kCount>(bias + share.column(i));
#pragma unroll
            for (int slice = 0; slice < kAtOnce; ++slice) slices[slice][i] = read<kCount>(of(args, slice) + share.column(i));
        }
    }
    // Complete but for what is done with them.
    __device__ __forceinline__ void sum(const FinishArgs& args, float factor, const Share<kCount>& share,
                                        Values<kCount> (&sums)[kTimes]) const {
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            if (!share.holds(i)) continue;
            sums[i] = slices[0][i];
#pragma unroll
            for (int slice = 1; slice < kAtOnce; ++slice) add(sums[i], slices[slice][i]);
        }
#pragma unroll 1
        for (int slice = kAtOnce; slice < SLICES; ++slice) {
#pragma unroll
            for (int i = 0; i < kTimes; ++i) {
                if (share.holds(i)) add(sums[i], read<kCount>(of(args, slice) + share.column(i)));
            }
        }
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            if (!share.holds(i)) continue;
#pragma unroll
            for (int j = 0; j < kCount; ++j) sums[i].v[j] = sums[i].v[j] * factor + shift[i].v[j];
        }
    }

private:
    __device__ __forceinline__ const float* of(const FinishArgs& args, int slice) const {
        return from + static_cast<size_t>(slice) * args.rows * args.width;
    }
    static __device__ __forceinline__ void add(Values<kCount>& sum, const Values<kCount>& other) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum.v[j] += other.v[j];
    }
};

// The results of a thread's share of the part that begins at column `start` of the products; stores them too. What the
// thread does not hold is left as it is.
template <int kCount, int kTimes>
__device__ __forceinline__ void finish(const FinishArgs& args, int row, const Part& part, int start,
                                       const Share<kCount>& share, Values<kCount> (&results)[kTimes]) {
    Values<kCount> residuals[kTimes] = {};
    RowFactor factor;
    PartSums<kCount, kTimes> first, second;
    factor.ask(args, row);
    if (part.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            if (share.holds(i)) residuals[i] = read<kCount>(part.residual + static_cast<size_t>(row) * part.stride + share.column(i));
        }
    }
    first.ask(args, row, start, part.bias, share);
    if constexpr (GATED) second.ask(args, row, part.columns, args.parts[1].bias, share);
    const float scale = factor.value(args);
    first.sum(args, scale, share, results);
    if constexpr (GATED) {
        Values<kCount> up[kTimes];
        second.sum(args, scale, share, up);
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            if (!share.holds(i)) continue;
#pragma unroll
            for (int j = 0; j < kCount; ++j) results[i].v[j] = activate<ACTIVATION>(results[i].v[j]) * up[i].v[j];
        }
    }
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
        if (!share.holds(i)) continue;
        if constexpr (!GATED && ACTIVATION != kIdentity) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) results[i].v[j] = activate<ACTIVATION>(results[i].v[j]);
        }
        if (part.residual != nullptr) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) results[i].v[j] += residuals[i].v[j];
        }
        *reinterpret_cast<Values<kCount>*>(part.out + static_cast<size_t>(row) * part.stride + share.column(i)) = results[i];
    }
}
