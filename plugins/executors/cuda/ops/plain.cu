// One kernel for each operator that nothing fused: the plain way, for any number of tokens. float32, one row a token.
// Block y is the token; what an operator is comes as arguments, so that these are compiled once for all models.
#include "elementwise.cuh"
#include "rope.cuh"

#define PLAIN extern "C" __global__ void __launch_bounds__(256)

__device__ __forceinline__ int column() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <class F>
__device__ __forceinline__ void for_element(int width, F f) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int at = column();
    if (at < width) f(static_cast<size_t>(blockIdx.y) * width + at, at);
}

PLAIN op_add(const float* a, const float* b, float* out, int width) {
    for_element(width, [=](size_t i, int) { out[i] = a[i] + b[i]; });
}

PLAIN op_add_bias(const float* x, const float* bias, float* out, int width) {
    for_element(width, [=](size_t i, int c) { out[i] = x[i] + bias[c]; });
}

PLAIN op_scale(const float* x, float* out, float factor, int width) {
    for_element(width, [=](size_t i, int) { out[i] = factor * x[i]; });
}

PLAIN op_position_scale(const float* x, const int* positions, float* out, float strength, int period, int width) {
    for_element(width, [=](size_t i, int) {
        out[i] = (1.f + strength * log1pf(static_cast<float>(positions[blockIdx.y] / period))) * x[i];
    });
}

PLAIN op_softcap(const float* x, float* out, float cap, int width) {
    for_element(width, [=](size_t i, int) { out[i] = cap * tanhf(x[i] / cap); });
}

__device__ __forceinline__ float activate_by(int kind, float x) {
    switch (kind) {
        case kSilu: return activate<kSilu>(x);
        case kGeluTanh: return activate<kGeluTanh>(x);
        case kGeluErf: return activate<kGeluErf>(x);
        case kRelu: return activate<kRelu>(x);
        case kReluSquared: return activate<kReluSquared>(x);
        default: return x;
    }
}

PLAIN op_act(const float* x, float* out, int kind, int width) {
    for_element(width, [=](size_t i, int) { out[i] = activate_by(kind, x[i]); });
}

PLAIN op_gated_act(const float* gate, const float* up, float* out, int kind, int width) {
    for_element(width, [=](size_t i, int) { out[i] = activate_by(kind, gate[i]) * up[i]; });
}

// out[r] = x[rows[r]]
PLAIN op_select_rows(const float* x, const int* rows, float* out, int width) {
    for_element(width, [=](size_t i, int c) { out[i] = x[static_cast<size_t>(rows[blockIdx.y]) * width + c]; });
}

// Block x is the group. `per_row` says that weight and bias have one element for each of the row, not of the group.
PLAIN op_norm(const float* x, const float* weight, const float* bias, float* out, float eps, int width, int is_layer_norm,
           int per_row) {
    __shared__ float scratch[kWarp];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const size_t start = (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * width;
    const int first = per_row ? blockIdx.x * width : 0;
    float mean = 0.f;
    if (is_layer_norm) {
        float sum = 0.f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[start + i];
        mean = block_sum(sum, scratch) / width;
    }
    float squares = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (x[start + i] - mean) * (x[start + i] - mean);
    const float inverse = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float shift = bias == nullptr ? 0.f : bias[first + i];
        out[start + i] = (x[start + i] - mean) * inverse * weight[first + i] + shift;
    }
}

// Block x is the head. `frequencies` (dims / 2) are angles a position.
PLAIN op_rope(const float* x, const double* frequencies, const int* positions, float* out, float magnitude, int head_dim,
           int dims, int is_halves) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const size_t start = (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * head_dim;
    const int position = positions[blockIdx.y];
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        if (i >= dims) {
            out[start + i] = x[start + i];
        } else if (i < dims / 2) {
            const int first = is_halves ? i : 2 * i, second = is_halves ? i + dims / 2 : 2 * i + 1;
            const float2 turn = rope_turn(position, frequencies[i], magnitude);
            const float a = x[start + first], b = x[start + second];
            out[start + first] = a * turn.x - b * turn.y;
            out[start + second] = a * turn.y + b * turn.x;
        }
    }
}
