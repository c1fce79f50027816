// cuDNN's graph API, as far as convolutions need it: descriptors, the engines that there are, and what they compute.
//
// With CUDA_EMULATION_CUDNN, the program real_cudnn.cpp and the library's path after a colon, each description goes to the
// real library as well, which knows without a GPU what it has for one (cuDNN 9.11 and later: "deviceless"). Then all its
// engines are planned, the first of each kind of arithmetic is offered, and only the computation is emulated.
// CUDA_EMULATION_CUDNN_REPORT=FILE appends a line for each question. With CUDA_EMULATION_ZEROS=1 the result of each
// convolution is zeros at once, so that batches of real sizes can be planned. Part of device.cpp.
#pragma once

#include <spawn.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <span>

#include "real_cudnn.h"

namespace {

enum : int { DNN_SUCCESS = 0, BAD_PARAM = 2000, NOT_SUPPORTED = 3000, EXECUTION_FAILED = 5000 };
enum : int { DNN_FLOAT = 0, DNN_DOUBLE = 1, DNN_BFLOAT16 = 9 };

thread_local std::string last_dnn_error;

int refuse(int status, const char *why) { return last_dnn_error = why, status; }

struct Dnn {
    void *stream = nullptr;
};

enum Pass { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT };

// (N, C, H, W), or for weights (K, C, R, S), without gaps.
struct TensorDescription {
    int type = -1, sizes[4] = {};
    size_t strides[4] = {};
    int64_t number = 0, alignment = 1;
    bool is_virtual = false;
    size_t elements() const { return size_t(sizes[0]) * sizes[1] * sizes[2] * sizes[3]; }
    size_t bytes() const { return elements() * (type == DNN_DOUBLE ? 8 : type == DNN_FLOAT ? 4 : 2); }
    // Whether the dimensions follow each other in memory in this order, the last one densely.
    bool lies(std::array<int, 4> order) const {
        size_t step = 1;
        for (int i = 3; i >= 0; step *= sizes[order[i]], i--) {
            if (sizes[order[i]] != 1 && strides[order[i]] != step) {
                return false;
            }
        }
        return true;
    }
    bool by_planes() const { return lies({0, 1, 2, 3}); }
    bool channels_last() const { return lies({0, 2, 3, 1}); }
    bool operator==(const TensorDescription &) const = default;
};
struct ConvolutionDescription {
    int padding[2] = {}, stride[2] = {}, dilation[2] = {}, mode = -1, compute = -1;
    bool operator==(const ConvolutionDescription &) const = default;
};

struct Work {
    Pass pass = FORWARD;
    TensorDescription x, w, y;
    ConvolutionDescription c;
    bool adds = false;
    // What follows the sum.
    bool has_bias = false, relu = false;
    TensorDescription bias;
    bool operator==(const Work &) const = default;
};

const char *mismatch(const Work &work) {
    const auto &[pass, x, w, y, c, adds, has_bias, relu, bias] = work;
    if (x.type != w.type || x.type != y.type || (has_bias && bias.type != x.type)) {
        return "tensors of several types";
    }
    bool by_planes = x.by_planes() && w.by_planes() && y.by_planes();
    bool channels_last = x.channels_last() && w.channels_last() && y.channels_last();
    if (!by_planes && !channels_last) {
        return "tensors with gaps, or of several memory formats";
    }
    if (!by_planes && x.type == DNN_DOUBLE) {
        return "f64 with channels last";
    }
    if (c.mode != 1 || c.compute != (x.type == DNN_DOUBLE ? DNN_DOUBLE : DNN_FLOAT)) {
        return "no cross-correlation in the type of sums";
    }
    if (x.sizes[1] != w.sizes[1] || y.sizes[1] != w.sizes[0] || x.sizes[0] != y.sizes[0]) {
        return "channels or images that do not fit";
    }
    if (has_bias && (bias.sizes[1] != y.sizes[1] || bias.elements() != size_t(y.sizes[1]))) {
        return "a bias that does not fit";
    }
    for (int d = 0; d < 2; d++) {
        int window = c.dilation[d] * (w.sizes[2 + d] - 1) + 1;
        if (y.sizes[2 + d] != (x.sizes[2 + d] + 2 * c.padding[d] - window) / c.stride[d] + 1) {
            return "an output that is not that of the input";
        }
    }
    return nullptr;
}

// Calls `f(at in x, at in w, at in y, length, step in x)` for each run of products along a line of the output.
template <typename F> void each_run(const Work &work, int image, int out_channel, F f) {
    const auto &x = work.x, &w = work.w, &y = work.y;
    const auto &c = work.c;
    int height = x.sizes[2], width = x.sizes[3], channels = x.sizes[1];
    for (int channel = 0; channel < channels; channel++) {
        for (int r = 0; r < w.sizes[2]; r++) {
            for (int s = 0; s < w.sizes[3]; s++) {
                size_t in_w = ((size_t(out_channel) * channels + channel) * w.sizes[2] + r) * w.sizes[3] + s;
                int left = s * c.dilation[1] - c.padding[1];
                int from = 0, to = y.sizes[3];
                while (from < to && from * c.stride[1] + left < 0) {
                    from++;
                }
                while (to > from && (to - 1) * c.stride[1] + left >= width) {
                    to--;
                }
                if (from == to) {
                    continue;
                }
                for (int h = 0; h < y.sizes[2]; h++) {
                    int line = h * c.stride[0] + r * c.dilation[0] - c.padding[0];
                    if (line < 0 || line >= height) {
                        continue;
                    }
                    size_t in_x = ((size_t(image) * channels + channel) * height + line) * width + from * c.stride[1] + left;
                    size_t in_y = ((size_t(image) * w.sizes[0] + out_channel) * y.sizes[2] + h) * y.sizes[3] + from;
                    f(in_x, in_w, in_y, to - from, c.stride[1]);
                }
            }
        }
    }
}

template <typename T> using Sums = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where the element that is number `i` in row-major order lies.
size_t place_of(const TensorDescription &of, size_t i) {
    size_t at = 0;
    for (int d = 3; d >= 0; i /= of.sizes[d], d--) {
        at += i % of.sizes[d] * of.strides[d];
    }
    return at;
}

template <typename T> std::vector<Sums<T>> widened(const void *from, const TensorDescription &of, bool tf32) {
    std::vector<Sums<T>> to(of.elements());
    for (size_t i = 0; i < to.size(); i++) {
        auto value = value_of(static_cast<const T *>(from)[place_of(of, i)]);
        to[i] = tf32 ? to_tf32(value) : value;
    }
    return to;
}

// y += factor x, and Σ x y, of numbers that lie some elements apart.
template <typename S> void multiply_run(S *__restrict y, size_t y_step, const S *__restrict x, size_t x_step, S factor, int length) {
    if (y_step == 1 && x_step == 1) {
        for (int i = 0; i < length; i++) {
            y[i] += factor * x[i];
        }
        return;
    }
    for (int i = 0; i < length; i++) {
        y[i * y_step] += factor * x[i * x_step];
    }
}
template <typename S> S dot_run(const S *x, size_t x_step, const S *y, int length) {
    // Several sums, so that they need not wait for each other.
    S sums[8] = {};
    int i = 0;
    for (; x_step == 1 && i + 8 <= length; i += 8) {
        for (int lane = 0; lane < 8; lane++) {
            sums[lane] += x[i + lane] * y[i + lane];
        }
    }
    S sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    for (; i < length; i++) {
        sum += x[i * x_step] * y[i];
    }
    return sum;
}

// Calls `f` with each number below `count`, on all cores.
void side_by_side(int count, const std::function<void(int)> &f) {
    std::atomic<int> next = 0;
    auto work = [&] {
        for (int i; (i = next++) < count;) {
            f(i);
        }
    };
    std::vector<std::thread> others;
    for (unsigned int t = 1; t < std::min<unsigned>(count, std::thread::hardware_concurrency()); t++) {
        others.emplace_back(work);
    }
    work();
    for (auto &thread : others) {
        thread.join();
    }
}

// An engine with its settings: its arithmetic, and what it asks for to work in.
struct Engine {
    int64_t index = -1;
    std::vector<int> notes;
    size_t workspace = 0;
    // Which calls refuse it.
    bool no_plan = false, no_run = false;
    // Of f32 factors, with or without a note.
    bool rounds_to_tf32 = false;
    bool has(int note) const { return std::find(notes.begin(), notes.end(), note) != notes.end(); }
};
enum Note : int { TENSOR_CORE = 0, NONDETERMINISTIC = 4 };

struct Operands {
    void *x, *w, *y, *bias;
    bool operator==(const Operands &) const = default;
};

// The pass, into the tensor that it computes.
template <typename T> void convolve(const Work &work, const Operands &at, bool tf32) {
    using S = Sums<T>;
    Pass pass = work.pass;
    auto factor = [=](void *from, const TensorDescription &of, Pass not_in) {
        return pass == not_in ? std::vector<S>(of.elements()) : widened<T>(from, of, tf32);
    };
    std::vector<S> a = factor(at.x, work.x, INPUT_GRADIENT);
    std::vector<S> b = factor(at.w, work.w, WEIGHT_GRADIENT);
    std::vector<S> c = factor(at.y, work.y, FORWARD);
    auto compute = [&](int image, int k) {
        each_run(work, image, k, [&](size_t in_x, size_t in_w, size_t in_y, int length, int step) {
            S *px = &a[in_x], *py = &c[in_y];
            if (pass == FORWARD) {
                multiply_run(py, 1, px, step, b[in_w], length);
            } else if (pass == INPUT_GRADIENT) {
                multiply_run(px, step, py, 1, b[in_w], length);
            } else {
                b[in_w] += dot_run(px, step, py, length);
            }
        });
    };
    // Each task has outputs of its own, so that their bits do not depend on the number of threads.
    int images = work.x.sizes[0], channels_out = work.w.sizes[0];
    if (pass == WEIGHT_GRADIENT) {
        side_by_side(channels_out, [&](int k) {
            for (int image = 0; image < images; image++) {
                compute(image, k);
            }
        });
    } else {
        side_by_side(images, [&](int image) {
            for (int k = 0; k < channels_out; k++) {
                compute(image, k);
            }
        });
    }
    const auto &result = pass == FORWARD ? c : pass == INPUT_GRADIENT ? a : b;
    auto to = static_cast<T *>(pass == FORWARD ? at.y : pass == INPUT_GRADIENT ? at.x : at.w);
    const auto &of = pass == FORWARD ? work.y : pass == INPUT_GRADIENT ? work.x : work.w;
    auto bias = static_cast<const T *>(at.bias);
    size_t pixels = size_t(work.y.sizes[2]) * work.y.sizes[3], channels = work.y.sizes[1];
    for (size_t i = 0; i < result.size(); i++) {
        T &place = to[place_of(of, i)];
        auto value = result[i];
        if (work.adds) {
            value += value_of(place);
        }
        if (bias) {
            value += value_of(bias[i / pixels % channels]);
        }
        set(place, work.relu && value < 0 ? S(0) : value);
    }
}

int run_convolution(Dnn *handle, const Work &work, const Engine &engine, const Operands &at, void *memory) {
    LOCKED;
    if (engine.no_run) {
        return refuse(NOT_SUPPORTED, "an engine that refuses to run");
    }
    if (engine.workspace && !memory) {
        return refuse(BAD_PARAM, "no workspace");
    }
    auto touch_operand = [&](const void *begin_, size_t bytes, bool writes) {
        auto begin = reinterpret_cast<Address>(begin_);
        touch(stream_of(handle->stream), begin, begin + bytes, writes, "a convolution");
    };
    touch_operand(at.x, work.x.bytes(), work.pass == INPUT_GRADIENT);
    touch_operand(at.w, work.w.bytes(), work.pass == WEIGHT_GRADIENT);
    touch_operand(at.y, work.y.bytes(), work.pass == FORWARD);
    touch_operand(memory, engine.workspace, true);
    const auto &[n, c, h, w_] = work.x.sizes;
    log_of("convolution, pass %d, of (%d, %d, %d, %d), kernel %d, %d channels", work.pass, n, c, h, w_, work.w.sizes[2], work.w.sizes[0]);
    bool tf32 = work.x.type == DNN_FLOAT && (engine.rounds_to_tf32 || engine.has(TENSOR_CORE));
    size_t workspace = engine.workspace;
    return submit(handle->stream, [=] {
        check_range(reinterpret_cast<Address>(at.x), work.x.bytes(), "a convolution's input");
        check_range(reinterpret_cast<Address>(at.w), work.w.bytes(), "a convolution's weight");
        check_range(reinterpret_cast<Address>(at.y), work.y.bytes(), "a convolution's output");
        if (workspace) {
            check_range(reinterpret_cast<Address>(memory), workspace, "a workspace");
        }
        if (work.has_bias) {
            check_range(reinterpret_cast<Address>(at.bias), work.bias.bytes(), "a bias");
        }
        // Engines are timed by running them over and over. The same again, with nothing between, would change nothing.
        static struct {
            uint64_t number;
            Work work;
            Operands at;
            bool tf32;
        } last = {};
        bool again = last.number + 1 == works_done && last.work == work && last.at == at && last.tf32 == tf32;
        last = {works_done, work, at, tf32};
        if (again && !work.adds) {
            return;
        }
        if (workspace) {
            std::memset(memory, 0xFF, workspace);
        }
        static const bool computes = !std::getenv("CUDA_EMULATION_ZEROS");
        if (!computes) {
            const auto &of = work.pass == FORWARD ? work.y : work.pass == INPUT_GRADIENT ? work.x : work.w;
            std::memset(work.pass == FORWARD ? at.y : work.pass == INPUT_GRADIENT ? at.x : at.w, 0, of.bytes());
            return;
        }
        if (work.x.type == DNN_DOUBLE) {
            convolve<double>(work, at, false);
        } else if (work.x.type == DNN_FLOAT) {
            convolve<float>(work, at, tf32);
        } else {
            convolve<bf16>(work, at, false);
        }
    });
}

// What is offered under a mode of the heuristics, the fastest first; so that all cases occur.
std::vector<Engine> engines_for(const Work &work, bool fallback) {
    bool is_double = work.x.type == DNN_DOUBLE;
    size_t some = 512 + 4 * (work.y.elements() % 4096);
    // More than is worth keeping.
    size_t much = some + (2u << 20);
    Engine plain = {0, {}, 0};
    if (fallback) {
        return {plain};
    }
    std::vector<Engine> engines;
    if (work.c.dilation[0] * work.c.dilation[1] > 1) {
        engines.push_back({4, {}, 0, false, true});
    }
    if (!is_double) {
        engines.push_back({1, {TENSOR_CORE}, work.pass == FORWARD ? some : much});
    }
    engines.push_back({3, {}, 0, true, false});
    if (work.pass != FORWARD) {
        engines.push_back({2, {NONDETERMINISTIC}, some});
    }
    if (work.x.type == DNN_FLOAT) {
        // Under several settings, and before the others that have no note.
        engines.insert(engines.end(), 4, {6, {}, some, false, false, true});
    }
    if (work.x.type == DNN_BFLOAT16 || work.pass == FORWARD) {
        engines.push_back({5, {}, some});
    }
    return engines;
}

// ---- The real library ----

// What cuDNN would find on an H200: NVIDIA's data sheet, and the limits of compute capability 9.0 in the programming guide.
constexpr char PROPERTIES[] =
    R"({"deviceName":"NVIDIA H200","cudaDeviceId":0,"deviceVer":900,"driverVer":13000,)"
    R"("maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,)"
    R"("multiProcessorCount":132,"warpSize":32,"maxSharedMemoryPerBlock":49152,)"
    R"("maxSharedMemoryPerBlockOptin":232448,"reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,)"
    R"("maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"pciDeviceId":0,"isTccDriver":0,)"
    R"("supportCoopLaunch":1,"smClockRateKHz":1980000,"memClockRateKHz":3201000,"l2CacheSize":62914560,)"
    R"("totalGlobalMem":150754820096})";

enum Kind : int {
    POINTWISE = 0, CONVOLUTION = 1, ENGINE = 2, CONFIGURATION = 3, HEURISTICS = 4, PLAN = 5, FORWARD_OPERATION = 10,
    WEIGHT_OPERATION = 11, INPUT_OPERATION = 12, POINTWISE_OPERATION = 13, GRAPH = 15, VARIANT_PACK = 16, TENSOR = 17, PROPERTIES_OF = 38,
};
enum Mode : int { FALLBACK = 2 };
enum Type : int { HANDLE = 0, INT64 = 3, FLOAT = 4, DOUBLE = 5, NOTE = 11, REFERENCE = 15, BEHAVIOR = 19, CHAR = 24 };
enum Name : int {
    POINTWISE_MODE = 0, POINTWISE_TYPE = 1, POINTWISE_NAN = 2, COMPUTE_TYPE = 100, CONVOLUTION_MODE = 101, DILATIONS = 102,
    STRIDES = 103, PADDINGS_AFTER = 104, PADDINGS_BEFORE = 105, SPATIAL_DIMENSIONS = 106, HEURISTICS_MODE = 200, HEURISTICS_GRAPH = 201,
    HEURISTICS_RESULTS = 202, HEURISTICS_PROPERTIES = 204, CONFIGURATION_ENGINE = 300, PLAN_HANDLE = 400,
    PLAN_CONFIGURATION = 401, PLAN_WORKSPACE = 402, PLAN_PROPERTIES = 407, FORWARD_ALPHA = 700, INPUT_ALPHA = 706, WEIGHT_ALPHA = 712,
    POINTWISE_OF = 750, POINTWISE_X = 751, POINTWISE_B = 752, POINTWISE_Y = 753, GRAPH_HANDLE = 800, GRAPH_OPERATIONS = 801,
    ALIGNMENT = 900, DATA_TYPE = 901, DIMENSIONS = 902, TENSOR_STRIDES = 903, NUMBER = 906, IS_VIRTUAL = 907, PACK_NUMBERS = 1000,
    PACK_POINTERS = 1001, PACK_WORKSPACE = 1003, ENGINE_INDEX = 1301, ENGINE_NOTES = 1303,
    ENGINE_BEHAVIOR = 1305, PROPERTIES_JSON = 2702,
};

class RealCudnn {
  public:
    // Of the device, finalised.
    uint64_t properties = 0;

    RealCudnn() {
        const char *setting = std::getenv("CUDA_EMULATION_CUDNN");
        if (!setting) {
            return;
        }
        std::string program = setting, path;
        if (size_t colon = program.find(':'); colon != std::string::npos) {
            path = program.substr(colon + 1);
            program.resize(colon);
        }
        int there[2], back[2];
        if (pipe2(there, O_CLOEXEC) || pipe2(back, O_CLOEXEC)) {
            fatal("CUDA_EMULATION_CUDNN: no pipe");
        }
        posix_spawn_file_actions_t files;
        posix_spawn_file_actions_init(&files);
        posix_spawn_file_actions_adddup2(&files, there[0], 0);
        posix_spawn_file_actions_adddup2(&files, back[1], 1);
        // Without the folder of this library, which has others' names.
        std::vector<char *> variables;
        for (char **variable = environ; *variable; variable++) {
            if (std::strncmp(*variable, "LD_LIBRARY_PATH=", 16) != 0) {
                variables.push_back(*variable);
            }
        }
        variables.push_back(nullptr);
        char *arguments[] = {program.data(), path.data(), nullptr};
        pid_t process;
        if (posix_spawn(&process, program.c_str(), &files, nullptr, arguments, variables.data())) {
            fatal("CUDA_EMULATION_CUDNN: cannot start %s", program.c_str());
        }
        posix_spawn_file_actions_destroy(&files);
        close(there[0]);
        close(back[1]);
        to = there[1], from = back[0];
        must(create(PROPERTIES_OF, &properties), "its device properties");
        must(set(properties, PROPERTIES_JSON, CHAR, sizeof PROPERTIES, {PROPERTIES, sizeof PROPERTIES}), "its device properties");
        must(finalize(properties), "its device properties");
    }

    int create(int kind, uint64_t *descriptor) {
        Reply reply = ask({Call::CREATE, kind, 0, 0, 0, 0}, {});
        return *descriptor = reply.descriptor, reply.status;
    }
    int destroy(uint64_t descriptor) { return ask({Call::DESTROY, 0, 0, 0, descriptor, 0}, {}).status; }
    int set(uint64_t descriptor, int name, int type, int64_t count, std::span<const char> values) {
        return ask({Call::SET, name, type, count, descriptor, values.size()}, values).status;
    }
    int finalize(uint64_t descriptor) { return ask({Call::FINALIZE, 0, 0, 0, descriptor, 0}, {}).status; }
    // Values, which for descriptors are to be filled.
    template <typename T> int get(uint64_t descriptor, int name, int type, std::vector<T> &values, int64_t *count) {
        std::span<const char> bytes = {reinterpret_cast<const char *>(values.data()), values.size() * sizeof(T)};
        Reply reply = ask({Call::GET, name, type, static_cast<int64_t>(values.size()), descriptor, bytes.size()}, bytes);
        if (reply.status == 0) {
            std::copy_n(answer.data(), bytes.size(), reinterpret_cast<char *>(values.data()));
        }
        return *count = reply.count, reply.status;
    }
    template <typename T> T get_one(uint64_t descriptor, int name, int type, T otherwise, const char *what) {
        std::vector<T> values = {otherwise};
        int64_t count = 0;
        must(get(descriptor, name, type, values, &count), what);
        return values[0];
    }
    // What cuDNN said of the last call that failed.
    const std::string &error() const { return problem; }
    void must(int status, const char *what) {
        if (status) {
            fatal("CUDA_EMULATION_CUDNN: %s: %d, %s", what, status, problem.c_str());
        }
    }
    explicit operator bool() const { return properties; }

  private:
    int to = -1, from = -1;
    std::string answer, problem;

    Reply ask(Call call, std::span<const char> values) {
        Reply reply;
        bool is_there = write_all(to, &call, sizeof call) && write_all(to, values.data(), values.size()) && read_all(from, &reply, sizeof reply);
        if (is_there) {
            answer.resize(reply.bytes);
            is_there = read_all(from, answer.data(), answer.size());
        }
        if (!is_there) {
            fatal("CUDA_EMULATION_CUDNN: the process with cuDNN has ended");
        }
        if (reply.status) {
            problem = answer;
        }
        return reply;
    }
};
RealCudnn &real_cudnn() {
    static RealCudnn real;
    return real;
}

// ---- Descriptors ----

struct Descriptor;
using Reference = std::shared_ptr<Descriptor>;

struct Descriptor {
    int kind;
    bool finalized = false;
    struct Attribute {
        int type;
        std::vector<char> bytes;
        std::vector<Reference> references;
    };
    std::map<int, Attribute> attributes;
    // The same thing in the real library, if there is one.
    uint64_t real = 0;
    // What finalising has made of it.
    TensorDescription tensor;
    Work work;
    Engine engine;
    // Of heuristics, with the real library's descriptor of each.
    std::vector<std::pair<uint64_t, Engine>> engines;

    explicit Descriptor(int kind) : kind(kind) {
        if (RealCudnn &library = real_cudnn(); library && kind != VARIANT_PACK) {
            library.must(library.create(kind, &real), "a descriptor");
        }
    }
    ~Descriptor() {
        if (real) {
            real_cudnn().destroy(real);
        }
        for (const auto &[configuration, _] : engines) {
            if (configuration) {
                real_cudnn().destroy(configuration);
            }
        }
    }
    Descriptor(const Descriptor &) = delete;

    template <typename T> std::vector<T> list(int name) const {
        auto found = attributes.find(name);
        std::vector<T> values(found == attributes.end() ? 0 : found->second.bytes.size() / sizeof(T));
        if (!values.empty()) {
            std::memcpy(values.data(), found->second.bytes.data(), values.size() * sizeof(T));
        }
        return values;
    }
    template <typename T> T one(int name, T otherwise) const {
        auto values = list<T>(name);
        return values.size() == 1 ? values[0] : otherwise;
    }
    // Numbers that are float or double, by the type told.
    double factor(int name, double otherwise) const {
        auto found = attributes.find(name);
        bool is_double = found != attributes.end() && found->second.type == DOUBLE;
        return is_double ? one<double>(name, otherwise) : one<float>(name, static_cast<float>(otherwise));
    }
    const std::vector<Reference> &references(int name) const {
        static const std::vector<Reference> none;
        auto found = attributes.find(name);
        return found == attributes.end() ? none : found->second.references;
    }
    const Descriptor *reference(int name, int of_kind) const {
        const auto &all = references(name);
        return all.size() == 1 && all[0]->kind == of_kind ? all[0].get() : nullptr;
    }
    template <typename T, size_t N> bool pair(int name, int least, T (&to)[N]) const {
        auto values = list<int64_t>(name);
        bool fit = values.size() == N;
        for (size_t i = 0; fit && i < N; i++) {
            to[i] = static_cast<T>(values[i]);
            fit = values[i] >= least;
        }
        return fit;
    }

    const char *check_tensor() {
        auto &t = tensor;
        t.type = one<int>(DATA_TYPE, -1);
        t.number = one<int64_t>(NUMBER, 0);
        t.alignment = one<int64_t>(ALIGNMENT, 0);
        t.is_virtual = one<char>(IS_VIRTUAL, 0);
        if (!pair(DIMENSIONS, 1, t.sizes) || !pair(TENSOR_STRIDES, 1, t.strides)) {
            return "a tensor without four sizes and strides";
        }
        if (t.type != DNN_FLOAT && t.type != DNN_DOUBLE && t.type != DNN_BFLOAT16) {
            return "a tensor of an unknown type";
        }
        return t.alignment < 1 || (t.alignment & (t.alignment - 1)) || t.number == 0 ? "a tensor without alignment or number" : nullptr;
    }

    const char *check_convolution() {
        auto &c = work.c;
        int after[2];
        c.mode = one<int>(CONVOLUTION_MODE, -1);
        c.compute = one<int>(COMPUTE_TYPE, -1);
        bool fit = one<int64_t>(SPATIAL_DIMENSIONS, 0) == 2 && pair(PADDINGS_BEFORE, 0, c.padding) && pair(PADDINGS_AFTER, 0, after) &&
                   pair(STRIDES, 1, c.stride) && pair(DILATIONS, 1, c.dilation);
        return fit && std::equal(after, after + 2, c.padding) ? nullptr : "a convolution that there is not";
    }

    const char *check_operation() {
        int alpha = kind == FORWARD_OPERATION ? FORWARD_ALPHA : kind == INPUT_OPERATION ? INPUT_ALPHA : WEIGHT_ALPHA;
        work.pass = kind == FORWARD_OPERATION ? FORWARD : kind == INPUT_OPERATION ? INPUT_GRADIENT : WEIGHT_GRADIENT;
        auto convolution = reference(alpha + 2, CONVOLUTION);
        auto w = reference(alpha + 3, TENSOR), x = reference(alpha + 4, TENSOR), y = reference(alpha + 5, TENSOR);
        double beta = factor(alpha + 1, -1);
        if (!convolution || !w || !x || !y || factor(alpha, 0) != 1 || (beta != 0 && beta != 1)) {
            return "a convolution without tensors, or with factors other than 1 and 0";
        }
        work.c = convolution->work.c;
        work.x = x->tensor, work.w = w->tensor, work.y = y->tensor;
        work.adds = beta == 1;
        return nullptr;
    }

    // A convolution, and after it a bias and a ReLU, or either of them.
    const char *check_graph() {
        const auto &operations = references(GRAPH_OPERATIONS);
        if (!list<void *>(GRAPH_HANDLE).size() || operations.empty() || operations[0]->kind == POINTWISE_OPERATION) {
            return "a graph without a handle, or that does not begin with a convolution";
        }
        work = operations[0]->work;
        for (size_t i = 1; i < operations.size(); i++) {
            const Descriptor &operation = *operations[i];
            auto x = operation.reference(POINTWISE_X, TENSOR), y = operation.reference(POINTWISE_Y, TENSOR);
            auto bias = operation.reference(POINTWISE_B, TENSOR), how = operation.reference(POINTWISE_OF, POINTWISE);
            if (!x || !y || !how || x->tensor.number != work.y.number || !x->tensor.is_virtual || work.adds || work.relu) {
                return "operations that do not follow each other";
            }
            int mode = how->one<int>(POINTWISE_MODE, -1);
            if (x->tensor.type != how->one<int>(POINTWISE_TYPE, -1) || x->tensor.type == DNN_BFLOAT16) {
                return "sums of another type than the arithmetic";
            }
            if (mode == 0 && bias && !work.has_bias) {
                work.has_bias = true, work.bias = bias->tensor;
            } else if (mode == 100 && !bias && how->one<int>(POINTWISE_NAN, 0) == 1) {
                work.relu = true;
            } else {
                return "operations other than a bias and a ReLU that keeps NaN";
            }
            work.y = y->tensor;
        }
        return work.y.is_virtual ? "a graph that writes nothing" : mismatch(work);
    }
};

const char *kind_of_pass(Pass pass) { return pass == FORWARD ? "forward" : pass == INPUT_GRADIENT ? "input gradient" : "weight gradient"; }

// What the real library has for a graph, of which one of each arithmetic is offered.
std::vector<std::pair<uint64_t, Engine>> real_engines(const Descriptor &heuristics, int mode) {
    const Work &work = heuristics.work;
    RealCudnn &real = real_cudnn();
    int64_t count = 0;
    std::vector<uint64_t> configurations;
    real.must(real.get(heuristics.real, HEURISTICS_RESULTS, REFERENCE, configurations, &count), "its engines");
    configurations.resize(static_cast<size_t>(count));
    for (auto &configuration : configurations) {
        real.must(real.create(CONFIGURATION, &configuration), "a configuration");
    }
    real.must(real.get(heuristics.real, HEURISTICS_RESULTS, REFERENCE, configurations, &count), "its engines");
    // The first number is only a bound.
    for (; configurations.size() > size_t(count); configurations.pop_back()) {
        real.destroy(configurations.back());
    }
    std::vector<std::pair<uint64_t, Engine>> offered;
    size_t planned = 0, exact = 0, repeating = 0, compiled = 0;
    std::string refusals;
    for (uint64_t configuration : configurations) {
        Engine engine;
        int64_t count_of_notes = 0;
        uint64_t plan = 0;
        std::vector<uint64_t> of(1);
        std::vector<int> notes(64), behavior(64);
        real.must(real.create(ENGINE, &of[0]), "an engine");
        real.must(real.get(configuration, CONFIGURATION_ENGINE, REFERENCE, of, &count), "an engine");
        engine.index = real.get_one<int64_t>(of[0], ENGINE_INDEX, INT64, -1, "an engine's number");
        real.must(real.get(of[0], ENGINE_NOTES, NOTE, notes, &count_of_notes), "an engine's notes");
        engine.notes.assign(notes.begin(), notes.begin() + count_of_notes);
        real.must(real.get(of[0], ENGINE_BEHAVIOR, BEHAVIOR, behavior, &count_of_notes), "an engine's behavior");
        // The first note of behavior is that a kernel has to be compiled.
        compiled += std::count(behavior.begin(), behavior.begin() + count_of_notes, 0) > 0;
        auto as_bytes = [](const uint64_t &descriptor) { return std::span(reinterpret_cast<const char *>(&descriptor), sizeof descriptor); };
        real.must(real.create(PLAN, &plan), "a plan");
        real.must(real.set(plan, PLAN_CONFIGURATION, REFERENCE, 1, as_bytes(configuration)), "a plan's engine");
        real.must(real.set(plan, PLAN_PROPERTIES, REFERENCE, 1, as_bytes(real.properties)), "a plan's device");
        bool is_offered = false;
        if (real.finalize(plan)) {
            refusals += " engine " + std::to_string(engine.index) + ": " + real.error() + ";";
        } else {
            engine.workspace = static_cast<size_t>(real.get_one<int64_t>(plan, PLAN_WORKSPACE, INT64, 0, "a plan's workspace"));
            planned++;
            exact += !engine.has(TENSOR_CORE);
            repeating += !engine.has(NONDETERMINISTIC);
            is_offered = std::none_of(offered.begin(), offered.end(), [&](const auto &other) { return other.second.notes == engine.notes; });
        }
        if (is_offered) {
            offered.emplace_back(configuration, engine);
        } else {
            real.destroy(configuration);
        }
        real.destroy(plan);
        real.destroy(of[0]);
    }
    if (const char *path = std::getenv("CUDA_EMULATION_CUDNN_REPORT")) {
        const auto &[n, c, h, w] = work.x.sizes;
        std::ofstream report(path, std::ios::app);
        const char *type = work.x.type == DNN_FLOAT ? "f32" : work.x.type == DNN_DOUBLE ? "f64" : "bf16";
        report << kind_of_pass(work.pass) << ',' << type << ',' << (work.x.by_planes() ? "planes" : "channels last") << ',' << n << 'x' << c
               << 'x' << h << 'x' << w << ',' << work.w.sizes[0] << 'x' << work.w.sizes[2] << 'x' << work.w.sizes[3] << ",stride "
               << work.c.stride[0] << ' ' << work.c.stride[1] << ",padding " << work.c.padding[0] << ' ' << work.c.padding[1]
               << (work.adds ? ",adds" : ",") << (work.has_bias ? ",bias" : ",") << (work.relu ? ",relu" : ",") << ",mode " << mode << ','
               << configurations.size() << ',' << planned << ',' << exact << ',' << repeating << ',' << compiled << ','
               << (offered.empty() ? -1 : offered[0].second.index) << ',' << (offered.empty() ? 0 : offered[0].second.workspace) << ','
               << refusals << '\n';
    }
    return offered;
}

std::vector<std::pair<uint64_t, Engine>> engines_under(const Descriptor &heuristics) {
    int mode = heuristics.one<int>(HEURISTICS_MODE, -1);
    if (real_cudnn()) {
        return real_engines(heuristics, mode);
    }
    std::vector<std::pair<uint64_t, Engine>> engines;
    for (const Engine &engine : engines_for(heuristics.work, mode == FALLBACK)) {
        engines.emplace_back(0, engine);
    }
    return engines;
}

Descriptor &at(void *descriptor) { return **static_cast<Reference *>(descriptor); }

// Hands out what there is, into what was made for it.
int engines_into(Descriptor &heuristics, int64_t room, int64_t *count, void **into) {
    *count = static_cast<int64_t>(heuristics.engines.size());
    for (size_t i = 0; i < heuristics.engines.size() && i < size_t(room); i++) {
        auto &[real, engine] = heuristics.engines[i];
        Descriptor &configuration = at(into[i]);
        configuration.engine = engine;
        configuration.work = heuristics.work;
        std::swap(configuration.real, real);
    }
    return DNN_SUCCESS;
}

} // namespace

API size_t cudnnGetVersion() { return 91900; }
API int cudnnCreate(void **handle) { return *handle = new Dnn, DNN_SUCCESS; }
API int cudnnDestroy(void *handle) { return delete static_cast<Dnn *>(handle), DNN_SUCCESS; }
API int cudnnSetStream(void *handle, void *stream) { return static_cast<Dnn *>(handle)->stream = stream, DNN_SUCCESS; }
API const char *cudnnGetErrorString(int) { return "an error of the emulation"; }
API void cudnnGetLastErrorString(char *message, size_t length) {
    std::snprintf(message, length, "%s", last_dnn_error.c_str());
    last_dnn_error.clear();
}

API int cudnnBackendCreateDescriptor(int kind, void **descriptor) {
    LOCKED;
    return *descriptor = new Reference(std::make_shared<Descriptor>(kind)), DNN_SUCCESS;
}
API int cudnnBackendDestroyDescriptor(void *descriptor) {
    LOCKED;
    return delete static_cast<Reference *>(descriptor), DNN_SUCCESS;
}
API int cudnnBackendSetAttribute(void *descriptor, int name, int type, int64_t count, const void *values) {
    LOCKED;
    Descriptor &of = at(descriptor);
    if (of.finalized) {
        return refuse(BAD_PARAM, "an attribute of a finalised descriptor");
    }
    static const std::map<int, size_t> sizes = {{HANDLE, 8}, {2, 1}, {INT64, 8}, {DOUBLE, 8}, {6, 8}, {REFERENCE, 8}};
    auto size = sizes.find(type);
    size_t bytes = size_t(count) * (size == sizes.end() ? 4 : size->second);
    Descriptor::Attribute attribute = {type, {}, {}};
    std::vector<uint64_t> real;
    if (type == REFERENCE) {
        for (int64_t i = 0; i < count; i++) {
            auto other = *static_cast<Reference *const *>(values)[i];
            if (!other->finalized && other->kind != CONFIGURATION) {
                return refuse(BAD_PARAM, "a descriptor that is not finalised");
            }
            attribute.references.push_back(other);
            real.push_back(other->real);
        }
    } else {
        attribute.bytes.assign(static_cast<const char *>(values), static_cast<const char *>(values) + bytes);
    }
    of.attributes[name] = std::move(attribute);
    // A description of the device takes the place of the handle.
    if (RealCudnn &library = real_cudnn(); library && of.real && type != HANDLE) {
        auto given = type == REFERENCE ? reinterpret_cast<const char *>(real.data()) : static_cast<const char *>(values);
        if (int status = library.set(of.real, name, type, count, {given, bytes})) {
            return refuse(status, library.error().c_str());
        }
    }
    return DNN_SUCCESS;
}
API int cudnnBackendFinalize(void *descriptor) {
    LOCKED;
    Descriptor &of = at(descriptor);
    const char *problem = nullptr;
    switch (of.kind) {
    case TENSOR:
        problem = of.check_tensor();
        break;
    case CONVOLUTION:
        problem = of.check_convolution();
        break;
    case FORWARD_OPERATION:
    case INPUT_OPERATION:
    case WEIGHT_OPERATION:
        problem = of.check_operation();
        break;
    case GRAPH:
        problem = of.check_graph();
        // So that there is a computation without an epilogue.
        if (!problem && !real_cudnn() && of.work.x.type == DNN_DOUBLE && (of.work.has_bias || of.work.relu)) {
            return refuse(NOT_SUPPORTED, "f64 with a bias or a ReLU");
        }
        break;
    case HEURISTICS:
        if (const Descriptor *graph = of.reference(HEURISTICS_GRAPH, GRAPH)) {
            of.work = graph->work;
        } else {
            problem = "engines of nothing";
        }
        break;
    case PLAN: {
        const Descriptor *configuration = of.reference(PLAN_CONFIGURATION, CONFIGURATION);
        if (!configuration || !of.list<void *>(PLAN_HANDLE).size()) {
            return refuse(BAD_PARAM, "a plan without an engine or a handle");
        }
        of.work = configuration->work;
        of.engine = configuration->engine;
        if (of.engine.no_plan) {
            return refuse(NOT_SUPPORTED, "an engine that cannot be planned");
        }
        break;
    }
    default:
        break;
    }
    if (problem) {
        return refuse(BAD_PARAM, problem);
    }
    if (RealCudnn &library = real_cudnn(); library && of.real) {
        int property = of.kind == HEURISTICS ? HEURISTICS_PROPERTIES : of.kind == PLAN ? PLAN_PROPERTIES : 0;
        if (property) {
            auto device = reinterpret_cast<const char *>(&library.properties);
            library.must(library.set(of.real, property, REFERENCE, 1, {device, sizeof library.properties}), "the device of a descriptor");
        }
        if (int status = library.finalize(of.real)) {
            return refuse(status, library.error().c_str());
        }
    }
    if (of.kind == HEURISTICS) {
        of.engines = engines_under(of);
    }
    return of.finalized = true, DNN_SUCCESS;
}
API int cudnnBackendGetAttribute(void *descriptor, int name, int, int64_t room, int64_t *count, void *into) {
    LOCKED;
    Descriptor &of = at(descriptor);
    auto give = [&](int64_t value) {
        *count = 1;
        return room ? (*static_cast<int64_t *>(into) = value, DNN_SUCCESS) : DNN_SUCCESS;
    };
    // Only without an address cuDNN tells how many there are.
    if (room == 0 && into) {
        return *count = 0, DNN_SUCCESS;
    }
    switch (name) {
    case HEURISTICS_RESULTS:
        return engines_into(of, room, count, static_cast<void **>(into));
    case CONFIGURATION_ENGINE:
        at(*static_cast<void **>(into)).engine = of.engine;
        return *count = 1, DNN_SUCCESS;
    case ENGINE_INDEX:
        return give(of.engine.index);
    case ENGINE_NOTES:
        *count = static_cast<int64_t>(of.engine.notes.size());
        std::copy_n(of.engine.notes.begin(), std::min(room, *count), static_cast<int *>(into));
        return DNN_SUCCESS;
    case PLAN_WORKSPACE:
        return give(static_cast<int64_t>(of.engine.workspace));
    default:
        return refuse(NOT_SUPPORTED, "an attribute that is not emulated");
    }
}
API int cudnnBackendExecute(void *handle, void *plan_, void *pack_) {
    Descriptor &plan = at(plan_), &pack = at(pack_);
    if (plan.kind != PLAN || pack.kind != VARIANT_PACK || !plan.finalized || !pack.finalized) {
        return refuse(BAD_PARAM, "no plan, or no pack");
    }
    auto numbers = pack.list<int64_t>(PACK_NUMBERS);
    auto pointers = pack.list<void *>(PACK_POINTERS);
    const Work &work = plan.work;
    size_t wanted = 3 + work.has_bias;
    if (numbers.size() != wanted || pointers.size() != wanted) {
        return refuse(BAD_PARAM, "other tensors than those of the graph");
    }
    const char *problem = nullptr;
    auto find = [&](const TensorDescription &of) -> void * {
        for (size_t i = 0; i < wanted; i++) {
            if (numbers[i] == of.number) {
                bool aligned = pointers[i] && reinterpret_cast<Address>(pointers[i]) % of.alignment == 0;
                problem = aligned ? problem : "a tensor that is not aligned as described";
                return pointers[i];
            }
        }
        problem = "a tensor that is missing";
        return nullptr;
    };
    Operands operands = {find(work.x), find(work.w), find(work.y), work.has_bias ? find(work.bias) : nullptr};
    if (problem) {
        return refuse(BAD_PARAM, problem);
    }
    return run_convolution(static_cast<Dnn *>(handle), work, plan.engine, operands, pack.one<void *>(PACK_WORKSPACE, nullptr));
}
