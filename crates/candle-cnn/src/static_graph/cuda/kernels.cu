// What lies between the convolutions of a graph. Maps are (rows, channels): the channels of a pixel side by side, pixels
// image by image. Statistics and parameters are float. Every sum has an order that does not depend on timing.

// Numbers that a thread takes at once where all widths are a multiple of it.
#define PACK 4
// Channels and rows that a block of sums takes at once.
#define LANES 32
#define LINES (THREADS / LANES)

template <typename T> struct alignas(sizeof(T) * PACK) Pack {
    T of[PACK];
};

// Images (N, channels, pixels) as pixels of `width` channels, of which those beyond `channels` are zero; a thread a number.
template <typename T>
static __device__ __forceinline__ void from_planes(const T *planes, T *map, unsigned int channels, unsigned int pixels,
                                                   unsigned int width, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        unsigned int c = i % width, row = i / width;
        store(&map[i], c < channels ? widen(planes[(row / pixels * channels + c) * pixels + row % pixels])
                                    : typename Compute<T>::Type(0));
    }
}

// The way back.
template <typename T>
static __device__ __forceinline__ void to_planes(const T *map, T *planes, unsigned int channels, unsigned int pixels,
                                                 unsigned int width, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        unsigned int c = i / pixels % channels, row = i / (pixels * channels) * pixels + i % pixels;
        planes[i] = map[row * width + c];
    }
}

#define WEIGHTS 64

// Weights (C_out, C_in, taps) and the same as (C_out, taps, width), some at a time. Weight w has the blocks before `end[w]`,
// a thread a number.
template <typename T> struct Weights {
    float *planes[WEIGHTS];
    T *pixels[WEIGHTS];
    unsigned int c_in[WEIGHTS], width[WEIGHTS], taps[WEIGHTS], elements[WEIGHTS], end[WEIGHTS];
};

// `elements` are those of `pixels`.
template <typename T> static __device__ __forceinline__ void lay_weights(const Weights<T> &all) {
    unsigned int block = blockIdx.x, w = entry_of(all.end, block), i = block * THREADS + threadIdx.x;
    if (i < all.elements[w]) {
        unsigned int c = i % all.width[w], tap = i / all.width[w] % all.taps[w], k = i / (all.width[w] * all.taps[w]);
        store(&all.pixels[w][i], c < all.c_in[w] ? all.planes[w][(k * all.c_in[w] + c) * all.taps[w] + tap] : 0.0f);
    }
}

// `elements` are those of `planes`.
template <typename T> static __device__ __forceinline__ void take_weights(const Weights<T> &all) {
    unsigned int block = blockIdx.x, w = entry_of(all.end, block), i = block * THREADS + threadIdx.x;
    if (i < all.elements[w]) {
        unsigned int tap = i % all.taps[w], c = i / all.taps[w] % all.c_in[w], k = i / (all.taps[w] * all.c_in[w]);
        all.planes[w][i] = widen(all.pixels[w][(k * all.taps[w] + tap) * all.width[w] + c]);
    }
}

#define SEGMENTS 8

enum : unsigned int { BIAS, BATCH, RUNNING };

// The channels of one convolution: in the output of the convolutions that ran as one, and in the map that its own go to.
template <typename T> struct Segment {
    // (rows, raw_width) from the first channel on: the sums of the convolution, or their gradient.
    T *raw;
    // (rows, map_width) likewise: what comes of them.
    T *map;
    const T *gradient;
    // A number for each channel. `deviation` is 1/σ of the batch, or the running variance.
    const float *weight, *bias, *mean, *deviation;
    unsigned int channels, raw_width, map_width;
    // Its first channel among those of all segments.
    unsigned int first;
    unsigned int kind;
    float eps;
};
// Some segments, which have the blocks before `end`, and channels of all.
template <typename T> struct Segments {
    Segment<T> of[SEGMENTS];
    unsigned int end[SEGMENTS], rows, channels;
};

// A pack's channels, or the only one.
template <typename T, unsigned int N> static __device__ __forceinline__ Pack<T> load_pack(const T *from) {
    if (N == PACK) {
        return *reinterpret_cast<const Pack<T> *>(from);
    }
    Pack<T> pack;
    pack.of[0] = *from;
    return pack;
}
template <typename T, unsigned int N> static __device__ __forceinline__ void store_pack(T *to, const Pack<T> &pack) {
    if (N == PACK) {
        *reinterpret_cast<Pack<T> *>(to) = pack;
    } else {
        *to = pack.of[0];
    }
}

// What follows a convolution at one channel.
struct Follows {
    unsigned int kind;
    float mean, inverse_std, scale, bias;

    template <typename T> __device__ Follows(const Segment<T> &of, unsigned int channel) {
        kind = of.kind;
        bias = of.bias[channel];
        mean = 0;
        inverse_std = scale = 1;
        if (kind != BIAS) {
            mean = of.mean[channel];
            inverse_std = kind == BATCH ? of.deviation[channel] : 1 / sqrtf(of.deviation[channel] + of.eps);
            scale = of.weight[channel] * inverse_std;
        }
    }
    __device__ float value(float raw) const { return kind == BIAS ? raw + bias : multiply_add(raw - mean, scale, bias); }
};

// map = ReLU of what follows `raw`. A thread takes N channels of a row.
template <typename T, unsigned int N> static __device__ __forceinline__ void finish(const Segments<T> &all) {
    unsigned int block = blockIdx.x;
    const Segment<T> &s = all.of[entry_of(all.end, block)];
    unsigned int i = block * THREADS + threadIdx.x, per_row = s.channels / N;
    if (i >= all.rows * per_row) {
        return;
    }
    unsigned int row = i / per_row, c = i % per_row * N;
    Pack<T> pack = load_pack<T, N>(&s.raw[row * s.raw_width + c]);
    for (unsigned int k = 0; k < N; k++) {
        float value = Follows(s, c + k).value(widen(pack.of[k]));
        store(&pack.of[k], keep_positive(value, value));
    }
    store_pack<T, N>(&s.map[row * s.map_width + c], pack);
}

// The sum of `value` over the block's rows, for every thread of the channel.
static __device__ __forceinline__ float column_sum(float value, float *shared) {
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    float sum = 0;
    for (unsigned int line = 0; line < LINES; line++) {
        sum += shared[line * LANES + threadIdx.x % LANES];
    }
    return sum;
}

// A block of LANES channels of a segment and `per_part` rows.
template <typename T> struct Column {
    const Segment<T> &segment;
    unsigned int channel, start, count;
    bool inside;

    __device__ Column(const Segments<T> &all, unsigned int block, unsigned int per_part) : segment(all.of[entry_of(all.end, block)]) {
        channel = block * LANES + threadIdx.x % LANES;
        inside = channel < segment.channels;
        start = blockIdx.y * per_part;
        count = all.rows - start < per_part ? all.rows - start : per_part;
    }
    // The rows of this thread are `line`, `line + LINES`, …
    __device__ unsigned int line() const { return threadIdx.x / LANES; }
};

// statistics[0][channel] = mean, [1] = 1/σ, [2] = unbiased variance, from the mean and the sum of squared differences from it.
template <typename T>
static __device__ __forceinline__ void set_statistics(const Segments<T> &all, float *statistics, const Segment<T> &s,
                                                      unsigned int channel, double mean, double squares) {
    statistics[channel] = static_cast<float>(mean);
    statistics[all.channels + channel] = static_cast<float>(1 / sqrt(squares / all.rows + s.eps));
    statistics[2 * all.channels + channel] = static_cast<float>(squares / (all.rows - 1));
}

// means[part][channel], squares[part][channel] = the part's mean and its sum of squared differences from that. The mean that
// a float can hold is off by its last digit, which beside a small deviation counts: what the differences still sum to mends both.
// Of a single part the statistics are written at once, as `join_moments` has them.
template <typename T>
static __device__ __forceinline__ void moments(const Segments<T> &all, double *means, float *squares, float *statistics,
                                               unsigned int per_part) {
    __shared__ float shared[THREADS];
    Column<T> at(all, blockIdx.x, per_part);
    const Segment<T> &s = at.segment;
    const T *x = s.raw + at.start * s.raw_width + at.channel;
    float sum = 0;
    if (at.inside) {
        for (unsigned int row = at.line(); row < at.count; row += LINES) {
            sum += widen(x[row * s.raw_width]);
        }
    }
    float mean = column_sum(sum, shared) / at.count;
    float square = 0, rest = 0;
    if (at.inside) {
        for (unsigned int row = at.line(); row < at.count; row += LINES) {
            float difference = widen(x[row * s.raw_width]) - mean;
            square += difference * difference;
            rest += difference;
        }
    }
    rest = column_sum(rest, shared);
    square = column_sum(square, shared) - rest * rest / at.count;
    if (at.inside && at.line() == 0) {
        double exact = mean + static_cast<double>(rest) / at.count;
        if (gridDim.y == 1) {
            set_statistics(all, statistics, s, s.first + at.channel, exact, square);
            return;
        }
        unsigned int to = blockIdx.y * all.channels + s.first + at.channel;
        means[to] = exact;
        squares[to] = square;
    }
}

// The statistics of each channel from its parts. A thread a channel.
template <typename T>
static __device__ __forceinline__ void join_moments(const Segments<T> &all, const double *means, const float *squares,
                                                    float *statistics, unsigned int parts, unsigned int per_part) {
    unsigned int channel = thread_of_grid();
    if (channel >= all.channels) {
        return;
    }
    unsigned int s = 0;
    while (channel >= all.of[s].first + all.of[s].channels) {
        s++;
    }
    double total = 0, joined = 0;
    for (unsigned int part = 0; part < parts; part++) {
        unsigned int rest = all.rows - part * per_part;
        total += means[part * all.channels + channel] * (rest < per_part ? rest : per_part);
    }
    double mean = total / all.rows;
    for (unsigned int part = 0; part < parts; part++) {
        unsigned int rest = all.rows - part * per_part;
        double difference = means[part * all.channels + channel] - mean;
        joined += squares[part * all.channels + channel] + difference * difference * (rest < per_part ? rest : per_part);
    }
    set_statistics(all, statistics, all.of[s], channel, mean, joined);
}

// sums[0][part][channel] = Σ g, sums[1][part][channel] = Σ g·x̂, where g is the gradient before the ReLU. Behind a bias there
// is no x̂, and `raw` becomes g. Of a single part these are the sums of all.
template <typename T>
static __device__ __forceinline__ void gradient_sums(const Segments<T> &all, float *sums, unsigned int per_part) {
    __shared__ float shared[THREADS];
    Column<T> at(all, blockIdx.x, per_part);
    const Segment<T> &s = at.segment;
    float plain = 0, with_x = 0;
    if (at.inside) {
        Follows follows(s, at.channel);
        for (unsigned int row = at.start + at.line(); row < at.start + at.count; row += LINES) {
            unsigned int in_raw = row * s.raw_width + at.channel, in_map = row * s.map_width + at.channel;
            float gradient = widen(s.gradient[in_map]);
            if (s.kind == BIAS) {
                gradient = keep_positive(gradient, widen(s.map[in_map]));
                store(&s.raw[in_raw], gradient);
            } else {
                float raw = widen(s.raw[in_raw]);
                gradient = keep_positive(gradient, follows.value(raw));
                with_x += gradient * ((raw - follows.mean) * follows.inverse_std);
            }
            plain += gradient;
        }
    }
    plain = column_sum(plain, shared);
    with_x = column_sum(with_x, shared);
    if (at.inside && at.line() == 0) {
        unsigned int to = blockIdx.y * all.channels + s.first + at.channel;
        sums[to] = plain;
        sums[gridDim.y * all.channels + to] = with_x;
    }
}

// joined[0][channel], joined[1][channel] = the sums of the parts, in their order. A thread a channel.
static __device__ __forceinline__ void join_sums(const float *sums, float *joined, unsigned int channels, unsigned int parts) {
    unsigned int channel = thread_of_grid();
    if (channel >= channels) {
        return;
    }
    double plain = 0, with_x = 0;
    for (unsigned int part = 0; part < parts; part++) {
        plain += sums[part * channels + channel];
        with_x += sums[(parts + part) * channels + channel];
    }
    joined[channel] = static_cast<float>(plain);
    joined[channels + channel] = static_cast<float>(with_x);
}

// raw = the gradient before the batch norm: weight/σ · (g − Σg/rows − x̂·Σgx̂/rows). A thread takes N channels of a row.
template <typename T, unsigned int N>
static __device__ __forceinline__ void input_gradient(const Segments<T> &all, const float *joined, float share) {
    unsigned int block = blockIdx.x;
    const Segment<T> &s = all.of[entry_of(all.end, block)];
    unsigned int i = block * THREADS + threadIdx.x, per_row = s.channels / N;
    if (i >= all.rows * per_row) {
        return;
    }
    unsigned int row = i / per_row, c = i % per_row * N;
    Pack<T> raw = load_pack<T, N>(&s.raw[row * s.raw_width + c]), dy = load_pack<T, N>(&s.gradient[row * s.map_width + c]);
    for (unsigned int k = 0; k < N; k++) {
        Follows follows(s, c + k);
        float value = widen(raw.of[k]);
        float gradient = keep_positive(widen(dy.of[k]), follows.value(value));
        float x = (value - follows.mean) * follows.inverse_std;
        gradient -= joined[s.first + c + k] * share + x * (joined[all.channels + s.first + c + k] * share);
        store(&raw.of[k], follows.scale * gradient);
    }
    store_pack<T, N>(&s.raw[row * s.raw_width + c], raw);
}

// y = the window's maximum, and winners = where in the window it is: the first in row-major order, or the last NaN. `winners`
// may be null. A thread a number.
template <typename T>
static __device__ __forceinline__ void max_pool(const T *x, T *y, unsigned char *winners, Axis h, Axis w, unsigned int channels,
                                                unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    unsigned int c = i % channels, window = i / channels;
    unsigned int ow = window % w.output, oh = window / w.output % h.output, image = window / (w.output * h.output);
    const T *in_image = x + image * h.input * w.input * channels + c;
    unsigned int best_at = h.start(oh) * w.input + w.start(ow);
    T best = in_image[best_at * channels];
    for (unsigned int ih = h.start(oh); ih < h.end(oh); ih++) {
        for (unsigned int iw = w.start(ow); iw < w.end(ow); iw++) {
            T value = in_image[(ih * w.input + iw) * channels];
            if (widen(value) > widen(best) || widen(value) != widen(value)) {
                best = value;
                best_at = ih * w.input + iw;
            }
        }
    }
    y[i] = best;
    if (winners) {
        unsigned int r = best_at / w.input + h.padding - oh * h.stride, s = best_at % w.input + w.padding - ow * w.stride;
        winners[i] = static_cast<unsigned char>(r * w.kernel + s);
    }
}

// dx of a number = the sum of dy over the windows that it won, in their order; with `add`, more than what is there.
template <typename T>
static __device__ __forceinline__ void max_pool_gradient(const unsigned char *winners, const T *dy, T *dx, Axis h, Axis w,
                                                         unsigned int channels, unsigned int add, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    unsigned int c = i % channels, pixel = i / channels;
    unsigned int iw = pixel % w.input, ih = pixel / w.input % h.input, image = pixel / (w.input * h.input);
    float sum = add ? widen(dx[i]) : 0;
    for (unsigned int oh = h.first(ih); oh <= h.last(ih); oh++) {
        for (unsigned int ow = w.first(iw); ow <= w.last(iw); ow++) {
            unsigned int window = ((image * h.output + oh) * w.output + ow) * channels + c;
            unsigned int at = (ih + h.padding - oh * h.stride) * w.kernel + (iw + w.padding - ow * w.stride);
            if (winners[window] == at) {
                sum += widen(dy[window]);
            }
        }
    }
    store(&dx[i], sum);
}

// features (images, channels) = the means over the pixels of each image; a thread a mean.
template <typename T>
static __device__ __forceinline__ void average(const T *map, float *features, unsigned int pixels, unsigned int channels,
                                               unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    const T *image = map + i / channels * pixels * channels + i % channels;
    float sum = 0;
    for (unsigned int pixel = 0; pixel < pixels; pixel++) {
        sum += widen(image[pixel * channels]);
    }
    features[i] = sum / pixels;
}

// The way back: each pixel's share; a thread a pixel's number.
template <typename T>
static __device__ __forceinline__ void spread(const float *features, T *map, unsigned int pixels, unsigned int channels,
                                              unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        store(&map[i], features[i / (pixels * channels) * channels + i % channels] / pixels);
    }
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void static_graph_from_planes_##NAME(const T *planes, T *map, unsigned int channels,         \
                                                               unsigned int pixels, unsigned int width,                \
                                                               unsigned int elements) {                                \
        from_planes<T>(planes, map, channels, pixels, width, elements);                                                \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_to_planes_##NAME(const T *map, T *planes, unsigned int channels,           \
                                                             unsigned int pixels, unsigned int width,                  \
                                                             unsigned int elements) {                                  \
        to_planes<T>(map, planes, channels, pixels, width, elements);                                                  \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_lay_weights_##NAME(Weights<T> all) { lay_weights<T>(all); }                \
    extern "C" __global__ void static_graph_take_weights_##NAME(Weights<T> all) { take_weights<T>(all); }              \
    extern "C" __global__ void static_graph_finish_##NAME(Segments<T> all) { finish<T, 1>(all); }                      \
    extern "C" __global__ void static_graph_finish_packs_##NAME(Segments<T> all) { finish<T, PACK>(all); }             \
    extern "C" __global__ void static_graph_moments_##NAME(Segments<T> all, double *means, float *squares,             \
                                                           float *statistics, unsigned int per_part) {                 \
        moments<T>(all, means, squares, statistics, per_part);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_join_moments_##NAME(Segments<T> all, const double *means,                  \
                                                                const float *squares, float *statistics,               \
                                                                unsigned int parts, unsigned int per_part) {           \
        join_moments<T>(all, means, squares, statistics, parts, per_part);                                             \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_gradient_sums_##NAME(Segments<T> all, float *sums, unsigned int per_part) {\
        gradient_sums<T>(all, sums, per_part);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_input_gradient_##NAME(Segments<T> all, const float *joined, float share) { \
        input_gradient<T, 1>(all, joined, share);                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_input_gradient_packs_##NAME(Segments<T> all, const float *joined,          \
                                                                        float share) {                                 \
        input_gradient<T, PACK>(all, joined, share);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_max_pool_##NAME(const T *x, T *y, unsigned char *winners, Axis h, Axis w,  \
                                                            unsigned int channels, unsigned int elements) {            \
        max_pool<T>(x, y, winners, h, w, channels, elements);                                                          \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_max_pool_gradient_##NAME(const unsigned char *winners, const T *dy, T *dx, \
                                                                     Axis h, Axis w, unsigned int channels,            \
                                                                     unsigned int add, unsigned int elements) {        \
        max_pool_gradient<T>(winners, dy, dx, h, w, channels, add, elements);                                          \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_average_##NAME(const T *map, float *features, unsigned int pixels,         \
                                                           unsigned int channels, unsigned int elements) {             \
        average<T>(map, features, pixels, channels, elements);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_spread_##NAME(const float *features, T *map, unsigned int pixels,          \
                                                          unsigned int channels, unsigned int elements) {              \
        spread<T>(features, map, pixels, channels, elements);                                                          \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)

extern "C" __global__ void static_graph_join_sums_f32(const float *sums, float *joined, unsigned int channels, unsigned int parts) {
    join_sums(sums, joined, channels, parts);
}
