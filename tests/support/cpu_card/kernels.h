// Follows the kernels in the text of a library and makes an Entry of each; cuda_threads.h, which runs them, comes before.
#pragma once

#include <type_traits>
#include <utility>

#include "entry.h"

namespace {

template <class... Args, size_t... kPlaces>
void call_with(void (*kernel)(Args...), void** arguments, std::index_sequence<kPlaces...>) {
    kernel(*static_cast<std::remove_reference_t<Args>*>(arguments[kPlaces])...);
}

template <class... Args>
void run_kernel(void (*kernel)(Args...), void** arguments, dim3 blocks, unsigned threads) {
    launch(blocks, threads, [=] { call_with(kernel, arguments, std::index_sequence_for<Args...>()); });
}

template <class... Args>
const unsigned* sizes_of(void (*)(Args...)) {
    static const unsigned sizes[] = {sizeof(Args)..., 0};
    return sizes;
}

template <class... Args>
constexpr unsigned count_of(void (*)(Args...)) { return sizeof...(Args); }

}  // namespace

#define ENTRY(kernel)                                                                           \
    Entry{#kernel,                                                                              \
          [](void** arguments, unsigned x, unsigned y, unsigned z, unsigned threads) {          \
              run_kernel(kernel, arguments, {x, y, z}, threads);                                \
          },                                                                                    \
          sizes_of(kernel), count_of(kernel)}
