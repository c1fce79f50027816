// A CUDA device that is none: the part of the driver, NVRTC, cuDNN, cuBLAS, cuRAND and NCCL that this project calls, on the CPU.
//
// Built as one library that takes the place of all of them, so that programs built with `--features cuda` run as they
// are on a machine without CUDA. Work is done when it is given to a stream, unless the stream is being captured: then
// it becomes part of a graph and nothing is computed, as on a GPU. What a GPU may forgive is fatal here: a write
// beyond an allocation, and memory given to a library that is freed or too small. What it would refuse is refused: waiting
// for a stream that is being captured, copying from or to the host in one, freeing in one what was not allocated there.
// Fresh memory and freed memory are NaN.
//
// CUDA_EMULATION_MEMORY is the device's size in MiB (8192), CUDA_EMULATION_LOG=1 prints every launch. CUDA_EMULATION_DEVICES is how
// many there are (1), of which a process computes on one. CUDA_EMULATION_REFUSES_GRAPHS is the number of a device that has no memory for
// a recorded step.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <type_traits>
#include <vector>

#include "fibers.h"
#include "kernels.h"
#include "nccl.h"

namespace {

using Address = unsigned long long;

[[noreturn]] void fatal(const char *format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::fputs("CUDA emulation: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    std::abort();
}

// Everything below is called from several threads of a test, and keeps state that is the device's.
std::recursive_mutex device_mutex;
#define LOCKED std::lock_guard<std::recursive_mutex> locked(device_mutex)

// ---- Memory ----

enum : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    NOT_FOUND = 500,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNJOINED = 904,
};

constexpr int MOST_DEVICES = Ranks::MOST;
constexpr size_t GUARD = 256;
constexpr unsigned char FENCE = 0xA5;

struct Graph;

struct Block {
    size_t bytes;
    // The graph that allocates it each time that it is launched; null for an ordinary allocation.
    Graph *graph;
    bool live;
};

// By address. Freed memory stays for a while, so that who still reads it reads NaN.
std::map<Address, Block> blocks;
std::vector<Address> freed;
size_t in_use, most_in_use, freed_bytes;
// What the driver does not get back: the pool of streams keeps the most that was in use at once, graphs keep theirs aside.
struct Held {
    size_t used, held;
    size_t held_with(size_t bytes) const { return std::max(held, used + bytes); }
    void take(size_t bytes) { held = held_with(bytes), used += bytes; }
} pool, graphs;

size_t capacity() {
    static const size_t bytes = [] {
        const char *text = std::getenv("CUDA_EMULATION_MEMORY");
        return (text ? std::strtoull(text, nullptr, 10) : 8192ull) << 20;
    }();
    return bytes;
}

size_t padded(size_t bytes) { return (bytes + GUARD - 1) / GUARD * GUARD; }

void check_fences(Address at, const Block &block, const char *when) {
    auto bytes = reinterpret_cast<unsigned char *>(at);
    auto is_fence = [](unsigned char byte) { return byte == FENCE; };
    bool before = std::all_of(bytes - GUARD, bytes, is_fence);
    bool after = std::all_of(bytes + block.bytes, bytes + padded(block.bytes) + GUARD, is_fence);
    if (!before || !after) {
        fatal("%s: something was written %s an allocation of %zu bytes", when, before ? "behind" : "before", block.bytes);
    }
}

void forget(Address at) {
    std::free(reinterpret_cast<void *>(at - GUARD));
    blocks.erase(at);
}

void count_in(Address at) {
    auto [bytes, graph, live] = blocks.at(at);
    (graph ? graphs : pool).take(bytes);
    in_use += bytes;
    most_in_use = std::max(most_in_use, in_use);
}

void count_out(Address at) {
    auto [bytes, graph, live] = blocks.at(at);
    (graph ? graphs : pool).used -= bytes;
    in_use -= bytes;
}

int allocate(Address *at, size_t bytes, Graph *graph) {
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    if (!graph && pool.held_with(bytes) + graphs.held > capacity()) {
        return OUT_OF_MEMORY;
    }
    size_t whole = padded(bytes) + 2 * GUARD;
    auto raw = static_cast<unsigned char *>(std::aligned_alloc(GUARD, whole));
    if (!raw) {
        return OUT_OF_MEMORY;
    }
    std::memset(raw, FENCE, whole);
    std::memset(raw + GUARD, 0xFF, bytes);
    *at = reinterpret_cast<Address>(raw + GUARD);
    // That of a graph exists while it runs.
    blocks[*at] = {bytes, graph, !graph};
    if (!graph) {
        count_in(*at);
    }
    return SUCCESS;
}

void release(Address at) {
    Block &block = blocks.at(at);
    check_fences(at, block, "free");
    std::memset(reinterpret_cast<void *>(at), 0xFF, block.bytes);
    block.live = false;
    count_out(at);
    if (block.graph) {
        return;
    }
    freed.push_back(at);
    freed_bytes += block.bytes;
    size_t gone = 0;
    while (freed_bytes > (256u << 20) && gone < freed.size()) {
        freed_bytes -= blocks.at(freed[gone]).bytes;
        forget(freed[gone++]);
    }
    freed.erase(freed.begin(), freed.begin() + gone);
}

// The allocation that holds all of `bytes` from `at` on.
void check_range(Address at, size_t bytes, const char *what) {
    auto next = blocks.upper_bound(at);
    if (next != blocks.begin()) {
        auto [begin, block] = *std::prev(next);
        if (at + bytes <= begin + block.bytes) {
            if (!block.live) {
                fatal("%s: %zu bytes of memory that was freed", what, bytes);
            }
            return;
        }
    }
    fatal("%s: %zu bytes that lie in no allocation", what, bytes);
}

// ---- Streams and graphs ----

struct Stream;

struct Graph {
    std::vector<std::function<void()>> nodes;
    // Streams that wait for the one that is captured.
    std::vector<Stream *> others;
    std::vector<Address> allocated;
    // Bytes of it that are free at this point of the capture, for streams that come after who freed them: branches side by side have
    // memory of their own. And the bytes that it needs so far.
    struct Free {
        size_t bytes;
        Stream *by;
        uint64_t clock;
    };
    std::vector<Free> free;
    size_t most = 0;
    int references = 1;

    void take(size_t bytes, Stream &stream);
};

struct Stream {
    Graph *captured = nullptr;
    bool broken = false;
    // How much was given to it, and how much of other streams' work it has waited for.
    uint64_t clock = 0;
    std::map<Stream *, uint64_t> seen;
    // Of the pool, freed by it since it was waited for; and whether it was given a graph, which may still run.
    size_t freed_lately = 0;
    bool launched_lately = false;
    uint64_t saw(Stream *other) const {
        auto found = seen.find(other);
        return found == seen.end() ? 0 : found->second;
    }
};

void Graph::take(size_t bytes, Stream &stream) {
    for (Free &of : free) {
        if (of.by == &stream || stream.saw(of.by) >= of.clock) {
            size_t again = std::min(bytes, of.bytes);
            bytes -= again, of.bytes -= again;
        }
    }
    std::erase_if(free, [](const Free &of) { return of.bytes == 0; });
    most += bytes;
}

struct Event {
    Stream *stream = nullptr;
    uint64_t clock = 0;
    std::map<Stream *, uint64_t> seen;
};

Stream default_stream;
// Those that there are besides.
std::set<Stream *> streams;

Stream &stream_of(void *stream) {
    auto number = reinterpret_cast<uintptr_t>(stream);
    // The null stream, the legacy one and that of each thread have small numbers.
    return number <= 2 ? default_stream : *static_cast<Stream *>(stream);
}

bool logs() {
    static const bool on = std::getenv("CUDA_EMULATION_LOG") != nullptr;
    return on;
}

// Here work is done as it is given. On a GPU streams run side by side, so that whoever touches memory must have waited for
// those that touched it before on another stream. Streams of which none ever waits for the other have memory of their own, and
// so have threads.
struct Access {
    Address begin, end;
    bool writes;
    Stream *stream;
    uint64_t clock;
    std::thread::id thread;
};
std::vector<Access> accesses;

void touch(Stream &stream, Address begin, Address end, bool writes, const char *what, bool is_exact = false) {
    auto thread = std::this_thread::get_id();
    for (const Access &before : accesses) {
        // What may have touched anything has not touched what a stream takes and frees for itself.
        if (is_exact && before.end == ~Address(0)) {
            continue;
        }
        bool together = before.stream->seen.contains(&stream) || stream.seen.contains(before.stream);
        if (before.thread == thread && before.stream != &stream && together && (writes || before.writes) && before.begin < end &&
            begin < before.end && stream.saw(before.stream) < before.clock) {
            fatal("%s: another stream may still work on its memory", what);
        }
    }
    accesses.push_back({begin, end, writes, &stream, ++stream.clock, thread});
}

// Who gives work from now on has waited for all that the stream has, and for what that has waited for.
void done(Stream &stream) {
    std::erase_if(accesses, [&](const Access &before) {
        return before.stream == &stream || stream.saw(before.stream) >= before.clock;
    });
}

// Of work that may touch anything.
void touch_all(Stream &stream, const char *what) {
    touch(stream, 0, ~Address(0), true, what);
    // What comes later waits for this, and so for what this has waited for.
    auto thread = std::this_thread::get_id();
    std::erase_if(accesses, [&](const Access &before) {
        bool is_this = before.stream == &stream && before.clock == stream.clock;
        return before.thread == thread && !is_this && (before.stream == &stream || stream.saw(before.stream) >= before.clock);
    });
}

template <typename... A> void log_of(const char *format, A... arguments) {
    if (logs()) {
        std::fputs("CUDA emulation: ", stderr);
        std::fprintf(stderr, format, arguments...);
        std::fprintf(stderr, " (%zu MiB in use, %zu at most, %zu held)\n", in_use >> 20, most_in_use >> 20, (pool.held + graphs.held) >> 20);
    }
}

// The number of the work that is done, on any stream.
uint64_t works_done = 0;

int submit(void *handle, std::function<void()> work) {
    Stream &stream = stream_of(handle);
    if (stream.captured) {
        stream.captured->nodes.push_back(std::move(work));
    } else {
        works_done++;
        work();
    }
    return SUCCESS;
}

// What cannot be part of a graph, and spoils one that is being captured.
int not_in_capture(void *handle) {
    Stream &stream = stream_of(handle);
    if (stream.captured) {
        stream.broken = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

void drop_graph(Graph *graph) {
    if (--graph->references > 0) {
        return;
    }
    for (Address at : graph->allocated) {
        if (blocks.at(at).live) {
            release(at);
        }
        forget(at);
    }
    delete graph;
}

// ---- Kernels ----

struct Kernel {
    std::string name;
    // Takes the arguments out of CUDA's list, which lasts no longer than the call, and gives the work.
    std::function<std::function<void()>(void **)> bind;
    // What it writes and what it only reads; empty where it has tables of pointers.
    std::function<std::vector<std::pair<Address, bool>>(void **)> pointers;
};

template <typename A> void add_pointer(std::vector<std::pair<Address, bool>> &to, void *given) {
    if constexpr (std::is_pointer_v<A>) {
        to.emplace_back(*static_cast<Address *>(given), !std::is_const_v<std::remove_pointer_t<A>>);
    }
}

template <typename... A, size_t... I>
std::vector<std::pair<Address, bool>> pointers_of([[maybe_unused]] void **given, std::index_sequence<I...>) {
    std::vector<std::pair<Address, bool>> pointers;
    // Structures are windows of a pool, or else tables.
    if constexpr (((!std::is_class_v<A> || sizeof(A) <= 32) && ...)) {
        (add_pointer<A>(pointers, given[I]), ...);
    }
    return pointers;
}

struct Grid {
    unsigned int x, y, z;
};

// Of the launch that is being bound.
Grid launch_grid, launch_block;

template <typename... A, size_t... I>
std::tuple<A...> arguments_of(void **given, std::index_sequence<I...>) {
    return {*static_cast<std::remove_const_t<A> *>(given[I])...};
}

template <typename... A> Kernel block_kernel(const char *name, void (*function)(A...), bool synchronizes) {
    auto bind = [=](void **given) -> std::function<void()> {
        auto arguments = arguments_of<A...>(given, std::index_sequence_for<A...>());
        Grid grid = launch_grid;
        if (launch_block.x != THREADS || launch_block.y * launch_block.z != 1 || grid.z != 1) {
            fatal("%s: %u×%u×%u threads a block, not %d", name, launch_block.x, launch_block.y, launch_block.z, THREADS);
        }
        return [=] {
            blockDim = {THREADS, 1, 1};
            gridDim = {grid.x, grid.y, 1};
            auto run = [&] { std::apply(function, arguments); };
            for (unsigned int y = 0; y < grid.y; y++) {
                for (unsigned int x = 0; x < grid.x; x++) {
                    blockIdx = {x, y, 0};
                    if (synchronizes) {
                        run_fibers(THREADS, run);
                        continue;
                    }
                    for (threadIdx = {0, 0, 0}; threadIdx.x < THREADS; threadIdx.x++) {
                        run();
                    }
                }
            }
        };
    };
    auto pointers = [](void **given) { return pointers_of<A...>(given, std::index_sequence_for<A...>()); };
    return {name, bind, pointers};
}

// Those of Candle's own kernels that the project comes by: over all elements at once, since what they launch is theirs.
template <typename... A> Kernel whole_kernel(const std::string &name, void (*function)(A...)) {
    auto bind = [=](void **given) -> std::function<void()> {
        auto arguments = arguments_of<A...>(given, std::index_sequence_for<A...>());
        return [=] { std::apply(function, arguments); };
    };
    return {name, bind, nullptr};
}

size_t strided(size_t index, size_t dims, const size_t *sizes, const size_t *strides) {
    size_t at = 0;
    for (size_t d = dims; d-- > 0; index /= sizes[d]) {
        at += index % sizes[d] * strides[d];
    }
    return at;
}

// Where element `index` of an operand is: the first, second … of those whose strides follow the sizes in `info`.
size_t place(size_t index, size_t dims, const size_t *info, size_t operand) {
    return info ? strided(index, dims, info, info + (1 + operand) * dims) : index;
}

template <typename T> auto value_of(T value) { return value; }
float value_of(bf16 value) { return widen(value); }
template <typename T, typename V> void set(T &to, V value) { to = static_cast<T>(value); }
template <typename V> void set(bf16 &to, V value) { store(&to, static_cast<float>(value)); }

// To the 10 bits of mantissa of TF32, halves away from zero.
float to_tf32(float value) { return std::isfinite(value) ? __uint_as_float((__float_as_uint(value) + 0x1000) & ~0x1fffu) : value; }
double to_tf32(double value) { return value; }

template <typename T, typename F> void unary(size_t n, size_t dims, const size_t *info, const T *x, T *y, F f) {
    for (size_t i = 0; i < n; i++) {
        set(y[i], f(value_of(x ? x[place(i, dims, info, 0)] : y[i])));
    }
}

template <typename T, typename F>
void binary(size_t n, size_t dims, const size_t *info, const T *a, const T *b, T *y, F f) {
    for (size_t i = 0; i < n; i++) {
        set(y[i], f(value_of(a[place(i, dims, info, 0)]), value_of(b[place(i, dims, info, 1)])));
    }
}

template <typename T, typename F>
void compare(size_t n, size_t dims, const size_t *info, const T *a, const T *b, uint8_t *y, F f) {
    for (size_t i = 0; i < n; i++) {
        y[i] = f(value_of(a[place(i, dims, info, 0)]), value_of(b[place(i, dims, info, 1)]));
    }
}

template <typename S, typename T> void cast(size_t n, size_t dims, const size_t *info, const S *x, T *y) {
    for (size_t i = 0; i < n; i++) {
        set(y[i], value_of(x[place(i, dims, info, 0)]));
    }
}

template <typename T> void affine(size_t n, size_t dims, const size_t *info, const T *x, T *y, T factor, T addend) {
    unary(n, dims, info, x, y, [=](auto v) { return v * value_of(factor) + value_of(addend); });
}

template <typename T> void fill(T *to, T value, size_t n) { std::fill(to, to + n, value); }

template <typename T> void const_set(size_t n, size_t dims, const size_t *info, T value, T *to) {
    for (size_t i = 0; i < n; i++) {
        to[place(i, dims, info, 0)] = value;
    }
}

template <typename T> void copy2d(const T *x, T *y, uint32_t rows, uint32_t columns, uint32_t from, uint32_t to) {
    for (uint32_t r = 0; r < rows; r++) {
        std::copy(x + size_t(r) * from, x + size_t(r) * from + columns, y + size_t(r) * to);
    }
}

// `outputs` is the number of elements for all but the kernel of small sums.
template <typename T, bool SMALL>
void fast_sum(size_t n, size_t each, size_t dims, const size_t *info, const T *x, T *y) {
    size_t outputs = SMALL ? n : n / each;
    for (size_t o = 0; o < outputs; o++) {
        decltype(value_of(T()) + 0) sum = 0;
        for (size_t i = 0; i < each; i++) {
            sum += value_of(x[place(o * each + i, dims, info, 0)]);
        }
        set(y[o], sum);
    }
}

template <typename T>
void index_select(size_t n, size_t dims, const size_t *info, const uint32_t *ids, const T *x, T *y, size_t left,
                  size_t size, size_t count, size_t right) {
    (void)left;
    for (size_t i = 0; i < n; i++) {
        uint32_t id = ids[place(i / right % count, dims, info, 0)];
        if (id >= size) {
            fatal("index_select: %u of %zu", id, size);
        }
        y[i] = x[(i / right / count * size + id) * right + i % right];
    }
}

template <typename T> void add_numeric(std::map<std::string, Kernel> &all, const std::string &type) {
    auto add = [&](const std::string &name, auto function) { all[name] = whole_kernel(name, +function); };
    using N = size_t;
    using I = const size_t *;
    add("badd_" + type, [](N n, N d, I i, const T *a, const T *b, T *y) { binary(n, d, i, a, b, y, [](auto u, auto v) { return u + v; }); });
    add("bsub_" + type, [](N n, N d, I i, const T *a, const T *b, T *y) { binary(n, d, i, a, b, y, [](auto u, auto v) { return u - v; }); });
    add("bmul_" + type, [](N n, N d, I i, const T *a, const T *b, T *y) { binary(n, d, i, a, b, y, [](auto u, auto v) { return u * v; }); });
    add("bdiv_" + type, [](N n, N d, I i, const T *a, const T *b, T *y) { binary(n, d, i, a, b, y, [](auto u, auto v) { return u / v; }); });
    add("eq_" + type, [](N n, N d, I i, const T *a, const T *b, uint8_t *y) { compare(n, d, i, a, b, y, [](auto u, auto v) { return u == v; }); });
    add("ne_" + type, [](N n, N d, I i, const T *a, const T *b, uint8_t *y) { compare(n, d, i, a, b, y, [](auto u, auto v) { return u != v; }); });
    add("gt_" + type, [](N n, N d, I i, const T *a, const T *b, uint8_t *y) { compare(n, d, i, a, b, y, [](auto u, auto v) { return u > v; }); });
    add("lt_" + type, [](N n, N d, I i, const T *a, const T *b, uint8_t *y) { compare(n, d, i, a, b, y, [](auto u, auto v) { return u < v; }); });
    add("affine_" + type, affine<T>);
    add("fast_sum_" + type, fast_sum<T, false>);
    add("fast_sum_small_" + type, fast_sum<T, true>);
}

template <typename T> void add_real(std::map<std::string, Kernel> &all, const std::string &type) {
    add_numeric<T>(all, type);
    auto add = [&](const std::string &name, auto function) { all[name] = whole_kernel(name, +function); };
    using N = size_t;
    using I = const size_t *;
    add("usqr_" + type, [](N n, N d, I i, const T *x, T *y) { unary(n, d, i, x, y, [](auto v) { return v * v; }); });
    add("usqrt_" + type, [](N n, N d, I i, const T *x, T *y) { unary(n, d, i, x, y, [](auto v) { return std::sqrt(v); }); });
    add("urecip_" + type, [](N n, N d, I i, const T *x, T *y) { unary(n, d, i, x, y, [](auto v) { return 1 / v; }); });
    add("uneg_" + type, [](N n, N d, I i, const T *x, T *y) { unary(n, d, i, x, y, [](auto v) { return -v; }); });
    add("uabs_" + type, [](N n, N d, I i, const T *x, T *y) { unary(n, d, i, x, y, [](auto v) { return std::fabs(v); }); });
}

template <typename T> void add_movement(std::map<std::string, Kernel> &all, const std::string &type) {
    auto add = [&](const std::string &name, auto function) { all[name] = whole_kernel(name, +function); };
    add("ucopy_" + type, [](size_t n, size_t d, const size_t *i, const T *x, T *y) {
        for (size_t at = 0; at < n; at++) {
            y[at] = x[place(at, d, i, 0)];
        }
    });
    add("fill_" + type, fill<T>);
    add("const_set_" + type, const_set<T>);
    add("copy2d_" + type, copy2d<T>);
    add("is_u32_" + type, index_select<T>);
    add("cast_" + type + "_f32", cast<T, float>);
    add("cast_" + type + "_f64", cast<T, double>);
    add("cast_" + type + "_bf16", cast<T, bf16>);
    add("cast_" + type + "_u32", cast<T, uint32_t>);
    add("cast_" + type + "_u8", cast<T, uint8_t>);
}

const std::map<std::string, Kernel> &kernels() {
    static const std::map<std::string, Kernel> all = [] {
        std::map<std::string, Kernel> all;
#define ONE(FILE, NAME, SYNC) block_kernel(#NAME, FILE##_source::NAME, SYNC)
        for (const Kernel &kernel : {EACH_KERNEL}) {
            all[kernel.name] = kernel;
        }
        add_real<float>(all, "f32");
        add_real<double>(all, "f64");
        add_real<bf16>(all, "bf16");
        add_numeric<uint32_t>(all, "u32");
        add_numeric<int64_t>(all, "i64");
        add_movement<float>(all, "f32");
        add_movement<double>(all, "f64");
        add_movement<bf16>(all, "bf16");
        add_movement<uint32_t>(all, "u32");
        add_movement<uint8_t>(all, "u8");
        add_movement<int64_t>(all, "i64");
        return all;
    }();
    return all;
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

// ---- The driver ----

API int cuInit(unsigned) { return SUCCESS; }
API int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
static int devices() {
    static const int number = [] {
        const char *text = std::getenv("CUDA_EMULATION_DEVICES");
        return text ? std::clamp(std::atoi(text), 0, MOST_DEVICES) : 1;
    }();
    return number;
}
API int cuDeviceGet(int *device, int ordinal) {
    return *device = ordinal, 0 <= ordinal && ordinal < devices() ? SUCCESS : INVALID_DEVICE;
}
API int cuDeviceGetCount(int *count) { return *count = devices(), SUCCESS; }
API int cuDeviceGetName(char *name, int length, int) {
    std::snprintf(name, length, "emulated on the CPU");
    return SUCCESS;
}
API int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = capacity(), SUCCESS; }
API int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 75: // compute capability, major
        *value = 9;
        break;
    case 76: // minor
        *value = 0;
        break;
    case 115: // memory pools
        *value = 1;
        break;
    case 16: // multiprocessors
        *value = 132;
        break;
    default:
        *value = 0;
    }
    return SUCCESS;
}
static int primary_contexts[MOST_DEVICES];
static thread_local void *current_context;
API int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &primary_contexts[device], SUCCESS; }
API int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API int cuCtxGetCurrent(void **context) { return *context = current_context, SUCCESS; }
API int cuCtxSetCurrent(void *context) { return current_context = context, SUCCESS; }
// It waits for all streams, and so for one that another thread is capturing, too.
API int cuCtxSynchronize() {
    LOCKED;
    int status = SUCCESS;
    for (Stream *stream : streams) {
        if (int refused = not_in_capture(stream)) {
            status = refused;
        }
    }
    return status;
}
API int cuCtxSetFlags(unsigned) { return SUCCESS; }

API int cuStreamCreate(void **stream, unsigned) {
    LOCKED;
    // Memory is not told apart by device.
    static void *const computes_on = current_context;
    if (current_context != computes_on) {
        fatal("a process that computes on two devices");
    }
    auto made = new Stream;
    streams.insert(made);
    return *stream = made, SUCCESS;
}
API int cuStreamDestroy_v2(void *stream) {
    LOCKED;
    std::erase_if(accesses, [=](const Access &access) { return access.stream == stream; });
    streams.erase(static_cast<Stream *>(stream));
    // Not freed: what others know of it must not be taken for knowledge of the next at the same address.
    return SUCCESS;
}
API int cuStreamSynchronize(void *stream) {
    LOCKED;
    if (int status = not_in_capture(stream)) {
        return status;
    }
    Stream &of = stream_of(stream);
    of.freed_lately = 0, of.launched_lately = false;
    done(of);
    return SUCCESS;
}
API int cuStreamWaitEvent(void *stream, void *of, unsigned) {
    LOCKED;
    Stream &waits = stream_of(stream);
    auto event = static_cast<Event *>(of);
    if (!event->stream) {
        return SUCCESS;
    }
    waits.seen[event->stream] = std::max(waits.seen[event->stream], event->clock);
    for (auto [other, clock] : event->seen) {
        waits.seen[other] = std::max(waits.seen[other], clock);
    }
    // Who waits for a stream that is captured is captured with it.
    if (Graph *graph = event->stream->captured; graph && !waits.captured) {
        waits.captured = graph;
        waits.broken = false;
        graph->others.push_back(&waits);
    }
    return SUCCESS;
}
API int cuStreamIsCapturing(void *stream, int *status) {
    LOCKED;
    Stream &of = stream_of(stream);
    return *status = of.captured ? (of.broken ? 2 : 1) : 0, SUCCESS;
}
API int cuStreamBeginCapture_v2(void *stream, int) {
    LOCKED;
    Stream &of = stream_of(stream);
    if (of.captured || &of == &default_stream) {
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    of.captured = new Graph;
    of.broken = false;
    return SUCCESS;
}
API int cuStreamEndCapture(void *stream, void **graph) {
    LOCKED;
    Stream &of = stream_of(stream);
    Graph *captured = std::exchange(of.captured, nullptr);
    if (!captured) {
        return INVALID_VALUE;
    }
    *graph = nullptr;
    bool joined = true;
    for (Stream *other : captured->others) {
        of.broken |= other->broken;
        joined &= of.saw(other) >= other->clock;
        other->captured = nullptr;
    }
    if (of.broken || !joined) {
        drop_graph(captured);
        return of.broken ? STREAM_CAPTURE_INVALIDATED : STREAM_CAPTURE_UNJOINED;
    }
    *graph = captured;
    return SUCCESS;
}
// Gets the memory of a graph, unless what graphs keep is enough.
int hold_for(const Graph &graph) {
    size_t held = graphs.held_with(graph.most);
    if (pool.held + held > capacity()) {
        return OUT_OF_MEMORY;
    }
    return graphs.held = held, SUCCESS;
}
API int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) {
    LOCKED;
    if (flags & ~15ull) {
        return INVALID_VALUE;
    }
    auto of = static_cast<Graph *>(graph);
    of->references++;
    return *exec = of, SUCCESS;
}
API int cuGraphUpload(void *exec, void *) {
    LOCKED;
    const char *refuses = std::getenv("CUDA_EMULATION_REFUSES_GRAPHS");
    if (refuses && current_context == &primary_contexts[std::clamp(std::atoi(refuses), 0, MOST_DEVICES - 1)]) {
        return OUT_OF_MEMORY;
    }
    return hold_for(*static_cast<Graph *>(exec));
}
API int cuGraphLaunch(void *exec, void *stream) {
    LOCKED;
    if (int status = not_in_capture(stream)) {
        return status;
    }
    Stream &of = stream_of(stream);
    touch_all(of, "a graph");
    of.launched_lately = true;
    auto graph = static_cast<Graph *>(exec);
    // What the launch before did not free is freed now.
    for (Address at : graph->allocated) {
        if (blocks.at(at).live) {
            release(at);
        }
    }
    if (int status = hold_for(*graph)) {
        return status;
    }
    for (const auto &node : graph->nodes) {
        works_done++;
        node();
    }
    return SUCCESS;
}
API int cuGraphExecDestroy(void *exec) { LOCKED; return drop_graph(static_cast<Graph *>(exec)), SUCCESS; }
API int cuGraphDestroy(void *graph) { LOCKED; return drop_graph(static_cast<Graph *>(graph)), SUCCESS; }

API int cuEventCreate(void **event, unsigned) { return *event = new Event, SUCCESS; }
API int cuEventRecord(void *event, void *stream) {
    LOCKED;
    Stream &of = stream_of(stream);
    return *static_cast<Event *>(event) = {&of, of.clock, of.seen}, SUCCESS;
}
API int cuEventSynchronize(void *) { return SUCCESS; }
API int cuEventQuery(void *) { return SUCCESS; }
API int cuEventDestroy_v2(void *event) { return delete static_cast<Event *>(event), SUCCESS; }
// All work takes the same time, so that what is chosen by it is the same each time.
API int cuEventElapsedTime(float *ms, void *start, void *end) {
    auto from = static_cast<Event *>(start), to = static_cast<Event *>(end);
    if (from->stream != to->stream) {
        fatal("the time between two streams is not emulated");
    }
    return *ms = 1e-3f * static_cast<float>(to->clock - from->clock), SUCCESS;
}
API int cuEventElapsedTime_v2(float *ms, void *start, void *end) { return cuEventElapsedTime(ms, start, end); }

API int cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = &primary_contexts, SUCCESS; }
// As with a release threshold of all memory, which is the only attribute that is ever set.
API int cuMemPoolSetAttribute(void *, int, void *) { return SUCCESS; }
API int cuMemPoolGetAttribute(void *, int attribute, void *value) {
    LOCKED;
    constexpr int RESERVED = 5, USED = 7;
    if (attribute != RESERVED && attribute != USED) {
        return INVALID_VALUE;
    }
    return *static_cast<uint64_t *>(value) = attribute == USED ? pool.used : pool.held, SUCCESS;
}
API int cuDeviceGetGraphMemAttribute(int, int attribute, void *value) {
    LOCKED;
    constexpr int USED = 0, RESERVED = 2;
    if (attribute != RESERVED && attribute != USED) {
        return INVALID_VALUE;
    }
    return *static_cast<uint64_t *>(value) = attribute == USED ? graphs.used : graphs.held, SUCCESS;
}
API int cuMemPoolTrimTo(void *, size_t keep) {
    LOCKED;
    size_t freed_lately = default_stream.freed_lately;
    for (Stream *stream : streams) {
        freed_lately += stream->freed_lately;
    }
    pool.held = std::clamp(std::max(keep, pool.used + freed_lately), pool.used, pool.held);
    return SUCCESS;
}
API int cuDeviceGraphMemTrim(int) {
    LOCKED;
    auto may_run = [](const Stream *stream) { return stream->launched_lately; };
    if (!may_run(&default_stream) && std::none_of(streams.begin(), streams.end(), may_run)) {
        graphs.held = graphs.used;
    }
    return SUCCESS;
}
API int cuMemGetInfo_v2(size_t *available, size_t *total) {
    LOCKED;
    return *available = capacity() - std::min(capacity(), pool.held + graphs.held), *total = capacity(), SUCCESS;
}
API int cuMemAlloc_v2(Address *at, size_t bytes) { LOCKED; return allocate(at, bytes, nullptr); }
API int cuMemFree_v2(Address at) { LOCKED; return release(at), SUCCESS; }
API int cuMemAllocAsync(Address *at, size_t bytes, void *stream) {
    LOCKED;
    Graph *graph = stream_of(stream).captured;
    if (int status = allocate(at, bytes, graph)) {
        return status;
    }
    touch(stream_of(stream), *at, *at + bytes, true, "an allocation", true);
    if (graph) {
        graph->allocated.push_back(*at);
        graph->take(bytes, stream_of(stream));
        graph->nodes.push_back([at = *at] {
            Block &block = blocks.at(at);
            std::memset(reinterpret_cast<void *>(at), 0xFF, block.bytes);
            block.live = true;
            count_in(at);
        });
    }
    return SUCCESS;
}
API int cuMemFreeAsync(Address at, void *stream) {
    LOCKED;
    auto found = blocks.find(at);
    if (found == blocks.end()) {
        return INVALID_VALUE;
    }
    Stream &of = stream_of(stream);
    if (of.captured && found->second.graph != of.captured) {
        of.broken = true;
        return INVALID_VALUE;
    }
    if (!of.captured && !found->second.live) {
        return INVALID_VALUE;
    }
    size_t bytes = found->second.bytes;
    touch(of, at, at + bytes, true, "freeing", true);
    if (of.captured) {
        of.captured->free.push_back({bytes, &of, of.clock});
    } else if (!found->second.graph) {
        of.freed_lately += bytes;
    }
    return submit(stream, [=] { release(at); });
}
API int cuMemsetD8Async(Address at, unsigned char value, size_t bytes, void *stream) {
    LOCKED;
    log_of("memset of %zu bytes", bytes);
    touch_all(stream_of(stream), "memset");
    return submit(stream, [=] {
        check_range(at, bytes, "memset");
        std::memset(reinterpret_cast<void *>(at), value, bytes);
    });
}
API int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
    LOCKED;
    // A graph would copy from that address each time, whatever is there by then.
    if (int status = not_in_capture(stream)) {
        return status;
    }
    check_range(to, bytes, "copy to the device");
    touch_all(stream_of(stream), "copy to the device");
    std::memcpy(reinterpret_cast<void *>(to), from, bytes);
    return SUCCESS;
}
API int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *stream) {
    LOCKED;
    if (int status = not_in_capture(stream)) {
        return status;
    }
    check_range(from, bytes, "copy to the host");
    touch_all(stream_of(stream), "copy to the host");
    std::memcpy(to, reinterpret_cast<void *>(from), bytes);
    return SUCCESS;
}
API int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void *stream) {
    LOCKED;
    log_of("copy of %zu bytes", bytes);
    touch_all(stream_of(stream), "copy");
    return submit(stream, [=] {
        check_range(to, bytes, "copy");
        check_range(from, bytes, "copy");
        std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
    });
}
API int cuMemHostAlloc(void **at, size_t bytes, unsigned) { return *at = std::malloc(bytes), SUCCESS; }
API int cuMemFreeHost(void *at) { return std::free(at), SUCCESS; }

API int cuModuleLoadData(void **module, const void *) { return *module = &primary_contexts, SUCCESS; }
API int cuModuleUnload(void *) { return SUCCESS; }
API int cuModuleGetFunction(void **function, void *, const char *name) {
    auto found = kernels().find(name);
    if (found == kernels().end()) {
        std::fprintf(stderr, "CUDA emulation: there is no kernel %s\n", name);
        return NOT_FOUND;
    }
    return *function = const_cast<Kernel *>(&found->second), SUCCESS;
}
API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned, void *stream, void **arguments, void **) {
    LOCKED;
    auto kernel = static_cast<Kernel *>(function);
    if (!gx || !gy || !gz || bx * by * bz > 1024) {
        return INVALID_VALUE;
    }
    log_of("%s, %u×%u blocks", kernel->name.c_str(), gx, gy);
    launch_grid = {gx, gy, gz};
    launch_block = {bx, by, bz};
    auto pointers = kernel->pointers ? kernel->pointers(arguments) : std::vector<std::pair<Address, bool>>();
    if (pointers.empty()) {
        touch_all(stream_of(stream), kernel->name.c_str());
    }
    for (auto [at, writes] : pointers) {
        // All of the allocation: the kernel knows how much of it.
        if (auto next = blocks.upper_bound(at); at && next != blocks.begin()) {
            auto &[begin, block] = *std::prev(next);
            touch(stream_of(stream), begin, begin + block.bytes, writes, kernel->name.c_str());
        }
    }
    return submit(stream, kernel->bind(arguments));
}

API int cuGetErrorName(int error, const char **name) {
    switch (error) {
    case OUT_OF_MEMORY:
        *name = "CUDA_ERROR_OUT_OF_MEMORY";
        break;
    case STREAM_CAPTURE_UNSUPPORTED:
        *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
        break;
    case STREAM_CAPTURE_INVALIDATED:
        *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
        break;
    case NOT_FOUND:
        *name = "CUDA_ERROR_NOT_FOUND";
        break;
    case INVALID_DEVICE:
        *name = "CUDA_ERROR_INVALID_DEVICE";
        break;
    default:
        *name = "CUDA_ERROR_INVALID_VALUE";
    }
    return SUCCESS;
}
API int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

// ---- NVRTC: the kernels are compiled already ----

struct Program {
    std::string source;
};
API int nvrtcCreateProgram(void **program, const char *source, const char *, int, const char *const *, const char *const *) {
    return *program = new Program{source}, 0;
}
API int nvrtcCompileProgram(void *, int, const char *const *) { return 0; }
API int nvrtcGetPTXSize(void *, size_t *size) { return *size = 9, 0; }
API int nvrtcGetPTX(void *, char *ptx) { return std::memcpy(ptx, "emulated", 9), 0; }
API int nvrtcGetProgramLogSize(void *, size_t *size) { return *size = 1, 0; }
API int nvrtcGetProgramLog(void *, char *log) { return *log = 0, 0; }
API int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
API int nvrtcGetNumSupportedArchs(int *count) { return *count = 2, 0; }
API int nvrtcGetSupportedArchs(int *known) { return known[0] = 75, known[1] = 90, 0; }
API int nvrtcDestroyProgram(void **program) { return delete static_cast<Program *>(*program), 0; }

// ---- cuRAND ----

struct Generator {
    std::mt19937_64 engine;
};
API int curandCreateGenerator(void **generator, int) { return *generator = new Generator, 0; }
API int curandDestroyGenerator(void *generator) { return delete static_cast<Generator *>(generator), 0; }
API int curandSetPseudoRandomGeneratorSeed(void *generator, unsigned long long seed) {
    return static_cast<Generator *>(generator)->engine.seed(seed), 0;
}
API int curandSetStream(void *, void *) { return 0; }
template <typename T, typename D> static int generate(void *generator, T *to, size_t n, D distribution) {
    std::generate(to, to + n, [&] { return distribution(static_cast<Generator *>(generator)->engine); });
    return 0;
}
API int curandGenerateUniform(void *g, float *to, size_t n) { return generate(g, to, n, std::uniform_real_distribution<float>()); }
API int curandGenerateUniformDouble(void *g, double *to, size_t n) { return generate(g, to, n, std::uniform_real_distribution<double>()); }
API int curandGenerateNormal(void *g, float *to, size_t n, float mean, float std) { return generate(g, to, n, std::normal_distribution<float>(mean, std)); }
API int curandGenerateNormalDouble(void *g, double *to, size_t n, double mean, double std) { return generate(g, to, n, std::normal_distribution<double>(mean, std)); }

// ---- cuBLAS ----

struct Blas {
    void *stream = nullptr;
};
API int cublasCreate_v2(void **handle) { return *handle = new Blas, 0; }
API int cublasDestroy_v2(void *handle) { return delete static_cast<Blas *>(handle), 0; }
API int cublasSetStream_v2(void *handle, void *stream) { return static_cast<Blas *>(handle)->stream = stream, 0; }
API int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }

// Column-major, C = alpha op(A) op(B) + beta C, for each of a batch.
template <typename T, typename S>
static int gemm(void *handle, int ta, int tb, int m, int n, int k, S alpha, const void *a, int lda, long long sa,
                const void *b, int ldb, long long sb, S beta, void *c, int ldc, long long sc, int batch, bool tf32 = false) {
    LOCKED;
    touch_all(stream_of(static_cast<Blas *>(handle)->stream), "a matrix product");
    log_of("matrix product %d×%d×%d, %d of them", m, n, k, batch);
    return submit(static_cast<Blas *>(handle)->stream, [=] {
        for (int image = 0; image < batch; image++) {
            auto x = static_cast<const T *>(a) + image * sa, y = static_cast<const T *>(b) + image * sb;
            auto z = static_cast<T *>(c) + image * sc;
            check_range(reinterpret_cast<Address>(z), (size_t(n - 1) * ldc + m) * sizeof(T), "a matrix product");
            for (int j = 0; j < n; j++) {
                for (int i = 0; i < m; i++) {
                    S sum = 0;
                    for (int l = 0; l < k; l++) {
                        S left = value_of(x[ta ? size_t(i) * lda + l : size_t(l) * lda + i]);
                        S right = value_of(y[tb ? size_t(l) * ldb + j : size_t(j) * ldb + l]);
                        sum += tf32 ? to_tf32(left) * to_tf32(right) : left * right;
                    }
                    T &to = z[size_t(j) * ldc + i];
                    set(to, alpha * sum + (beta == 0 ? 0 : beta * value_of(to)));
                }
            }
        }
    });
}
API int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                                   int type, int lda, long long sa, const void *b, int, int ldb, long long sb,
                                   const void *beta, void *c, int, int ldc, long long sc, int batch, int compute, int) {
    auto one = [](const void *at) { return *static_cast<const float *>(at); };
    switch (type) {
    case 0: // f32
        return gemm<float, float>(handle, ta, tb, m, n, k, one(alpha), a, lda, sa, b, ldb, sb, one(beta), c, ldc, sc, batch,
                                  compute == 77);
    case 14: // bf16
        return gemm<bf16, float>(handle, ta, tb, m, n, k, one(alpha), a, lda, sa, b, ldb, sb, one(beta), c, ldc, sc, batch);
    default:
        return 15; // not supported
    }
}
API int cublasDgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const double *alpha, const double *a,
                                  int lda, long long sa, const double *b, int ldb, long long sb, const double *beta,
                                  double *c, int ldc, long long sc, int batch) {
    return gemm<double, double>(handle, ta, tb, m, n, k, *alpha, a, lda, sa, b, ldb, sb, *beta, c, ldc, sc, batch);
}

#include "cudnn.h"

// ---- NCCL ----

enum : int { NCCL_SYSTEM_ERROR = 2, NCCL_INVALID_ARGUMENT = 4, NCCL_INVALID_USAGE = 5 };

struct UniqueId {
    char name[128];
};
API int ncclGetUniqueId(UniqueId *id) {
    std::string name = Ranks::create();
    *id = {};
    return name.copy(id->name, sizeof id->name - 1) ? 0 : int(NCCL_SYSTEM_ERROR);
}
API int ncclCommInitRank(void **communicator, int world, UniqueId id, int rank) {
    if (rank < 0 || rank >= world || world > Ranks::MOST || !current_context) {
        return NCCL_INVALID_ARGUMENT;
    }
    auto ranks = new Ranks;
    *communicator = ranks;
    switch (ranks->join(id.name, rank, world, static_cast<int>(static_cast<int *>(current_context) - primary_contexts))) {
    case Ranks::OK:
        return SUCCESS;
    case Ranks::SAME_DEVICE:
        return delete ranks, NCCL_INVALID_USAGE;
    default:
        return delete ranks, NCCL_SYSTEM_ERROR;
    }
}
API int ncclAllReduce(const float *values, float *sums, size_t count, int type, int operation, void *communicator, void *stream) {
    LOCKED;
    // float, and a sum
    if (type != 7 || operation != 0) {
        fatal("ncclAllReduce of type %d by operation %d is not emulated", type, operation);
    }
    log_of("all-reduce of %zu numbers", count);
    touch_all(stream_of(stream), "an all-reduce");
    return submit(stream, [=] {
        check_range(reinterpret_cast<Address>(values), count * sizeof(float), "an all-reduce");
        check_range(reinterpret_cast<Address>(sums), count * sizeof(float), "an all-reduce");
        if (!static_cast<Ranks *>(communicator)->add_up(values, sums, count)) {
            fatal("an all-reduce that not all ranks join with %zu numbers", count);
        }
    });
}
API int ncclCommAbort(void *communicator) { return delete static_cast<Ranks *>(communicator), SUCCESS; }

// ---- What programs name and do not call ----

#define NOT_EMULATED(NAME)                                                                                             \
    API int NAME() { fatal("%s is not emulated", #NAME); }
NOT_EMULATED(cuCtxDestroy_v2)
NOT_EMULATED(cuMemcpyPeerAsync)
NOT_EMULATED(cuModuleLoad)
// Of Candle's own convolution.
NOT_EMULATED(cudnnSetTensor4dDescriptorEx)
NOT_EMULATED(cudnnSetTensor4dDescriptor)
NOT_EMULATED(cudnnCreateTensorDescriptor)
NOT_EMULATED(cudnnDestroyTensorDescriptor)
NOT_EMULATED(cudnnCreateFilterDescriptor)
NOT_EMULATED(cudnnDestroyFilterDescriptor)
NOT_EMULATED(cudnnSetFilter4dDescriptor)
NOT_EMULATED(cudnnCreateConvolutionDescriptor)
NOT_EMULATED(cudnnDestroyConvolutionDescriptor)
NOT_EMULATED(cudnnSetConvolution2dDescriptor)
NOT_EMULATED(cudnnSetConvolutionMathType)
NOT_EMULATED(cudnnSetConvolutionGroupCount)
NOT_EMULATED(cudnnGetConvolutionForwardAlgorithm_v7)
NOT_EMULATED(cudnnGetConvolutionForwardWorkspaceSize)
NOT_EMULATED(cudnnConvolutionForward)
