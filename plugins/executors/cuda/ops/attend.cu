// Attention of tokens of different sequences with what lies before it, in one launch: the norm of the heads of Q and K,
// RoPE, the write of K and V to the paged cache. The same as place.cu and attention.cu do one after the other for many
// tokens of a sequence, which this cannot: a block waits for no other, and so sees of the step's own tokens only the one
// it brings itself.
//
// Blocks take a token (y), a KV head and a split (x, heads first) each. The query heads of a group read K and V together,
// page by page, out of shared memory, where the first pages are asked for before the wait for the kernel before: only Q and
// the step's own K and V come after it. Short contexts are one run of pages; longer ones are split (Flash-Decoding: Dao et al. 2023)
// and joined by the block that comes last or, where the runs are few, by the product that reads the result. Sums are kept
// with a running maximum (Milakov and Gimelshein 2018). What a block does with a page is in attend_tensor.cuh and
// attend_plain.cuh.
//
// Compile-time: those of place.cu (HEAD_DIM, KV_HEADS, DIMS, HALVES, HEAD_NORM, KV) and of attention.cu (GROUP, SOFTCAP,
// WINDOWED), TENSOR for tensor cores, THREADS of a block, RUN_PAGES, those worth a block of their own, and BLOCKS that a
// multiprocessor with bulk copies has room for: 2 for one token, 1 for several, which spreads them evenly.
#include "attend_plain.cuh"
#include "attend_tensor.cuh"
#include "float_math.cuh"

// Shared memory a block may have, of which the host and other arrays need some (CUDA C++ Programming Guide, "Technical
// Specifications per Compute Capability"). Where rings are (gemv_ring.cuh) a block of a product is to find room beside it.
constexpr int kArrays = sizeof(Heads) + sizeof(Operands);
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kMostShared = 227 << 10, kBlocks = BLOCKS, kRoom = ((kBlocks > 1 ? 110 : 215) << 10) - kArrays;
#elif __CUDA_ARCH__ == 800
constexpr int kMostShared = 163 << 10, kBlocks = 1, kRoom = kMostShared - (8 << 10) - kArrays;
#else
constexpr int kMostShared = 99 << 10, kBlocks = 1, kRoom = kMostShared - (8 << 10) - kArrays;
#endif

// Pages in shared memory: as many as there is room for, and one at least.
constexpr int kPage = 2 * page_bytes<KV>(HEAD_DIM);
constexpr int kStages = kRoom / kPage < 1 ? 1 : kRoom / kPage < 8 ? kRoom / kPage : 8;
using Pages = Stages<KV, HEAD_DIM, KV_HEADS, kStages>;
constexpr int kSumsBytes = kSlots * GROUP * HEAD_DIM * 4;  // what the slots of a block found: where last pages are or would be
constexpr int kBytes = largest(Pages::kBytes, kSumsBytes);
constexpr int kSumsStart = (kBytes - kSumsBytes) / 16 * 16;

// What a launch has to ask for. Read by the host.
extern "C" __device__ const int shared_bytes = largest(kBytes, kBlocks > 1 ? kLeastShared : 0);

struct Shared {
    Heads heads;
    Operands operands;
    float top[kSlots][GROUP], total[kSlots][GROUP];
    float all_top[GROUP], all_total[GROUP];
    float2 turns[kPairs > 0 ? kPairs : 1];  // cosine and sine of each pair at the token's position
    uint64 barriers[kStages];
    bool is_last;
};
static_assert(sizeof(Shared) + kBytes <= kMostShared, "a block's shared memory fits");

// A lane's part of the norm's weight for a head of the group: queries first, then K.
struct HeadNorm {
    static constexpr int kEach = HEAD_NORM == kNoNorm ? 0 : ceil_div(HEAD_DIM, kWarp);
    float weight[kEach > 0 ? kEach : 1];
    __device__ __forceinline__ void load(const AttendArgs& args, int row) {
        const float* norm = row < GROUP ? args.q_norm : args.k_norm;
#pragma unroll
        for (int n = 0; n < kEach; ++n) weight[n] = norm[min(static_cast<int>(threadIdx.x) % kWarp + n * kWarp, HEAD_DIM - 1)];
    }
};

// A head of Q or K, or V's: to shared memory as attention uses it. A warp takes one.
__device__ __forceinline__ void bring_head(const float* from, const HeadNorm& norm, float eps, const float2* turns, bool is_value,
                                           float* to) {
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
#pragma unroll
        for (int n = 0; n < HeadNorm::kEach; ++n) {
            const int i = lane + n * kWarp;
            if (i < HEAD_DIM) to[i] = (to[i] - mean) * inverse * norm.weight[n];
        }
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

// The queries of the group and, where this block brings them, K and V of the step's own token, which go to `page` of the
// cache: to shared memory. `norm` is that of the first head that the warp takes, read beforehand.
__device__ __forceinline__ void bring(const AttendArgs& args, int token, int head, int position, int page, bool brings, HeadNorm norm,
                                      Shared& shared) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp;
#pragma unroll 1
    for (int row = first; row < GROUP + 2 * brings; row += kWarps) {
        if (row != first) norm.load(args, row);
        const bool is_query = row < GROUP, is_value = row == GROUP + 1;
        float* brought = shared.heads.rows[row];
        const float* source = is_query ? args.q + ((token * KV_HEADS + head) * GROUP + row) * HEAD_DIM
                                       : (is_value ? args.v : args.k) + (token * KV_HEADS + head) * HEAD_DIM;
        bring_head(source, norm, is_query ? args.q_eps : args.k_eps, shared.turns, is_value, brought);
        if (!is_query) {
            const auto cached = kv_row(is_value ? args.values : args.keys, page, position % kPageTokens, head, KV_HEADS, HEAD_DIM);
            for (int i = lane; i < HEAD_DIM; i += kWarp) brought[i] = kv_store(cached, i, brought[i]);
        }
        shared.operands.prepare(args, shared.heads, row);
    }
}

// Attention of the block to its run: what each slot found, to shared memory.
__device__ __forceinline__ void attend_to(const AttendArgs& args, const int* pages, int head, const Run& run, const Pages& stages,
                                          Shared& shared, float* sums) {
    Attending attending{args, shared.heads, shared.operands, run};
#pragma unroll 1
    for (int n = 0; n < run.pages; ++n) {
        stages.wait(n);
        attending.add_page(args, shared.operands, stages.keys(n), stages.values(n), (run.first_page + n) * kPageTokens, run);
        const int next = n + kStages;
        if (next < run.pages) __syncthreads();  // all are done with the page whose place it takes
        stages.ask(args.keys, args.values, next, next < run.pages ? pages[run.first_page + next] : -1, head);
    }
    if (run.pages * kPage > kSumsStart) __syncthreads();  // all are done with the pages where sums come
    attending.keep(sums, shared.top, shared.total);
}

constexpr bool kFewSlots = kSlots <= 4;  // so that every thread weighs them for itself

// What each slot's sums count for, where they are many: a warp takes a query head, a lane its slots. `top` becomes the
// weight.
__device__ __forceinline__ void weigh_slots(Shared& shared) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int g = threadIdx.x / kWarp; g < GROUP; g += kWarps) {
        float top = kLowest, total = 0.f;
        for (int slot = lane; slot < kSlots; slot += kWarp) top = fmaxf(top, shared.top[slot][g]);
        top = lanes_max(top);
        for (int slot = lane; slot < kSlots; slot += kWarp) {
            const float weight = __expf(shared.top[slot][g] - top);
            total += shared.total[slot][g] * weight;
            shared.top[slot][g] = weight;
        }
        total = lanes_sum(total);
        if (lane == 0) shared.all_top[g] = top, shared.all_total[g] = total;
    }
}

// All slots of a block: results where the context is one run, else what is left of this one.
__device__ __forceinline__ void join_slots(const Shared& shared, const float* all_sums, float* out, float* left, float2* peaks, bool is_whole) {
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < GROUP * HEAD_DIM; i += 2 * kThreads) {
        const int g = i / HEAD_DIM;
        float top = kLowest, total = 0.f;
        if constexpr (kFewSlots) {
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) top = fmaxf(top, shared.top[slot][g]);
        } else {
            top = shared.all_top[g], total = shared.all_total[g];
        }
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll 8
        for (int slot = 0; slot < kSlots; ++slot) {
            float weight = shared.top[slot][g];
            if constexpr (kFewSlots) {
                weight = __expf(weight - top);
                total += shared.total[slot][g] * weight;
            }
            const float2 found = *reinterpret_cast<const float2*>(all_sums + slot * GROUP * HEAD_DIM + i);
            sum.x += found.x * weight, sum.y += found.y * weight;
        }
        if (is_whole) {
            const float share = reciprocal(total);
            *reinterpret_cast<float2*>(out + i) = make_float2(sum.x * share, sum.y * share);
            continue;
        }
        *reinterpret_cast<float2*>(left + i) = sum;
        if (i % HEAD_DIM == 0) peaks[g] = make_float2(top, total);
    }
}

// All runs of a head, eight asked for at a time.
__device__ __forceinline__ void join_runs(const RunSums<HEAD_DIM>& sums, int head, int used, float* out) {
    for (int i = 2 * threadIdx.x; i < GROUP * HEAD_DIM; i += 2 * kThreads) {
        float top = kLowest, total = 0.f;
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll 8
        for (int run = 0; run < used; ++run) {
            const float2 found = __ldcg(reinterpret_cast<const float2*>(sums.of(run) + head * GROUP * HEAD_DIM + i));
            const float2 peak = __ldcg(sums.peaks(run) + head * GROUP + i / HEAD_DIM);
            const float next = fmaxf(top, peak.x);
            const float keep = __expf(top - next), take = __expf(peak.x - next);
            sum = make_float2(sum.x * keep + found.x * take, sum.y * keep + found.y * take);
            total = total * keep + peak.y * take;
            top = next;
        }
        const float share = reciprocal(total);
        *reinterpret_cast<float2*>(out + i) = make_float2(sum.x * share, sum.y * share);
    }
}

// While most blocks have no run of a context, memory has little to do: they ask for weights that are needed later, each for
// its share. A few blocks would take too long to ask for all of it, and memory has the context to read then.
__device__ __forceinline__ void ask_ahead(const AttendArgs& args, int place, int places) {
    if (threadIdx.x != 0 || 2 * places < gridDim.x) return;
    for (const Ahead& weight : args.ahead) {
        for (int piece = place; piece < weight.pieces; piece += places) {
            ask_l2(weight.start + static_cast<uint64>(piece) * kAheadPiece, kAheadPiece);
        }
    }
}

extern "C" __global__ void __launch_bounds__(register_threads(kThreads), kBlocks) attend(const __grid_constant__ AttendArgs args) {
    extern __shared__ __align__(128) uint8 memory[];
    __shared__ Shared shared;
    const int head = blockIdx.x % KV_HEADS, split = blockIdx.x / KV_HEADS, token = blockIdx.y;

    let_next_kernel_start();
    // what was there before the kernel that makes Q, K and V
    const int position = args.rows.positions[token];
    const int* pages = args.rows.pages + args.rows.tables[token];
    const ContextRuns runs(position, WINDOWED ? args.window : 0, RUN_PAGES, args.splits, args.left_runs);
    if (split >= runs.used) {
        ask_ahead(args, blockIdx.x - runs.used * KV_HEADS, gridDim.x - runs.used * KV_HEADS);
        wait_for_previous_kernel();  // see kLeastShared
        return;
    }
    const int skipped = split * runs.each;
    const Run run{runs.first_page + skipped, min(runs.each, runs.pages - skipped), runs.begin, position, split == runs.used - 1};
    const int own_page = pages[position / kPageTokens];
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
    HeadNorm norm;
    norm.load(args, threadIdx.x / kWarp);
    __syncthreads();
    wait_for_previous_kernel();

    const int heads = head * GROUP;  // the first of this block's
    const RunSums<HEAD_DIM> left = RunSums<HEAD_DIM>{args.partial, args.splits, KV_HEADS * GROUP * HEAD_DIM}.of_row(token);
    float* out = args.out + (token * KV_HEADS * GROUP + heads) * HEAD_DIM;
    float* sums = reinterpret_cast<float*>(memory + kSumsStart);
    bring(args, token, head, position, own_page, run.brings, norm, shared);
    __syncthreads();
    attend_to(args, pages, head, run, stages, shared, sums);
    __syncthreads();
    if constexpr (!kFewSlots) {
        weigh_slots(shared);
        __syncthreads();
    }
    join_slots(shared, sums, out, left.of(split) + heads * HEAD_DIM, left.peaks(split) + heads, runs.used == 1);
    if (runs.used <= max(1, args.left_runs)) return;
    int* arrivals = args.arrivals + token * KV_HEADS + head;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = atomicAdd(arrivals, 1) == runs.used - 1;
    __syncthreads();
    if (!shared.is_last) return;
    __threadfence();
    join_runs(left, head, runs.used, out);
    if (threadIdx.x == 0) *arrivals = 0;
}
