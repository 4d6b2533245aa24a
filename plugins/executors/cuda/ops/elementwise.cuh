// Activation functions, by the names of `mortice.core.model.operators.Activation`.
#pragma once

#include "common.cuh"

enum ActivationKind { kIdentity, kSilu, kGeluTanh, kGeluErf, kRelu, kReluSquared };

template <int kKind>
__device__ __forceinline__ float activate(float x) {
    if constexpr (kKind == kSilu) return x / (1.f + __expf(-x));
    if constexpr (kKind == kGeluTanh) return 0.5f * x * (1.f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    if constexpr (kKind == kGeluErf) return 0.5f * x * (1.f + erff(x * 0.7071067812f));
    if constexpr (kKind == kRelu) return fmaxf(x, 0.f);
    if constexpr (kKind == kReluSquared) return fmaxf(x, 0.f) * fmaxf(x, 0.f);
    return x;
}
