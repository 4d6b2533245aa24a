// The types of CUDA that kernels use, in C++, for running them without a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

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

template <class To, class From>
To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }

struct __half { unsigned short bits; };
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
    const int sign = h.bits >> 15, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    float value;
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    else if (exponent == 0) value = std::ldexp(static_cast<float>(fraction), -24);
    else value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return sign ? -value : value;
}

// To the nearest, ties to even.
inline __half __float2half_rn(float value) {
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size != size) return {0x7fff};
    if (size == 0.f) return {sign};
    if (size >= 65520.f) return {static_cast<unsigned short>(sign | 0x7c00)};
    int exponent;
    std::frexp(size, &exponent);                          // size < 2^exponent
    const int unit = std::max(exponent - 11, -24);        // of the last place
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
    return {static_cast<unsigned short>(sign + ((unit + 24) << 10) + steps)};  // a carry moves on to the exponent
}

inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
    }
    return c;
}

// The two halves of a, signed, times the two low bytes of b, signed.
inline int __dp2a_lo(int a, int b, int c) {
    for (int i = 0; i < 2; ++i) c += static_cast<short>(a >> (16 * i)) * static_cast<signed char>(b >> (8 * i));
    return c;
}

// Byte i of the result is byte (selectors >> 4 * i & 7) of the eight in high:low.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned selector = selectors >> (4 * i) & 7u;
        result |= ((selector & 4u ? high : low) >> (8 * (selector & 3u)) & 0xffu) << (8 * i);
    }
    return result;
}
// The low word of (high:low) >> (shift % 32).
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift % 32));
}

template <class T>
inline T __ldg(const T* p) { return *p; }
