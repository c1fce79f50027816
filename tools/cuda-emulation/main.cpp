// Reads buffers and launches from standard input, runs them in order, and writes all buffers to standard output.
//
//   u32 buffers, each: u64 bytes, content
//   u32 launches, each: u32 length of the name, name, u32 gridDim.x, u32 gridDim.y, arguments
//
// A pointer is a u32, the buffer's number plus one, or 0 for null; any other argument is its bytes.

#include <barrier>
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

inline std::barrier<> *block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

#include "kernels.h"

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
const std::map<std::string, std::function<void()>> kernels = {EACH_KERNEL};

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
