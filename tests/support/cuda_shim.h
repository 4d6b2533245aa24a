// The little of CUDA that the traits headers and ops/repack.cu use, in C++: the same text then runs without a GPU.
// Stands in for cuda_fp16.h. One thread of one block: grid-stride loops do all the work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __host__
#define __constant__ static
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct int2 { int x, y; };
struct short2 { short x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline short2 make_short2(short x, short y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static const dim3 blockDim{}, gridDim{}, blockIdx{0, 0, 0}, threadIdx{0, 0, 0};

struct __half { unsigned short bits; };
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float __half2float(__half h) {
    const int sign = h.bits >> 15, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    float value;
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    else if (exponent == 0) value = std::ldexp(static_cast<float>(fraction), -24);
    else value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return sign ? -value : value;
}

template <class T>
inline T __ldg(const T* p) { return *p; }

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
    }
    return c;
}

// The low word of (high:low) >> (shift % 32).
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift % 32));
}

inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }

// There are no other lanes here; what asks for them must not be called.
template <class T>
T __shfl_xor_sync(unsigned, T, int) { std::abort(); }
inline void __syncthreads() {}
