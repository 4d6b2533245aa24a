// Single instructions that C++ has no name for.
#pragma once

#ifdef __CUDA_ARCH__  // not where kernels run on the CPU

// The larger, or NaN where one is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// 1 / x within one unit of the last place.
__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

#else

inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
inline float reciprocal(float x) { return 1.f / x; }

#endif
