// Rotary positions.
#pragma once

#include "common.cuh"

// Cosine and sine of an angle of position * frequency, times `magnitude`. The product is taken in double and reduced to
// one turn there, because a position of 100,000 leaves float32 three digits after the point.
__device__ __forceinline__ float2 rope_turn(int position, double frequency, float magnitude) {
    double turns = position * frequency * 0.15915494309189535;  // 1 / 2 pi
    turns -= floor(turns);
    float sine, cosine;
    sincospif(2.f * static_cast<float>(turns), &sine, &cosine);
    return make_float2(cosine * magnitude, sine * magnitude);
}
