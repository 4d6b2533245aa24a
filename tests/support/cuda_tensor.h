// What ops/mma.cuh and ops/wgmma.cuh do with tensor cores and shared memory and ops/bulk_copy.cuh with copies, in C++, for kernels whose
// threads work together. Stands in for cuda_fp16.h; the text of those headers is left out. Dynamic shared memory is
// `arena`.
#pragma once

#include "cuda_threads.h"

#define __align__(n) alignas(n)
#define __constant__ static

alignas(128) static thread_local unsigned char arena[256 << 10];

inline unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }

inline uint4 __ldcg(const uint4* p) { return *p; }
inline float2 __ldcg(const float2* p) { return *p; }

struct __half2 { __half x, y; };
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return __floats2half2_rn(std::fma(__half2float(a.x), __half2float(b.x), __half2float(c.x)),
                             std::fma(__half2float(a.y), __half2float(b.y), __half2float(c.y)));
}

inline int __ffs(unsigned word) { return __builtin_ffs(static_cast<int>(word)); }
inline int __clz(unsigned word) { return word ? __builtin_clz(word) : 32; }

// What each lane of a warp puts out, for all of it to read; two by turns, see `from_lane`.
struct Published {
    unsigned words[2][32][8];
};
template <class Read>
void with_all_lanes(const unsigned* words, int count, Read read) {
    static thread_local Published warps[32];
    auto& turn = warps[threadIdx.x / 32].words[running->warps[threadIdx.x / 32].met & 1];
    std::memcpy(turn[threadIdx.x % 32], words, count * sizeof *words);
    meet_in_warp();
    read(turn);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned mine = vote, result = 0;
    with_all_lanes(&mine, 1, [&](auto& words) {
        for (int lane = 0; lane < 32; ++lane) result |= words[lane][0] << lane;
    });
    return result;
}

inline float half_of(unsigned word, int which) {
    return __half2float({static_cast<unsigned short>(which ? word >> 16 : word & 0xffffu)});
}
inline unsigned half2_word(float low, float high) {
    return __float2half_rn(low).bits | static_cast<unsigned>(__float2half_rn(high).bits) << 16;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
inline void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    with_all_lanes(words, 6, [&](auto& all) {
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = sums[i];
            for (int k = 0; k < 16; ++k) {
                const unsigned left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                const unsigned right = all[column * 4 + k % 8 / 2][4 + k / 8];
                sum += static_cast<double>(half_of(left, k % 2)) * half_of(right, k % 2);
            }
            sums[i] = static_cast<float>(sum);
        }
    });
}

// PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16" and "Shared Memory Matrix Layout" without swizzling: what one
// warp has of a warpgroup's products.
inline unsigned long long matrix_at(unsigned address, unsigned along_k, unsigned along_columns) {
    return address / 16 | static_cast<unsigned long long>(along_k / 16) << 16 |
           static_cast<unsigned long long>(along_columns / 16) << 32;
}
template <int kTiles>
void wgmma_k16(float (&sums)[kTiles][4], const unsigned (&a)[4], unsigned long long b, bool adds) {
    const unsigned start = b % (1 << 14) * 16, along_k = b >> 16 & 0x3fff, along_columns = b >> 32 & 0x3fff;
    with_all_lanes(a, 4, [&](auto& all) {
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4 * kTiles; ++i) {
            const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            double sum = adds ? sums[i / 4][i % 4] : 0.;
            for (int k = 0; k < 16; ++k) {
                const unsigned left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                const unsigned piece = start + 16 * (k / 8 * along_k + column / 8 * along_columns);
                unsigned right;
                std::memcpy(&right, arena + piece + column % 8 * 16 + k % 8 / 2 * 4, 4);
                sum += static_cast<double>(half_of(left, k % 2)) * half_of(right, k % 2);
            }
            sums[i / 4][i % 4] = static_cast<float>(sum);
        }
    });
}
inline void begin_products() {}
inline void end_products() {}
inline void wait_for_products() {}

inline unsigned shared_address(const void* p) {
    return static_cast<unsigned>(static_cast<const unsigned char*>(p) - arena);
}
inline unsigned shared_word(unsigned address) {
    unsigned word;
    std::memcpy(&word, arena + address, 4);
    return word;
}
inline void load_matrices(unsigned (&m)[4], unsigned address) {
    with_all_lanes(&address, 1, [&](auto& all) {
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4; ++i) m[i] = shared_word(all[8 * i + lane / 4][0] + lane % 4 * 4);
    });
}
inline void load_matrices_transposed(unsigned (&m)[4], unsigned address) {
    with_all_lanes(&address, 1, [&](auto& all) {
        const int lane = threadIdx.x % 32, column = lane / 4;
        for (int i = 0; i < 4; ++i) {
            unsigned halves[2];
            for (int j = 0; j < 2; ++j) {
                const unsigned word = shared_word(all[8 * i + lane % 4 * 2 + j][0] + column / 2 * 4);
                halves[j] = column % 2 ? word >> 16 : word & 0xffffu;
            }
            m[i] = halves[0] | halves[1] << 16;
        }
    });
}
inline void copy_async16(unsigned to, const void* from, bool inside) {
    if (inside) std::memcpy(arena + to, from, 16);
    else std::memset(arena + to, 0, 16);
}
inline void end_copies() {}
template <int kStillOpen>
void wait_for_copies() {}

// A barrier of bulk copies: how many phases are over, who asks, and who and how many bytes this one still waits for.
struct Arrivals {
    unsigned short over;
    unsigned char askers, silent;
    int missing;
    void look() {
        if (silent || missing) return;
        ++over;
        silent = askers;
    }
};
inline Arrivals& arrivals_of(const unsigned long long* barrier) {
    return *reinterpret_cast<Arrivals*>(const_cast<unsigned long long*>(barrier));
}
inline void start_barrier(unsigned long long* barrier, int askers = 1) {
    const auto count = static_cast<unsigned char>(askers);
    arrivals_of(barrier) = {0, count, count, 0};
}
inline void publish_barriers() {}
inline unsigned long long read_once_policy() { return 0; }
inline void expect_bytes(unsigned long long* barrier, unsigned bytes) {
    Arrivals& arrivals = arrivals_of(barrier);
    arrivals.missing += static_cast<int>(bytes);
    --arrivals.silent;
    arrivals.look();
}
inline void arrive_for_part(int barrier, int threads, int) {
    Meeting& meeting = running->parts[barrier];
    if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.met;
}
inline void wait_for_part(int barrier, int threads) { meet(running->parts[barrier], threads); }
inline void arrive(unsigned long long* barrier) { expect_bytes(barrier, 0); }
inline void copy_bulk(unsigned char* to, const unsigned char* from, unsigned bytes, unsigned long long* barrier, unsigned long long) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    std::memcpy(to, from, bytes);
    Arrivals& arrivals = arrivals_of(barrier);
    arrivals.missing -= static_cast<int>(bytes);
    arrivals.look();
}
inline void copy_bulk(unsigned char* to, const unsigned char* from, unsigned bytes, unsigned long long* barrier) {
    copy_bulk(to, from, bytes, barrier, 0);
}
inline void wait_arrival(const unsigned long long* barrier, unsigned parity) {
    while (arrivals_of(barrier).over % 2 == parity) change_over();
}
