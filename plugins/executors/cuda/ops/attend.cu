// Attention of one token with what lies before it, in one launch: the norm of the heads of Q and K, RoPE, the write of K
// and V to the paged cache. The same as place.cu and attention.cu do one after the other for many tokens, which this
// cannot: a block waits for no other, and so sees of the step's own tokens only the one it brings itself.
//
// Blocks take a KV head and a split each, heads first. The query heads of a group read K and V together, page by page,
// out of shared memory, where the first pages are asked for before the wait for the kernel before: only Q and the step's
// own K and V come after it. Short contexts are one run of pages; longer ones are split (Flash-Decoding: Dao et al. 2023)
// and joined by the block that comes last. A warp's lanes are shared by kAtOnce positions. Sums are kept with a running
// maximum (Milakov and Gimelshein 2018).
//
// All of it runs twice: while the kernel before is still at work a rehearsal, whose results nobody sees, brings the code
// near. What a token costs here is a chain of short waits, and those for code were among the longest.
//
// Compile-time: those of place.cu (HEAD_DIM, KV_HEADS, DIMS, HALVES, HEAD_NORM, KV) and of attention.cu (GROUP, SPLITS,
// SOFTCAP, WINDOWED), THREADS of a block, and RUN_PAGES, those worth a block of their own.
#include "kv_stage.cuh"
#include "norm.cuh"
#include "rope.cuh"

constexpr int kThreads = THREADS;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerLane = 8;  // elements of a head a lane holds
constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
constexpr int kLanes = HEAD_DIM <= 32 ? 4 : power_of_two_from(HEAD_DIM / kPerLane);  // that share a position; some may idle
constexpr int kAtOnce = kWarp / kLanes;                                               // positions a warp takes at once
// Query heads a warp serves: more than two crowd its registers. Other warps then take the rest of the group.
constexpr int kShares = GROUP > 2 * kWarps ? kWarps : ceil_div(GROUP, 2);
constexpr int kHeads = ceil_div(GROUP, kShares);
constexpr int kTeams = kWarps / kShares;  // of warps that take the same positions
constexpr int kTogether = kTeams * kAtOnce;
constexpr int kTurns = ceil_div(kPageTokens, kTogether);  // of a warp in a page
constexpr int kDepth = kTurns % 2 == 0 ? 2 : 1;           // turns whose scores are taken together
static_assert(HEAD_DIM % kPerLane == 0 && kLanes <= kWarp && kTeams > 0, "a warp holds whole positions");

// Shared memory a block may have, of which the host and other arrays need some (CUDA C++ Programming Guide, "Technical
// Specifications per Compute Capability"). Where rings are (gemv_ring.cuh) a block of a product is to find room beside it.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kMostShared = 227 << 10, kBlocks = 2, kRoom = (110 << 10) - (GROUP + 2) * HEAD_DIM * 4;
#elif __CUDA_ARCH__ == 800
constexpr int kMostShared = 163 << 10, kBlocks = 1, kRoom = kMostShared - (8 << 10) - (GROUP + 2) * HEAD_DIM * 4;
#else
constexpr int kMostShared = 99 << 10, kBlocks = 1, kRoom = kMostShared - (8 << 10) - (GROUP + 2) * HEAD_DIM * 4;
#endif

// Pages in shared memory: as many as there is room for, and one at least.
constexpr int kPage = 2 * page_bytes<KV>(HEAD_DIM);
constexpr int kStages = kRoom / kPage < 1 ? 1 : kRoom / kPage < 8 ? kRoom / kPage : 8;
using Pages = Stages<KV, HEAD_DIM, KV_HEADS, kStages>;
constexpr int kSumsBytes = kTogether * GROUP * HEAD_DIM * 4;  // what the slots of a block found: where pages were

// What a launch has to ask for. Read by the host.
extern "C" __device__ const int shared_bytes = largest(Pages::kBytes, kSumsBytes, kBlocks > 1 ? kLeastShared : 0);

struct AttendArgs {
    const float* q;  // (KV_HEADS * GROUP, HEAD_DIM)
    const float* k;  // (KV_HEADS, HEAD_DIM)
    const float* v;
    KV* keys;  // the layer's cache
    KV* values;
    float* out;      // like q
    float* partial;  // (KV_HEADS, SPLITS, GROUP, HEAD_DIM + 2): sums, maximum, total
    int* arrivals;   // (KV_HEADS,), zero before and after
    const float* q_norm;  // (HEAD_DIM,)
    const float* k_norm;
    const double* frequencies;  // (DIMS / 2,)
    StepRows rows;
    float q_eps, k_eps;
    float magnitude;
    float scale;
    float softcap;
    int window;
    int splits;
};

constexpr int kPairs = DIMS / 2;

struct Shared {
    float q[GROUP][HEAD_DIM];
    alignas(16) float k[HEAD_DIM];  // read four at a time
    alignas(16) float v[HEAD_DIM];
    float top[kTogether][GROUP], total[kTogether][GROUP];
    float all_top[GROUP], all_total[GROUP];
    float2 turns[kPairs > 0 ? kPairs : 1];  // cosine and sine of each pair at the token's position
    uint64 barriers[kStages];
    bool is_last;
};
static_assert(sizeof(Shared) + largest(Pages::kBytes, kSumsBytes) <= kMostShared, "a block's shared memory fits");

struct Running {
    float top = kLowest, total = 0.f;
    float sums[kPerLane] = {};
};

__device__ __forceinline__ bool holds() { return threadIdx.x % kLanes * kPerLane < HEAD_DIM; }
__device__ __forceinline__ int part() { return holds() ? threadIdx.x % kLanes : 0; }

// A head of Q or K, or V's: to shared memory as attention uses it. A warp takes one.
__device__ __forceinline__ void bring_head(const float* from, const float* norm, float eps, const float2* turns, bool is_value, float* to) {
    const int lane = threadIdx.x % kWarp;
    for (int i = lane; i < HEAD_DIM; i += kWarp) to[i] = __ldcg(from + i);  // a rehearsal may have read it before
    __syncwarp();
    if (is_value) return;
    if constexpr (HEAD_NORM != kNoNorm) {
        float mean = 0.f, squares = 0.f;
        if constexpr (HEAD_NORM == kLayerNorm) {
            for (int i = lane; i < HEAD_DIM; i += kWarp) mean += to[i];
            mean = lanes_sum(mean) / HEAD_DIM;
        }
        for (int i = lane; i < HEAD_DIM; i += kWarp) squares += (to[i] - mean) * (to[i] - mean);
        const float inverse = rsqrtf(lanes_sum(squares) / HEAD_DIM + eps);
        for (int i = lane; i < HEAD_DIM; i += kWarp) to[i] = (to[i] - mean) * inverse * norm[i];
        __syncwarp();
    }
    for (int pair = lane; pair < kPairs; pair += kWarp) {
        float& a = to[HALVES ? pair : 2 * pair];
        float& b = to[HALVES ? pair + kPairs : 2 * pair + 1];
        const float2 turn = turns[pair];
        const float2 turned = make_float2(a * turn.x - b * turn.y, a * turn.y + b * turn.x);
        a = turned.x, b = turned.y;
    }
    __syncwarp();
}

__device__ __forceinline__ float score_of(const AttendArgs& args, const float (&q)[kPerLane], const Eight& key) {
    float score = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) score += q[i] * key.v[i];
    score = lanes_sum<kLanes>(score);
    if constexpr (SOFTCAP) score = args.softcap * tanhf(score / args.softcap);
    return score;
}

// The positions of a page, which begins at `start`, that are from `from` to `to` - 1; all lanes of the warp call.
__device__ __forceinline__ void add_page(const AttendArgs& args, const float (&q)[kHeads][kPerLane], KV* keys, KV* values, int start, int slot,
                                         int from, int to, Running (&running)[kHeads]) {
#pragma unroll 1
    for (int turn = 0; turn < kTurns && start + turn * kTogether < to; turn += kDepth) {
        float scores[kDepth][kHeads];
        bool counts[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int token = min((turn + i) * kTogether + slot, kPageTokens - 1), position = start + token;
            counts[i] = (turn + i) * kTogether + slot < kPageTokens && position >= from && position < to;
            const Eight key = kv_load8(kv_row(keys, 0, token, 0, 1, HEAD_DIM), part());
#pragma unroll
            for (int g = 0; g < kHeads; ++g) scores[i][g] = score_of(args, q[g], key);
        }
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
            float top = running[g].top;
#pragma unroll
            for (int i = 0; i < kDepth; ++i) top = fmaxf(top, counts[i] ? scores[i][g] : kLowest);
            const float keep = __expf(running[g].top - top);
            running[g].top = top;
            running[g].total *= keep;
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) running[g].sums[j] *= keep;
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                scores[i][g] = counts[i] ? __expf(scores[i][g] - top) : 0.f;
                running[g].total += scores[i][g];
            }
        }
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int token = min((turn + i) * kTogether + slot, kPageTokens - 1);
            const Eight value = kv_load8(kv_row(values, 0, token, 0, 1, HEAD_DIM), part());
#pragma unroll
            for (int g = 0; g < kHeads; ++g) {
#pragma unroll
                for (int j = 0; j < kPerLane; ++j) {
                    if (counts[i]) running[g].sums[j] += scores[i][g] * value.v[j];  // what was never written may be no number
                }
            }
        }
    }
}

// What each slot of a warp found, to shared memory.
__device__ __forceinline__ void keep(Shared& shared, float* all_sums, int slot, int first_head, const Running (&running)[kHeads]) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
        const int head = first_head + g;
        if (head >= GROUP) continue;
        if (holds()) {
            float4* sums = reinterpret_cast<float4*>(all_sums + (slot * GROUP + head) * HEAD_DIM + part() * kPerLane);
            const float* from = running[g].sums;
            sums[0] = make_float4(from[0], from[1], from[2], from[3]);
            sums[1] = make_float4(from[4], from[5], from[6], from[7]);
        }
        if (threadIdx.x % kLanes == 0) shared.top[slot][head] = running[g].top, shared.total[slot][head] = running[g].total;
    }
}

// What each slot's sums count for: a warp takes a query head, a lane its slots. `top` becomes the weight.
__device__ __forceinline__ void weigh_slots(Shared& shared) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int g = threadIdx.x / kWarp; g < GROUP; g += kWarps) {
        float top = kLowest, total = 0.f;
        for (int slot = lane; slot < kTogether; slot += kWarp) top = fmaxf(top, shared.top[slot][g]);
        top = lanes_max(top);
        for (int slot = lane; slot < kTogether; slot += kWarp) {
            const float weight = __expf(shared.top[slot][g] - top);
            total += shared.total[slot][g] * weight;
            shared.top[slot][g] = weight;
        }
        total = lanes_sum(total);
        if (lane == 0) shared.all_top[g] = top, shared.all_total[g] = total;
    }
}

// All slots of a block: results where the context is one run, else sums for the block that comes last.
__device__ __forceinline__ void join_slots(const Shared& shared, const float* all_sums, float* out, float* partial, bool is_whole,
                                           bool is_real) {
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kThreads) {
        const int g = i / HEAD_DIM, d = i % HEAD_DIM;
        float sum = 0.f;
#pragma unroll 8
        for (int slot = 0; slot < kTogether; ++slot) sum += all_sums[slot * GROUP * HEAD_DIM + i] * shared.top[slot][g];
        if (!is_real) continue;
        if (is_whole) {
            out[i] = sum / shared.all_total[g];
            continue;
        }
        float* mine = partial + g * (HEAD_DIM + 2);
        mine[d] = sum;
        if (d == 0) mine[HEAD_DIM] = shared.all_top[g], mine[HEAD_DIM + 1] = shared.all_total[g];
    }
}

// All runs of a head, four asked for at a time.
__device__ __forceinline__ void join_runs(const float* partial, int used, float* out) {
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kThreads) {
        const float* from = partial + i / HEAD_DIM * (HEAD_DIM + 2);
        float top = kLowest, sum = 0.f, total = 0.f;
#pragma unroll 4
        for (int run = 0; run < used; ++run) {
            const float* other = from + run * GROUP * (HEAD_DIM + 2);
            const float other_top = __ldcg(other + HEAD_DIM);
            const float next = fmaxf(top, other_top);
            const float keep = __expf(top - next), take = __expf(other_top - next);
            sum = sum * keep + __ldcg(other + i % HEAD_DIM) * take;
            total = total * keep + __ldcg(other + HEAD_DIM + 1) * take;
            top = next;
        }
        out[i] = sum / total;
    }
}

// What a block attends to.
struct Run {
    int first_page, pages;  // of the sequence
    int from, to;           // positions in the cache
    bool brings;            // and the step's own token
};

// The queries of the group and, where this block brings them, K and V of the step's own token: to shared memory.
__device__ __forceinline__ void bring(const AttendArgs& args, int head, int position, bool brings, Shared& shared) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int row = threadIdx.x / kWarp; row < GROUP + 2 * brings; row += kWarps) {
        const bool is_query = row < GROUP, is_value = row == GROUP + 1;
        float* brought = is_query ? shared.q[row] : is_value ? shared.v : shared.k;
        const float* source = is_query ? args.q + (head * GROUP + row) * HEAD_DIM : (is_value ? args.v : args.k) + head * HEAD_DIM;
        bring_head(source, is_query ? args.q_norm : args.k_norm, is_query ? args.q_eps : args.k_eps, shared.turns, is_value, brought);
        if (is_query) continue;
        const auto cached = kv_row(is_value ? args.values : args.keys, args.rows, 0, position, head, KV_HEADS, HEAD_DIM);
        for (int i = lane; i < HEAD_DIM; i += kWarp) brought[i] = kv_store(cached, i, brought[i]);
    }
}

// Attention of the block to its run (the first positions of it in a rehearsal): what each slot found, to shared memory.
__device__ __forceinline__ void attend_to(const AttendArgs& args, const int* pages, int head, const Run& run, const Pages& stages, Shared& shared,
                                          bool is_real) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int team = warp / kShares, first_head = warp % kShares * kHeads, slot = team * kAtOnce + lane / kLanes;
    float q[kHeads][kPerLane];
    Running running[kHeads];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
        const float* row = shared.q[min(first_head + g, GROUP - 1)] + part() * kPerLane;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) q[g][i] = holds() ? row[i] * args.scale : 0.f;
    }
    if (run.brings && team == 0) {
        const Eight key = load8(shared.k + part() * kPerLane), value = load8(shared.v + part() * kPerLane);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
            const float score = score_of(args, q[g], key);
            if (slot > 0) continue;
            running[g].top = score, running[g].total = 1.f;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) running[g].sums[i] = value.v[i];
        }
    }
#pragma unroll 1
    for (int n = 0; n < run.pages; ++n) {
        if (is_real) stages.wait(n);
        if (team < kTeams) {
            const int start = (run.first_page + n) * kPageTokens;
            add_page(args, q, stages.keys(n), stages.values(n), start, slot, run.from, is_real ? run.to : start + 1, running);
        }
        if (!is_real) break;
        const int next = n + kStages;
        if (next < run.pages) __syncthreads();  // all are done with the page whose place it takes
        stages.ask(args.keys, args.values, next, next < run.pages ? pages[run.first_page + next] : -1, head);
    }
    if (!is_real) return;
    __syncthreads();
    if (team < kTeams) keep(shared, reinterpret_cast<float*>(stages.memory), slot, first_head, running);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) attend(const __grid_constant__ AttendArgs args) {
    extern __shared__ __align__(128) uint8 memory[];
    __shared__ Shared shared;
    const int head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS;

    let_next_kernel_start();
    // what was there before the kernel that makes Q, K and V
    const int position = args.rows.positions[0], end = position + 1;
    const int* pages = args.rows.pages + args.rows.tables[0];
    const int begin = WINDOWED ? max(0, end - args.window) : 0;
    const int first_page = begin / kPageTokens, all_pages = ceil_div(end, kPageTokens) - first_page;
    const int each = max(RUN_PAGES, ceil_div(all_pages, args.splits));
    const int used = ceil_div(all_pages, each);
    if (split >= used) {
        wait_for_previous_kernel();  // see kLeastShared
        return;
    }
    Run run{first_page + split * each, min(each, all_pages - split * each), begin, position, split == used - 1};

    const Pages stages{memory, shared.barriers};
    stages.start();
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < kStages; ++n) {
        stages.ask(args.keys, args.values, n, n < run.pages ? pages[run.first_page + n] : -1, head);
    }
    for (int pair = threadIdx.x; pair < kPairs; pair += kThreads) {
        shared.turns[pair] = rope_turn(position, args.frequencies[pair], args.magnitude);
    }
    __syncthreads();

    float* out = args.out + head * GROUP * HEAD_DIM;
    float* partial = args.partial + static_cast<size_t>(head) * SPLITS * GROUP * (HEAD_DIM + 2);
#pragma unroll 1
    for (int rehearsals = 1; rehearsals >= 0; --rehearsals) {
        if (rehearsals == 0) wait_for_previous_kernel();
        bring(args, head, position, run.brings && rehearsals == 0, shared);
        __syncthreads();
        const bool is_real = rehearsals == 0;
        attend_to(args, pages, head, run, stages, shared, is_real);
        __syncthreads();
        weigh_slots(shared);
        __syncthreads();
        float* mine = partial + static_cast<size_t>(split) * GROUP * (HEAD_DIM + 2);
        join_slots(shared, reinterpret_cast<const float*>(memory), out, mine, used == 1, is_real);
    }
    if (used == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = atomicAdd(&args.arrivals[head], 1) == used - 1;
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    join_runs(partial, used, out);
    if (threadIdx.x == 0) args.arrivals[head] = 0;
}
