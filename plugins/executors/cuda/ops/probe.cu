// Every chunk of a weight through its traits: `load` with `dot` and `dequantise4`.
//
// Compile-time: WEIGHT, a Tile<type, tile rows, tile columns>; QTYPE, its type; COLS columns; MEMORY, GlobalStream or
// SharedTile (whose loads work on any memory).
#include "activations.cuh"
#include "tile.cuh"

template <class Q>
__device__ __forceinline__ float probe_dot(const typename Q::Weight32& w, const int8* q, float scale) {
    if constexpr (Q::kIntegerDot) {
        Activation32 x{};
        x.low = *reinterpret_cast<const uint4*>(q);
        x.high = *reinterpret_cast<const uint4*>(q + 16);
        x.scale = scale;
        int low = 0, high = 0;
        for (int i = 0; i < 16; ++i) low += q[i], high += q[16 + i];
        x.sums = (static_cast<uint32>(low) & 0xffffu) | static_cast<uint32>(high) << 16;
        return Q::dot(w, x);
    }
    return __int_as_float(0x7fc00000);  // not a number: products of this type are made of its values
}

template <class Q, class = void>
struct SignedBytes {
    static constexpr bool value = false;
};
template <class Q>
struct SignedBytes<Q, decltype(void(Q::kSigned))> {
    static constexpr bool value = Q::kSigned;
};

// Whether `affine`, where a type has it, makes of its integers what `dequantise4` gives, but for rounding.
template <class Q, class = void>
struct Affine {
    static __device__ bool agrees(const typename Q::Weight32&, int, const float*) { return true; }
};
template <class Q>
struct Affine<Q, decltype(void(Q::affine))> {
    static __device__ bool agrees(const typename Q::Weight32& w, int group, const float* values) {
        const float2 affine = Q::affine(w, group / 4);
        const uint32 bytes = Q::integers4(w, group);
        for (int i = 0; i < 4; ++i) {
            const uint32 byte = bytes >> (8 * i) & 0xffu;
            const float integer = SignedBytes<Q>::value ? static_cast<int8>(byte) : static_cast<float>(byte);
            const float product = affine.x * integer, off = fabsf(product + affine.y - values[i]);
            if (!(off <= 1e-6f * (fabsf(product) + fabsf(affine.y)))) return false;
        }
        return true;
    }
};

// values: (rows, COLS), no numbers where `affine` disagrees; products: (rows, COLS / 32), of each chunk with the activations q[COLS] * scales[COLS / 32].
extern "C" __global__ void probe(const uint8* tiles, const int8* q, const float* scales, float* values, float* products,
                                 int rows) {
    using T = WEIGHT;
    constexpr int kRowChunks = COLS / 32, kTilesAcross = COLS / T::kCols;
    for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < rows * kRowChunks; at += gridDim.x * blockDim.x) {
        const int row = at / kRowChunks, column = at % kRowChunks;
        const int index = row / T::kRows * kTilesAcross + column / T::kRowChunks;
        const uint8* tile = tiles + static_cast<uint64>(index) * T::kBytes;
        const auto w = T::template load<MEMORY>(tile, row % T::kRows, column % T::kRowChunks);
#pragma unroll
        for (int group = 0; group < 8; ++group) {
            const float4 v = QTYPE::dequantise4(w, group);
            float* to = values + 32 * static_cast<uint64>(at) + 4 * group;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            if (!Affine<QTYPE>::agrees(w, group, to)) to[0] = __int_as_float(0x7fc00000);
        }
        products[at] = probe_dot<QTYPE>(w, q + 32 * column, scales[column]);
    }
}
