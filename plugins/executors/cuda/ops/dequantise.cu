// Tiles to a row-major matrix of halves or floats, (rows, COLS): what cuBLAS multiplies with in prefill.
//
// A lane expands one chunk. A warp's 32 chunks go through shared memory, so that its stores are whole runs of 512
// bytes; the parts of a chunk (16 bytes each) are permuted there, so that neither side meets a bank twice.
//
// `tiles` is the place of the first of `row_groups` row groups, `out` that of its first row; 16-byte aligned.
//
// Compile-time: WEIGHT, a Tile<type, tile rows, tile columns>; QTYPE, its type; COLS columns; OUT, __half or float.
#include "activations.cuh"
#include "tile.cuh"

constexpr int kDequantiseWarps = 8;

// 16 bytes of output: part `part` of a chunk.
template <class Q, class Out>
__device__ __forceinline__ uint4 expand_part(const typename Q::Weight32& w, int part) {
    if constexpr (sizeof(Out) == 4) {
        const float4 v = Q::dequantise4(w, part);
        return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
    } else {
        const float4 a = Q::dequantise4(w, 2 * part), b = Q::dequantise4(w, 2 * part + 1);
        const __half2 h[4] = {__floats2half2_rn(a.x, a.y), __floats2half2_rn(a.z, a.w), __floats2half2_rn(b.x, b.y),
                              __floats2half2_rn(b.z, b.w)};
        return *reinterpret_cast<const uint4*>(h);
    }
}

extern "C" __global__ void __launch_bounds__(32 * kDequantiseWarps)
    dequantise(const uint8* tiles, OUT* out, int row_groups) {
    using T = WEIGHT;
    using Q = QTYPE;
    constexpr int kParts = 32 * sizeof(OUT) / 16, kSpread = 8 / kParts;
    constexpr uint32 kTilesAcross = COLS / T::kCols;
    __shared__ uint4 parts[kDequantiseWarps][kWarp * kParts];
    uint4* mine = parts[threadIdx.x / kWarp];
    const uint32 lane = threadIdx.x % kWarp;
    const uint32 count = static_cast<uint32>(row_groups) * kTilesAcross * T::kChunks;
    const uint32 warps = gridDim.x * kDequantiseWarps;

    let_next_kernel_start();
    wait_for_previous_kernel();
    for (uint32 first = (blockIdx.x * kDequantiseWarps + threadIdx.x / kWarp) * kWarp; first < count;
         first += warps * kWarp) {
        if (first + lane < count) {
            const uint32 index = (first + lane) / T::kChunks, chunk = (first + lane) % T::kChunks;
            const uint8* tile = tiles + static_cast<uint64>(index) * T::kBytes;
            const auto w = Q::template load<GlobalStream, T::kElements>(tile, static_cast<int>(chunk));
#pragma unroll
            for (uint32 part = 0; part < kParts; ++part) {
                mine[lane * kParts + (part ^ (lane / kSpread) % kParts)] = expand_part<Q, OUT>(w, part);
            }
        }
        __syncwarp();
#pragma unroll
        for (uint32 step = 0; step < kParts; ++step) {
            const uint32 at = step * kWarp + lane, source = at / kParts, part = at % kParts;
            if (first + source < count) {
                const uint32 index = (first + source) / T::kChunks, chunk = (first + source) % T::kChunks;
                const uint32 row = index / kTilesAcross * T::kRows + chunk / T::kRowChunks;
                const uint32 row_chunk = index % kTilesAcross * T::kRowChunks + chunk % T::kRowChunks;
                uint4* to = reinterpret_cast<uint4*>(out + static_cast<uint64>(row) * COLS + row_chunk * 32);
                to[part] = mine[source * kParts + (part ^ (source / kSpread) % kParts)];
            }
        }
        __syncwarp();
    }
}
