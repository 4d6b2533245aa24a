// Attention of one token with what lies before it, in one launch: the norm of the heads of Q and K, RoPE, the write of K
// and V to the paged cache. The same as place.cu and attention.cu do one after the other for many tokens, which this
// cannot: a block waits for no other, and so sees of the step's own tokens only the one it brings itself.
//
// Block (split, KV head). The query heads of a group read K and V together. Short contexts are one run of positions;
// longer ones are split (Flash-Decoding: Dao et al. 2023) and joined by the block that comes last. Each warp takes every
// kTeams-th group of positions and has kDepth of them under way: the first before the kernel waits for the one before
// it, so that a short run needs no more than its Q. Sums are kept with a running maximum (Milakov and Gimelshein 2018).
//
// Compile-time: those of place.cu (HEAD_DIM, KV_HEADS, DIMS, HALVES, HEAD_NORM, KV) and of attention.cu (GROUP, SPLITS,
// SOFTCAP, WINDOWED), and RUN_GROUPS, the groups of positions worth a block of their own.
#include "kv_cache.cuh"
#include "norm.cuh"
#include "rope.cuh"

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPerLane = 8;  // elements of a head a lane holds
constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
constexpr int kLanes = power_of_two_from(HEAD_DIM / kPerLane);  // that share a position; some idle at odd sizes
constexpr int kAtOnce = kWarp / kLanes;                         // positions a warp takes at once
// Query heads a warp serves: more would not fit its registers. Other warps then take the rest of the group.
constexpr int kShares = ceil_div(GROUP, 2);
constexpr int kHeads = ceil_div(GROUP, kShares);
constexpr int kTeams = kWarps / kShares;  // of warps that take the same positions
constexpr int kTogether = kTeams * kAtOnce;
constexpr int kDepth = sizeof(KvEight<KV>) > 16 ? 2 : 4;  // groups of positions a warp has under way, in registers
constexpr int kAhead = kDepth * kTogether;
constexpr int kLeast = RUN_GROUPS * kTogether;  // positions worth a block of their own
static_assert(HEAD_DIM % kPerLane == 0 && kLanes <= kWarp && kTeams > 0, "a warp holds whole positions");

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

struct Shared {
    float q[GROUP][HEAD_DIM];
    alignas(16) float k[HEAD_DIM];  // read four at a time
    alignas(16) float v[HEAD_DIM];
    float joined[kTeams][GROUP][HEAD_DIM];
    float top[kTeams][GROUP], total[kTeams][GROUP];
};

struct Running {
    float top = kLowest, total = 0.f;
    float sums[kPerLane] = {};

    __device__ __forceinline__ void join(float other_top, float other_total, const float* other) {
        const float next = fmaxf(top, other_top);
        const float keep = __expf(top - next), take = __expf(other_top - next);
        total = total * keep + other_total * take;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) sums[i] = sums[i] * keep + other[i] * take;
        top = next;
    }
};

__device__ __forceinline__ bool holds() { return threadIdx.x % kLanes * kPerLane < HEAD_DIM; }
__device__ __forceinline__ int part() { return holds() ? threadIdx.x % kLanes : 0; }

// The cosines and sines of a lane's pairs.
constexpr int kPairs = DIMS / 2, kLanePairs = ceil_div(kPairs, kWarp);
struct Turns {
    float2 of[kLanePairs > 0 ? kLanePairs : 1];
    __device__ __forceinline__ void load(const AttendArgs& args, int position) {
#pragma unroll
        for (int i = 0; i < kLanePairs; ++i) {
            const int pair = min(static_cast<int>(threadIdx.x % kWarp) + i * kWarp, kPairs - 1);
            of[i] = rope_turn(position, args.frequencies[pair], args.magnitude);
        }
    }
};

// A head of Q or K, or V's: to shared memory as attention uses it. A warp takes one.
__device__ __forceinline__ void bring_head(const float* from, const float* norm, float eps, const Turns& turns, bool is_value, float* to) {
    const int lane = threadIdx.x % kWarp;
    for (int i = lane; i < HEAD_DIM; i += kWarp) to[i] = from[i];
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
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
        const int pair = lane + i * kWarp;
        if (pair >= kPairs) break;
        float& a = to[HALVES ? pair : 2 * pair];
        float& b = to[HALVES ? pair + kPairs : 2 * pair + 1];
        const float2 turned = make_float2(a * turns.of[i].x - b * turns.of[i].y, a * turns.of[i].y + b * turns.of[i].x);
        a = turned.x, b = turned.y;
    }
    __syncwarp();
}

// One position a slot; all lanes of the warp call.
__device__ __forceinline__ void add(const AttendArgs& args, const float (&q)[kHeads][kPerLane], const Eight& key, const Eight& value,
                                    bool inside, Running (&running)[kHeads]) {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
        float score = 0.f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) score += q[g][i] * key.v[i];
        score = lanes_sum<kLanes>(score);
        if constexpr (SOFTCAP) score = args.softcap * tanhf(score / args.softcap);
        if (inside) running[g].join(score, 1.f, value.v);
    }
}

// The slots of each warp, to shared memory.
__device__ __forceinline__ void join_slots(Shared& shared, int team, int first_head, Running (&running)[kHeads]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
        for (int apart = kLanes; apart < kWarp; apart *= 2) {
            const float top = __shfl_xor_sync(kFullMask, running[g].top, apart);
            const float total = __shfl_xor_sync(kFullMask, running[g].total, apart);
            float sums[kPerLane];
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) sums[i] = __shfl_xor_sync(kFullMask, running[g].sums[i], apart);
            running[g].join(top, total, sums);
        }
        const int head = first_head + g;
        if (head >= GROUP) continue;
        if (lane < kLanes && holds()) {
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) shared.joined[team][head][part() * kPerLane + i] = running[g].sums[i];
        }
        if (lane == 0) shared.top[team][head] = running[g].top, shared.total[team][head] = running[g].total;
    }
}

// The teams of a block: results where the context is one run, else sums for the block that comes last.
__device__ __forceinline__ void join_teams(const Shared& shared, float* out, float* partial, bool is_whole) {
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += kThreads) {
        const int g = i / HEAD_DIM, d = i % HEAD_DIM;
        float top = kLowest, sum = 0.f, total = 0.f;
#pragma unroll
        for (int team = 0; team < kTeams; ++team) top = fmaxf(top, shared.top[team][g]);
#pragma unroll
        for (int team = 0; team < kTeams; ++team) {
            const float take = __expf(shared.top[team][g] - top);
            sum += shared.joined[team][g][d] * take;
            total += shared.total[team][g] * take;
        }
        if (is_whole) {
            out[i] = sum / total;
            continue;
        }
        float* mine = partial + g * (HEAD_DIM + 2);
        mine[d] = sum;
        if (d == 0) mine[HEAD_DIM] = top, mine[HEAD_DIM + 1] = total;
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

extern "C" __global__ void __launch_bounds__(kThreads) attend(const __grid_constant__ AttendArgs args) {
    __shared__ Shared shared;
    __shared__ bool is_last;
    const int split = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

    let_next_kernel_start();
    // what was there before the kernel that makes Q, K and V
    const int position = args.rows.positions[0], end = position + 1;
    const int begin = WINDOWED ? max(0, end - args.window) : 0;
    const int each = max(kLeast, ceil_div(ceil_div(end - begin, args.splits), kTogether) * kTogether);
    const int used = ceil_div(end - begin, each);
    if (split >= used) return;
    const int from = begin + split * each, to = min(end, from + each);
    const bool brings = to == end;  // this block's run ends with the step's own token
    auto load = [&](KV* cache, int at) {
        KvEight<KV> eight{};
        if (at < min(to, position)) eight = kv_ask8(kv_row(cache, args.rows, 0, at, head, KV_HEADS, HEAD_DIM), part());
        return eight;
    };
    const int team = warp / kShares, first_head = warp % kShares * kHeads;
    int at = (team < kTeams ? from + team * kAtOnce : to) + lane / kLanes;
    KvEight<KV> keys[kDepth], values[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        keys[i] = load(args.keys, at + i * kTogether);
        values[i] = load(args.values, at + i * kTogether);
    }
    Turns turns;
    turns.load(args, position);
    wait_for_previous_kernel();

    for (int row = warp; row < GROUP + 2 * brings; row += kWarps) {
        const bool is_query = row < GROUP, is_value = row == GROUP + 1;
        float* brought = is_query ? shared.q[row] : is_value ? shared.v : shared.k;
        const float* source = is_query ? args.q + (head * GROUP + row) * HEAD_DIM : (is_value ? args.v : args.k) + head * HEAD_DIM;
        bring_head(source, is_query ? args.q_norm : args.k_norm, is_query ? args.q_eps : args.k_eps, turns, is_value, brought);
        if (is_query) continue;
        const auto cached = kv_row(is_value ? args.values : args.keys, args.rows, 0, position, head, KV_HEADS, HEAD_DIM);
        for (int i = lane; i < HEAD_DIM; i += kWarp) brought[i] = kv_store(cached, i, brought[i]);
    }
    __syncthreads();

    float q[kHeads][kPerLane];
    Running running[kHeads];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
        const float* row = shared.q[min(first_head + g, GROUP - 1)] + part() * kPerLane;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) q[g][i] = holds() ? row[i] * args.scale : 0.f;
    }
#pragma unroll 1
    while (at - lane / kLanes < to) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i, at += kTogether) {
            if (at - lane / kLanes >= to) break;
            Eight key = kv_take8(keys[i]), value = kv_take8(values[i]);
            if (at == position) key = load8(shared.k + part() * kPerLane), value = load8(shared.v + part() * kPerLane);
            keys[i] = load(args.keys, at + kAhead);
            values[i] = load(args.values, at + kAhead);
            add(args, q, key, value, at < to, running);
        }
    }
    if (team < kTeams) join_slots(shared, team, first_head, running);
    __syncthreads();

    float* out = args.out + head * GROUP * HEAD_DIM;
    float* partial = args.partial + static_cast<size_t>(head) * SPLITS * GROUP * (HEAD_DIM + 2);
    join_teams(shared, out, partial + static_cast<size_t>(split) * GROUP * (HEAD_DIM + 2), used == 1);
    if (used == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&args.arrivals[head], 1) == used - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    join_runs(partial, used, out);
    if (threadIdx.x == 0) args.arrivals[head] = 0;
}
