// Reads buffers and launches from standard input, runs them in order, and writes all buffers to standard output.
//
//   u32 buffers, each: u64 bytes, content
//   u32 launches, each: u32 length of the name, name, u32 gridDim.x, u32 gridDim.y, arguments
//
// A pointer is a u32, the buffer's number plus one, or 0 for null; any other argument is its bytes.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulation.h"

#include "cuda/prelude.cuh"

namespace relu_source {
#include "relu/kernels.cu"
#undef KERNELS
}
namespace max_pool2d_source {
#include "max_pool2d/kernels.cu"
#undef KERNELS
}
namespace avg_pool2d_source {
#include "avg_pool2d/kernels.cu"
#undef KERNELS
}
namespace batch_norm_source {
#include "batch_norm/kernels.cu"
#undef KERNELS
}
namespace dropout_source {
#include "dropout/kernels.cu"
#undef KERNELS
}
namespace cross_entropy_source {
#include "cross_entropy/kernels.cu"
#undef KERNELS
}
namespace conv2d_source {
#include "conv2d/kernels.cu"
#undef KERNELS
}
namespace training_source {
#include "cuda/training.cu"
#undef KERNELS
}

namespace {

[[noreturn]] void fail(const std::string &what) {
    std::fprintf(stderr, "emulation: %s\n", what.c_str());
    std::exit(1);
}

void read(void *to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, stdin) != bytes) {
        fail("the input ends early");
    }
}

template <typename T> T read() {
    T value;
    read(&value, sizeof value);
    return value;
}

// Each of its exact size, so that AddressSanitizer sees a step beyond.
std::vector<std::pair<void *, size_t>> buffers;

void *buffer(uint64_t number) {
    if (number > buffers.size()) {
        fail("no buffer " + std::to_string(number));
    }
    return number ? buffers[number - 1].first : nullptr;
}

template <typename A> struct Argument {
    static A take() {
        if constexpr (std::is_pointer_v<A>) {
            return static_cast<A>(buffer(read<uint32_t>()));
        } else {
            return read<A>();
        }
    }
};

// In it, pointers are numbers of buffers.
template <typename T> struct Argument<training_source::Chunk<T>> {
    static training_source::Chunk<T> take() {
        auto chunk = read<training_source::Chunk<T>>();
        for (int i = 0; i < TENSORS; i++) {
            chunk.parameter[i] = static_cast<T *>(buffer(reinterpret_cast<uint64_t>(chunk.parameter[i])));
            chunk.gradient[i] = static_cast<const T *>(buffer(reinterpret_cast<uint64_t>(chunk.gradient[i])));
            chunk.buffer[i] = static_cast<T *>(buffer(reinterpret_cast<uint64_t>(chunk.buffer[i])));
        }
        return chunk;
    }
};

void for_each_block(const std::function<void()> &run) {
    for (unsigned int y = 0; y < gridDim.y; y++) {
        for (unsigned int x = 0; x < gridDim.x; x++) {
            blockIdx = {x, y, 0};
            run();
        }
    }
}

template <typename... A> std::function<void()> kernel(void (*function)(A...), bool synchronizes) {
    return [=] {
        // In braces, they are taken in order.
        std::tuple<A...> arguments{Argument<A>::take()...};
        auto run = [&] { std::apply(function, arguments); };
        if (!synchronizes) {
            for_each_block([&] {
                for (threadIdx = {0, 0, 0}; threadIdx.x < THREADS; threadIdx.x++) {
                    run();
                }
            });
            return;
        }
        std::barrier<> barrier(THREADS);
        block_barrier = &barrier;
        std::vector<std::thread> threads;
        for (unsigned int t = 0; t < THREADS; t++) {
            threads.emplace_back([&, t] {
                threadIdx = {t, 0, 0};
                for_each_block([&] {
                    run();
                    barrier.arrive_and_wait();
                });
            });
        }
        for (auto &thread : threads) {
            thread.join();
        }
    };
}

#define ONE(FILE, NAME, SYNC)                                                                                          \
    { #NAME, kernel(FILE##_source::NAME, SYNC) }
#define TWO(FILE, NAME, SYNC) ONE(FILE, NAME##_f32, SYNC), ONE(FILE, NAME##_f64, SYNC)
#define THREE(FILE, NAME, SYNC) TWO(FILE, NAME, SYNC), ONE(FILE, NAME##_bf16, SYNC)

const std::map<std::string, std::function<void()>> kernels = {
    THREE(relu, relu, false),
    THREE(max_pool2d, max_pool2d_forward, false),
    THREE(max_pool2d, max_pool2d_winners, false),
    THREE(max_pool2d, max_pool2d_backward, false),
    THREE(avg_pool2d, avg_pool2d_forward, false),
    THREE(avg_pool2d, avg_pool2d_backward, false),
    THREE(batch_norm, batch_norm_moments, true),
    TWO(batch_norm, batch_norm_join_moments, false),
    TWO(batch_norm, batch_norm_invert, false),
    THREE(batch_norm, batch_norm_apply, false),
    THREE(batch_norm, batch_norm_gradient_sums, true),
    TWO(batch_norm, batch_norm_join_sums, false),
    THREE(batch_norm, batch_norm_input_gradient, false),
    THREE(dropout, dropout, false),
    THREE(cross_entropy, cross_entropy_rows, true),
    THREE(cross_entropy, cross_entropy_mean, true),
    THREE(cross_entropy, cross_entropy_gradient, true),
    THREE(conv2d, conv2d_bias_activation, false),
    THREE(conv2d, conv2d_mask_and_sum, true),
    THREE(conv2d, conv2d_add_parts, false),
    THREE(training, gather_normalized, false),
    THREE(training, count_correct, true),
    TWO(training, sgd, false),
};

} // namespace

int main() {
    for (uint32_t left = read<uint32_t>(); left > 0; left--) {
        uint64_t bytes = read<uint64_t>();
        void *memory = std::malloc(bytes);
        read(memory, bytes);
        buffers.emplace_back(memory, bytes);
    }
    blockDim = {THREADS, 1, 1};
    for (uint32_t left = read<uint32_t>(); left > 0; left--) {
        std::string name(read<uint32_t>(), ' ');
        read(name.data(), name.size());
        unsigned int x = read<uint32_t>();
        gridDim = {x, read<uint32_t>(), 1};
        auto found = kernels.find(name);
        if (found == kernels.end()) {
            fail("no kernel " + name);
        }
        found->second();
    }
    for (auto [memory, bytes] : buffers) {
        std::fwrite(memory, 1, bytes, stdout);
        std::free(memory);
    }
    return std::fflush(stdout) ? 1 : 0;
}
