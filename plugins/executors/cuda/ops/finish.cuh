// What follows products of tensor cores: the sums of all slices, the scale of each row, bias, activation, gate, residual.
//
// Compile-time: GATED (two parts of equal shape, gate and up, give one), ACTIVATION.
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
    const float* products;  // (slices, rows, width): the columns of the parts, one after the other
    const float* scales;    // (rows,), or null where the products are whole
    int slices;
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

// The products of the part that begins at column `start`, complete but for what is done with them. All loads of a slice
// are under way together.
template <int kCount, int kTimes>
__device__ __forceinline__ void scaled_sums(const FinishArgs& args, int row, int start, const float* bias,
                                            const Share<kCount>& share, Values<kCount> (&sums)[kTimes]) {
    const float* p = args.products + static_cast<size_t>(row) * args.width + start;
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
        if (share.holds(i)) sums[i] = read<kCount>(p + share.column(i));
    }
#pragma unroll(kTimes > 2 ? 1 : 4)
    for (int slice = 1; slice < args.slices; ++slice) {
        p += static_cast<size_t>(args.rows) * args.width;
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            if (!share.holds(i)) continue;
            const auto other = read<kCount>(p + share.column(i));
#pragma unroll
            for (int j = 0; j < kCount; ++j) sums[i].v[j] += other.v[j];
        }
    }
    const float scale = args.scales == nullptr ? 1.f : args.scales[row];
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
        if (!share.holds(i)) continue;
        Values<kCount> shift{};
        if (bias != nullptr) shift = read<kCount>(bias + share.column(i));
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[i].v[j] = sums[i].v[j] * scale + shift.v[j];
    }
}

// The results of a thread's share of the part that begins at column `start` of the products; stores them too. What the
// thread does not hold is left as it is.
template <int kCount, int kTimes>
__device__ __forceinline__ void finish(const FinishArgs& args, int row, const Part& part, int start,
                                       const Share<kCount>& share, Values<kCount> (&results)[kTimes]) {
    scaled_sums(args, row, start, part.bias, share, results);
    if constexpr (GATED) {
        Values<kCount> up[kTimes];
        scaled_sums(args, row, part.columns, args.parts[1].bias, share, up);
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
        const size_t at = static_cast<size_t>(row) * part.stride + share.column(i);
        if (part.residual != nullptr) {
            const auto other = read<kCount>(part.residual + at);
#pragma unroll
            for (int j = 0; j < kCount; ++j) results[i].v[j] += other.v[j];
        }
        *reinterpret_cast<Values<kCount>*>(part.out + at) = results[i];
    }
}
