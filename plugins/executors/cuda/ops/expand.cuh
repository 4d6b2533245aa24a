// Elements of quantised weights as halves, for tensor cores.
#pragma once

#include "mma.cuh"

// A type may say how its integers become values (`affine`, and `kSigned` where integers4 gives signed bytes); the
// conversion is then done on pairs of halves, with a third of the instructions of dequantise4.
template <class Q, class = void>
struct Expand {
    static __device__ __forceinline__ uint2 halves4(const typename Q::Weight32& w, int group) {
        const float4 v = Q::dequantise4(w, group);
        return make_uint2(half2_word(v.x, v.y), half2_word(v.z, v.w));
    }
};

template <class Q, class = void>
constexpr bool kHasSignedBytes = false;
template <class Q>
constexpr bool kHasSignedBytes<Q, decltype(void(Q::kSigned))> = Q::kSigned;

template <class Q>
struct Expand<Q, decltype(void(Q::affine))> {
    // A byte below 0x64 is the half 1024 + byte; 1024 is taken off again, exactly, before the rounding product.
    static __device__ __forceinline__ uint32 pair(uint32 bytes, uint32 selectors, __half2 bias, __half2 scale, __half2 offset) {
        const uint32 bits = __byte_perm(bytes, 0x64646464u, selectors);
        const __half2 integers = __hsub2(*reinterpret_cast<const __half2*>(&bits), bias);
        const __half2 values = __hfma2(integers, scale, offset);
        return *reinterpret_cast<const uint32*>(&values);
    }

    static __device__ __forceinline__ uint2 halves4(const typename Q::Weight32& w, int group) {
        const float2 affine = Q::affine(w, group / 4);
        const __half2 scale = __float2half2_rn(affine.x), offset = __float2half2_rn(affine.y);
        uint32 bytes = Q::integers4(w, group);
        if constexpr (kHasSignedBytes<Q>) bytes ^= 0x80808080u;  // plus 128
        const __half2 bias = __float2half2_rn(kHasSignedBytes<Q> ? 1152.f : 1024.f);
        return make_uint2(pair(bytes, 0x4140, bias, scale, offset), pair(bytes, 0x4342, bias, scale, offset));
    }
};
