// Chooses the next token of each row of logits as mortice.core.text.sampling describes, and writes the rows of the step
// after: one launch ends a decode step and begins the next, so that no token waits for the host. What the user asks for
// is read from device memory, so that one captured graph serves all parameters. Blocks (x) share a row (y) and wait for
// each other.
//
// A sequence keeps its place among what is kept for sequences (`slot`), whichever row of a step is its own.
#include "selection.cuh"

struct ChoiceParams {
    uint64 seed;
    uint64 step;         // tokens generated before; advanced here
    double top_p;        // 1: off
    float temperature;   // 0: greedy
    float log_min_p;     // -inf: off
    float repetition, presence, frequency;
    int top_k;           // 0: off
    int window;          // 0: all tokens are penalised
    int top;             // alternatives wanted
    int penalises, biased;
    int position;        // of the token that was fed last; advanced here
    int unused;
};

struct ChoiceRow {
    int slot;
    uint32 launches;  // gives the place in the ring; advanced here
};

struct Alternative {
    int id;
    float logprob;
};

struct Chosen {
    int id;
    float logprob;
    int problem;  // bits of Problem; the other fields then mean nothing
    int unused;
    Alternative top[TOP_LIMIT];
};

enum Problem { kNan = 1, kPlusInfinity = 2, kNothing = 4, kNoBest = 8 };

// What one pass over the logits tells; joined over threads, then warps, then blocks.
struct Summary {
    float raw_peak = kLowest, raw_low = infinity();
    float raw_total = 0.f;  // sum of exp(raw - raw_peak)
    float peak = -infinity(), low = infinity();
    int id = 0x7fffffff;    // of the first token with the peak
    int problems = 0;

    __device__ __forceinline__ void join(const Summary& other) {
        const float top = fmaxf(raw_peak, other.raw_peak);
        raw_total = raw_total * expf(raw_peak - top) + other.raw_total * expf(other.raw_peak - top);
        raw_peak = top;
        raw_low = fminf(raw_low, other.raw_low);
        low = fminf(low, other.low);
        problems |= other.problems;
        if (other.peak > peak || (other.peak == peak && other.id < id)) {
            peak = other.peak;
            id = other.id;
        }
    }

    __device__ __forceinline__ int problem() const {
        if (problems & (kNan | kPlusInfinity)) return problems;
        if (raw_peak == kLowest) return kNothing;
        return problems | (fabsf(peak) < infinity() ? 0 : kNoBest);
    }
};

struct Scratch {
    Exchange exchanges[3];
    Summary partial[kMostBlocks];
    uint32 arrivals, departures;
    float adjusted[kVocab];
};

struct ChooseArgs {
    const float* logits;   // (rows, VOCAB_SIZE)
    ChoiceRow* rows;       // (rows,)
    ChoiceParams* params;  // (slots,)
    const float* bias;     // (slots, VOCAB_SIZE), only read where there is one
    int* counts;           // (slots, VOCAB_SIZE), occurrences in the window
    int* history;          // (slots, history_length), the sequence's tokens by position
    Scratch* scratch;      // (rows of a launch,), counters zero before and after
    int* token_ids;        // (rows,), of the next step
    int* positions;
    Chosen* chosen;        // (RING, ROWS), results in host memory
    int first;             // row of the launch's first
    int history_length;
};

static_assert(sizeof(ChoiceParams) == PARAMS_BYTES && sizeof(Chosen) == CHOSEN_BYTES, "as in choosing.py");
static_assert(sizeof(Scratch) == SCRATCH_BYTES && sizeof(ChooseArgs) == ARGS_BYTES, "as in choosing.py");
static_assert(sizeof(ChoiceRow) == 8, "as in choosing.py");

// What this block's row works with.
struct Row {
    const float* logits;
    ChoiceRow* state;
    ChoiceParams* params;
    const float* bias;
    int* counts;
    int* history;
    Scratch* scratch;
    int* token_id;
    int* position;

    __device__ __forceinline__ Row(const ChooseArgs& args, int slot) {
        const int row = args.first + static_cast<int>(blockIdx.y);
        logits = args.logits + static_cast<size_t>(row) * kVocab;
        state = args.rows + row;
        params = args.params + slot;
        bias = args.bias + static_cast<size_t>(slot) * kVocab;
        counts = args.counts + static_cast<size_t>(slot) * kVocab;
        history = args.history + static_cast<size_t>(slot) * args.history_length;
        scratch = args.scratch + blockIdx.y;
        token_id = args.token_ids + row;
        position = args.positions + row;
    }
};

struct Shared {
    ChoiceRow row;
    ChoiceParams params;
    Summary warps[kWarps];
    SelectionMemory selection;
};

__device__ __forceinline__ Summary block_join(Summary mine, Summary* warps) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        Summary other;
        other.raw_peak = __shfl_xor_sync(kFullMask, mine.raw_peak, step);
        other.raw_low = __shfl_xor_sync(kFullMask, mine.raw_low, step);
        other.raw_total = __shfl_xor_sync(kFullMask, mine.raw_total, step);
        other.peak = __shfl_xor_sync(kFullMask, mine.peak, step);
        other.low = __shfl_xor_sync(kFullMask, mine.low, step);
        other.id = __shfl_xor_sync(kFullMask, mine.id, step);
        other.problems = __shfl_xor_sync(kFullMask, mine.problems, step);
        mine.join(other);
    }
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
    __syncthreads();
    mine = warps[0];
    for (int warp = 1; warp < kWarps; ++warp) mine.join(warps[warp]);
    __syncthreads();
    return mine;
}

// Bias and penalties; each operation rounds by itself.
__device__ __forceinline__ float adjusted(float logit, int id, const Row& row, const ChoiceParams& params) {
    if (params.biased) logit = __fadd_rn(logit, row.bias[id]);
    const int count = params.penalises ? row.counts[id] : 0;
    if (count > 0) {
        logit = logit > 0.f ? __fdiv_rn(logit, params.repetition) : __fmul_rn(logit, params.repetition);
        logit = __fsub_rn(logit, __fadd_rn(__fmul_rn(static_cast<float>(count), params.frequency), params.presence));
    }
    return logit;
}

// Summarises this block's logits, and writes the adjusted ones where bias or penalties are on.
__device__ __forceinline__ Summary read_logits(const Row& row, Shared& shared) {
    const bool adjusts = shared.params.biased || shared.params.penalises;
    Summary mine;
    View{row.logits}.each([&](float raw, int id) {
        float value = raw;
        if (adjusts) row.scratch->adjusted[id] = value = adjusted(raw, id, row, shared.params);
        if (!(raw < infinity())) mine.problems |= raw == infinity() ? kPlusInfinity : kNan;
        if (!(value < infinity())) mine.problems |= kNoBest;
        if (raw > -infinity()) mine.raw_low = fminf(mine.raw_low, raw);
        if (value > -infinity()) mine.low = fminf(mine.low, value);
        const float top = fmaxf(mine.raw_peak, raw);
        mine.raw_total = mine.raw_total * expf(mine.raw_peak - top) + expf(raw - top);
        mine.raw_peak = top;
        if (value > mine.peak) {  // ids rise, so the first of equals stays
            mine.peak = value;
            mine.id = id;
        }
    });
    return block_join(mine, shared.warps);
}

__device__ __forceinline__ Summary read_partial(const Scratch* scratch, Shared& shared) {
    Summary mine;
    if (static_cast<int>(threadIdx.x) < block_count()) {
        const Summary* other = &scratch->partial[threadIdx.x];
        mine.raw_peak = __ldcg(&other->raw_peak);
        mine.raw_low = __ldcg(&other->raw_low);
        mine.raw_total = __ldcg(&other->raw_total);
        mine.peak = __ldcg(&other->peak);
        mine.low = __ldcg(&other->low);
        mine.id = __ldcg(&other->id);
        mine.problems = __ldcg(&other->problems);
    }
    return block_join(mine, shared.warps);
}

// mortice.core.text.sampling.uniform: the first word of Philox4x32-10.
__device__ __forceinline__ double uniform(uint64 seed, uint64 step) {
    uint32 c0 = static_cast<uint32>(step), c1 = static_cast<uint32>(step >> 32), c2 = 0, c3 = 0;
    uint32 k0 = static_cast<uint32>(seed), k1 = static_cast<uint32>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64 product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<uint32>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32>(product1);
        c2 = static_cast<uint32>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (c0 + 0.5) / 4294967296.0;
}

// The least mass that reaches a share of a mass.
__device__ __forceinline__ uint64 share_of(double share, uint64 mass) {
    const uint64 target = __double2ull_ru(share * __ull2double_rn(mass));
    return target < 1 ? 1 : target > mass ? mass : target;
}

// Adds up the tokens that min-p keeps; the next barrier completes the sums.
__device__ __forceinline__ void add_likely(Exchange& sums, SelectionMemory& shared, const View& view, float log_min_p) {
    Amount likely;
    view.each([&](float value, int) {
        if (view.shifted(value) >= log_min_p) likely.add({view.mass(value), 1});
    });
    likely = running_sum(likely, shared).through;
    if (threadIdx.x < kThreads - 1 || likely.count == 0) return;
    atomicAdd(&sums.likely_count, likely.count);
    atomicAdd(&sums.likely_mass, likely.mass);
}

enum Cut { kTopK, kTopP, kDraw };

__device__ __forceinline__ int draw(Grid& grid, SelectionMemory& shared, View& view, const ChoiceParams& params, const Summary& summary) {
    view.peak = summary.peak;
    view.temperature = params.temperature;
    view.set_bins(fminf(summary.peak - summary.low, 32.f * params.temperature));  // beyond 32, weights are below 2^-46
    const bool has_min_p = params.log_min_p > -infinity();
    const Exchange& first = grid.exchange();
    if (has_min_p) add_likely(grid.exchange(), shared, view, params.log_min_p);
    const Histogram coarse = histogram(grid, shared, view, [&](float value, int) { return view.bin(value); });
    Amount likely = coarse.total;
    if (has_min_p) {
        likely.mass = __ldcg(&first.likely_mass);
        likely.count = __ldcg(&first.likely_count);
    }

    const int top_k = params.top_k > 0 ? params.top_k : kVocab;
    Amount kept = coarse.total;
    uint64 rank = 0;
    for (int cut = kTopK; cut <= kDraw; ++cut) {
        uint64 target = top_k;
        if (cut == kTopK) {
            if (top_k >= kVocab) continue;
            const Found found = find(shared, coarse, false, target);
            if (found.own.mass == 0) {  // which of several tokens without mass are kept makes no difference
                kept = {found.before.mass, static_cast<uint32>(top_k)};
                continue;
            }
        } else {
            if (cut == kTopP && params.top_p >= 1) continue;
            if (cut == kDraw && likely.count < kept.count) kept = likely;
            target = share_of(cut == kTopP ? params.top_p : uniform(params.seed, params.step), kept.mass);
        }
        const Selected selected = select(grid, shared, view, coarse, cut != kTopK, target);
        kept = selected.through;
        rank = selected.rank;
    }
    return id_of(rank);
}

// Writes the most likely tokens by raw logits, in order.
__device__ __forceinline__ void write_top(Grid& grid, SelectionMemory& shared, View& view, const Row& row, int top, const Summary& summary, Chosen& out) {
    view.values = row.logits;
    view.peak = summary.raw_peak;
    view.temperature = 1.f;
    view.set_bins(summary.raw_peak - summary.raw_low);
    const Histogram coarse = histogram(grid, shared, view, [&](float value, int) { return view.bin(value); });
    const uint64 last = select(grid, shared, view, coarse, false, top).rank;
    const int listed = gather(grid, shared, view, [&](float value, int id) { return rank_of(value, id) <= last; });
    if (blockIdx.x > 0 || static_cast<int>(threadIdx.x) >= listed) return;
    const uint64 mine = shared.list[threadIdx.x].rank;
    int place = 0;
    for (int i = 0; i < listed; ++i) place += shared.list[i].rank < mine;
    out.top[place] = {id_of(mine), row.logits[id_of(mine)] - summary.raw_peak - logf(summary.raw_total)};
}

// One thread: the result to the host, the row of the next step, and the token into the penalties' window.
__device__ __forceinline__ void finish(const Row& row, const Shared& shared, const Summary& summary, int token, int problem, Chosen& out) {
    const ChoiceParams& params = shared.params;
    if (problem) token = 0;  // the step launched ahead reads it
    out.id = token;
    out.problem = problem;
    out.logprob = row.logits[token] - summary.raw_peak - logf(summary.raw_total);
    const int position = params.position + 1;
    row.params->step = params.step + 1;
    row.params->position = position;
    row.state->launches = shared.row.launches + 1;
    *row.token_id = token;
    *row.position = position;
    if (!params.penalises) return;
    row.history[position] = token;
    row.counts[token] += 1;
    if (params.window > 0 && position >= params.window) row.counts[row.history[position - params.window]] -= 1;
}

extern "C" __global__ void __launch_bounds__(kThreads) choose(const __grid_constant__ ChooseArgs args) {
    __shared__ Shared shared;
    let_next_kernel_start();
    // what is read here was last written by an earlier step, or copied before this one
    if (threadIdx.x == 0) {
        const ChoiceRow& row = args.rows[args.first + blockIdx.y];
        shared.row = {__ldcg(&row.slot), __ldcg(&row.launches)};
        shared.params = args.params[shared.row.slot];
    }
    __syncthreads();
    wait_for_previous_kernel();
    const ChoiceParams& params = shared.params;
    const Row row(args, shared.row.slot);
    Grid grid{row.scratch->exchanges, &row.scratch->arrivals, &row.scratch->departures};
    View view{params.biased || params.penalises ? row.scratch->adjusted : row.logits};
    Summary summary = read_logits(row, shared);
    if (threadIdx.x == 0) row.scratch->partial[blockIdx.x] = summary;
    grid.arrive();
    if (blockIdx.x == 0 || params.temperature > 0.f || params.top > 0) {
        grid.wait();
        summary = read_partial(row.scratch, shared);
        const int problem = summary.problem();
        Chosen& out = args.chosen[shared.row.launches % RING * ROWS + args.first + blockIdx.y];
        int token = summary.id;
        if (params.temperature > 0.f && !problem) token = draw(grid, shared.selection, view, params, summary);
        if (params.top > 0 && !problem) write_top(grid, shared.selection, view, row, params.top, summary, out);
        if (blockIdx.x == 0 && threadIdx.x == 0) finish(row, shared, summary, token, problem, out);
    }
    grid.leave();
}

// Counts the tokens at positions [first, last) for the penalties.
extern "C" __global__ void __launch_bounds__(kThreads) count_tokens(const int* history, int* counts, int first, int last) {
    for (int i = first + blockIdx.x * kThreads + threadIdx.x; i < last; i += block_count() * kThreads) atomicAdd(&counts[history[i]], 1);
}
