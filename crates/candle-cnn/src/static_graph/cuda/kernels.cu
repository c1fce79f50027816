// What lies between the convolutions of a graph. Maps are (rows, channels): the channels of a pixel side by side, pixels
// image by image. Statistics and parameters are float. Every sum has an order that does not depend on timing.
//
// A thread takes a pack of channels at once, 16 bytes where the widths allow it: loads of two bytes each would not keep the
// memory busy, and what it takes to know a pixel's place is shared by the pack.

// Rows whose packs a thread loads before it computes with the first.
#define ROWS 4

// Numbers side by side, which are loaded and stored at once.
template <typename T, unsigned int N> struct alignas(sizeof(T) * N) Pack {
    T of[N];

    __device__ float at(unsigned int k) const { return widen(of[k]); }
    // `set` rounds the value; `put` takes one that is a `T` already.
    __device__ void set(unsigned int k, float value) { store(&of[k], value); }
    __device__ void put(unsigned int k, float value) { narrow(&of[k], value); }
};
// Kept as words, so that both halves are widened by one instruction each.
template <> struct alignas(16) Pack<bf16, 8> {
    unsigned int words[4];

    __device__ float at(unsigned int k) const {
        unsigned int word = words[k / 2];
        return __uint_as_float(k % 2 ? word & 0xffff0000 : word << 16);
    }
    __device__ void set(unsigned int k, float value) {
        bf16 rounded;
        store(&rounded, value);
        put(k, widen(rounded));
    }
    __device__ void put(unsigned int k, float value) {
        unsigned int bits = __float_as_uint(value), &word = words[k / 2];
        word = k % 2 ? (word & 0xffff) | (bits & 0xffff0000) : (word & 0xffff0000) | (bits >> 16);
    }
};
// A place that is in no window of 3x3.
#define NO_PLACE 0xffu

// Where in their windows some winners are.
template <unsigned int N> struct alignas(N) Winners {
    unsigned char of[N];

    __device__ bool is(unsigned int k, unsigned int place) const { return of[k] == place; }
    __device__ void set(unsigned int k, unsigned int place) { of[k] = static_cast<unsigned char>(place); }
};
template <> struct alignas(4) Winners<4> {
    unsigned int word;

    __device__ bool is(unsigned int k, unsigned int place) const {
        return ((word ^ place * 0x01010101) & 0xffu << 8 * k) == 0;
    }
    __device__ void set(unsigned int k, unsigned int place) { word = k ? word | place << 8 * k : place; }
};
template <> struct alignas(8) Winners<8> {
    Winners<4> of[2];

    __device__ bool is(unsigned int k, unsigned int place) const { return of[k / 4].is(k % 4, place); }
    __device__ void set(unsigned int k, unsigned int place) { of[k / 4].set(k % 4, place); }
};

template <typename P, typename T> static __device__ __forceinline__ P load_pack(const T *from) {
    return *reinterpret_cast<const P *>(from);
}
template <typename P, typename T> static __device__ __forceinline__ void store_pack(T *to, const P &pack) {
    *reinterpret_cast<P *>(to) = pack;
}

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

// The same the other way round: planes from pixels.
template <typename T>
static __device__ __forceinline__ void to_planes(const T *map, T *planes, unsigned int channels, unsigned int pixels,
                                                 unsigned int width, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        unsigned int c = i / pixels % channels, row = i / (pixels * channels) * pixels + i % pixels;
        planes[i] = map[row * width + c];
    }
}

// Weights of a launch at the most.
#define WEIGHTS_PER_LAUNCH 64
// Numbers that a block lays out at the most, unless a single pair of channels has more.
#define NUMBERS_PER_LAYOUT_BLOCK 2304

// Weights (C_out, C_in, taps) and the same as (C_out, taps, width), some at a time. Weight w has the blocks before `end[w]`,
// of `pairs` pairs of an output and an input channel each.
template <typename T> struct Weights {
    float *planes[WEIGHTS_PER_LAUNCH];
    T *pixels[WEIGHTS_PER_LAUNCH];
    unsigned int c_out[WEIGHTS_PER_LAUNCH], c_in[WEIGHTS_PER_LAUNCH], width[WEIGHTS_PER_LAUNCH], taps[WEIGHTS_PER_LAUNCH];
    unsigned int pairs[WEIGHTS_PER_LAUNCH], end[WEIGHTS_PER_LAUNCH];
};

// One weight, and a block's part of it: `pairs` pairs of channels, from `first_pair` on.
template <typename T> struct Laid {
    float *planes;
    T *pixels;
    unsigned int c_in, width, taps, first_pair, pairs;

    __device__ Laid(const Weights<T> &all, unsigned int block) {
        unsigned int w = entry_of(all.end, block);
        planes = all.planes[w];
        pixels = all.pixels[w];
        c_in = all.c_in[w];
        width = all.width[w];
        taps = all.taps[w];
        first_pair = block * all.pairs[w];
        unsigned int rest = all.c_out[w] * c_in - first_pair;
        pairs = rest < all.pairs[w] ? rest : all.pairs[w];
    }
    __device__ unsigned int channel(unsigned int pair) const { return (first_pair + pair) % c_in; }
    // Where in `pixels` the first tap of a pair is; the others are `width` apart.
    __device__ unsigned int at(unsigned int pair) const {
        return (first_pair + pair) / c_in * taps * width + channel(pair);
    }
};

// Planes and pixels in the order in which they lie: what is between is shared, unless it is one pair with more than fits.
// Channels beyond C_in are zero.
template <typename T> static __device__ __forceinline__ void lay_weights(const Weights<T> &all) {
    __shared__ float shared[NUMBERS_PER_LAYOUT_BLOCK];
    Laid<T> laid(all, blockIdx.x);
    unsigned int count = laid.pairs * laid.taps;
    const float *planes = laid.planes + laid.first_pair * laid.taps;
    bool fits = count <= NUMBERS_PER_LAYOUT_BLOCK;
    for (unsigned int i = threadIdx.x; fits && i < count; i += THREADS) {
        shared[i] = planes[i];
    }
    __syncthreads();
    const float *from = fits ? shared : planes;
    for (unsigned int pair = threadIdx.x; pair < laid.pairs; pair += THREADS) {
        T *to = laid.pixels + laid.at(pair);
        for (unsigned int tap = 0; tap < laid.taps; tap++) {
            store(&to[tap * laid.width], from[pair * laid.taps + tap]);
        }
        for (unsigned int beyond = 1; laid.channel(pair) + 1 == laid.c_in && laid.c_in - 1 + beyond < laid.width; beyond++) {
            for (unsigned int tap = 0; tap < laid.taps; tap++) {
                store(&to[tap * laid.width + beyond], 0.0f);
            }
        }
    }
}

// The same the other way round: planes from pixels.
template <typename T> static __device__ __forceinline__ void take_weights(const Weights<T> &all) {
    __shared__ float shared[NUMBERS_PER_LAYOUT_BLOCK];
    Laid<T> laid(all, blockIdx.x);
    unsigned int count = laid.pairs * laid.taps;
    float *planes = laid.planes + laid.first_pair * laid.taps;
    bool fits = count <= NUMBERS_PER_LAYOUT_BLOCK;
    float *to = fits ? shared : planes;
    for (unsigned int pair = threadIdx.x; pair < laid.pairs; pair += THREADS) {
        const T *from = laid.pixels + laid.at(pair);
        for (unsigned int tap = 0; tap < laid.taps; tap++) {
            to[pair * laid.taps + tap] = widen(from[tap * laid.width]);
        }
    }
    __syncthreads();
    for (unsigned int i = threadIdx.x; fits && i < count; i += THREADS) {
        planes[i] = shared[i];
    }
}

// Where in a map a thread's pack lies.
struct Place {
    unsigned int image, h, w, channel;

    __device__ Place(unsigned int i, unsigned int pack, const Divisor &packs, const Divisor &width, const Divisor &height) {
        unsigned int pixel = packs.divide(i);
        channel = i * pack;
        unsigned int line = width.divide(pixel);
        w = pixel;
        image = height.divide(line);
        h = line;
    }
};

// Windows along an axis that see position i, from `first` on. K and S are their kernel and stride, where these are known.
template <unsigned int K, unsigned int S> struct Seeing {
    // Where K and S are known, at most so many windows see a position. Of one that is not there, `first + a` is beyond the output, or
    // `place(a)` beyond the kernel.
    static constexpr unsigned int MOST = K ? (K + S - 1) / S : 1;
    const Axis &axis;
    unsigned int i, first;

    __device__ Seeing(const Axis &of, unsigned int position) : axis(of), i(position + of.padding) {
        first = i < kernel() ? 0 : (i - kernel()) / (K ? S : axis.stride) + 1;
    }
    __device__ unsigned int kernel() const { return K ? K : axis.kernel; }
    // The position's place in window `first + a`.
    __device__ unsigned int place(unsigned int a) const { return i - (first + a) * (K ? S : axis.stride); }
    __device__ bool has(unsigned int a) const { return first + a < axis.output && place(a) < kernel(); }
    // Window `first + a`, or the last where that is beyond the output.
    __device__ unsigned int nearest(unsigned int a) const {
        return first + a < axis.output ? first + a : axis.output - 1;
    }
};

// sum += a window's gradient where it was won by `place`.
template <typename T, unsigned int N>
static __device__ __forceinline__ void add_won(float (&sum)[N], const Winners<N> &won, const Pack<T, N> &gradient,
                                               unsigned int place) {
    for (unsigned int k = 0; k < N; k++) {
        if (won.is(k, place)) {
            sum[k] += gradient.at(k);
        }
    }
}

// sum += dy of the windows that a pack won, in their order: those that `lines` and `columns` see, in an image whose first window
// is number `image`.
template <typename T, unsigned int N, unsigned int K, unsigned int S>
static __device__ __forceinline__ void add_windows(float (&sum)[N], const unsigned char *winners, const T *dy,
                                                   const Seeing<K, S> &lines, const Seeing<K, S> &columns,
                                                   unsigned int image, unsigned int channels) {
    constexpr unsigned int MOST = Seeing<K, S>::MOST;
    if (K) {
        // Of a line all are loaded before the first is looked at, and no load has a condition: the compiler puts one that has
        // behind the use of the one before, and a thread waits for each. Instead of a window beyond the output it loads the last;
        // one that does not see the position counts with a place that none has won. Look at the machine code after a change: with
        // `place` as an expression in the call nvcc 13.0 spreads the loads apart again.
        UNROLL(MOST)
        for (unsigned int a = 0; a < MOST; a++) {
            Winners<N> won[MOST];
            Pack<T, N> gradient[MOST];
            unsigned int line = image + lines.nearest(a) * columns.axis.output;
            UNROLL(MOST)
            for (unsigned int b = 0; b < MOST; b++) {
                unsigned int from = (line + columns.nearest(b)) * channels;
                won[b] = load_pack<Winners<N>>(&winners[from]);
                gradient[b] = load_pack<Pack<T, N>>(&dy[from]);
            }
            UNROLL(MOST)
            for (unsigned int b = 0; b < MOST; b++) {
                bool has = lines.has(a) && columns.has(b);
                unsigned int place = has ? lines.place(a) * K + columns.place(b) : NO_PLACE;
                add_won(sum, won[b], gradient[b], place);
            }
        }
        return;
    }
    for (unsigned int a = 0; lines.has(a); a++) {
        unsigned int line = image + (lines.first + a) * columns.axis.output;
        for (unsigned int b = 0; columns.has(b); b++) {
            unsigned int from = (line + columns.first + b) * channels;
            auto won = load_pack<Winners<N>>(&winners[from]);
            auto gradient = load_pack<Pack<T, N>>(&dy[from]);
            add_won(sum, won, gradient, lines.place(a) * columns.kernel() + columns.place(b));
        }
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
    // Null where all of it comes of `pooled`.
    const T *gradient;
    // The gradient of a pooling of the map and its winners, which are added to the gradient; null where there is none.
    const T *pooled;
    const unsigned char *winners;
    // (rows, channels / N) where threads take N channels: bit k says that number k of a pack of the map is not at most 0. Null
    // where nobody keeps it.
    unsigned char *mask;
    // A number for each channel. `deviation` is 1/σ of the batch, or the running variance.
    const float *weight, *bias, *mean, *deviation;
    unsigned int channels, raw_width, map_width;
    // Its first channel among those of all segments.
    unsigned int first;
    unsigned int kind;
    float eps;
    // The binary logarithm of how many packs of channels a block takes side by side, at most MOST_LOG2_PACKS.
    unsigned int log2_packs;
};
#define MOST_LOG2_PACKS 5
// Some segments, which have the blocks before `end`, and channels of all.
template <typename T> struct Segments {
    Segment<T> of[SEGMENTS];
    unsigned int end[SEGMENTS], rows, channels;
    // The axes of the poolings, and the size of the map.
    Axis h, w;
    Divisor width, height;
};

// What follows a convolution at the channels of a pack.
template <unsigned int N> struct Follows {
    unsigned int kind;
    float mean[N], inverse_std[N], scale[N], bias[N];

    template <typename T> __device__ Follows(const Segment<T> &of, unsigned int channel) : kind(of.kind) {
        for (unsigned int k = 0; k < N; k++) {
            bias[k] = of.bias[channel + k];
            mean[k] = 0;
            inverse_std[k] = scale[k] = 1;
        }
        if (kind != BIAS) {
            // Loaded before any is needed.
            for (unsigned int k = 0; k < N; k++) {
                mean[k] = of.mean[channel + k];
                inverse_std[k] = of.deviation[channel + k];
                scale[k] = of.weight[channel + k];
            }
            for (unsigned int k = 0; k < N; k++) {
                inverse_std[k] = kind == BATCH ? inverse_std[k] : 1 / sqrtf(inverse_std[k] + of.eps);
                scale[k] *= inverse_std[k];
            }
        }
    }
    // A batch norm with these statistics.
    template <typename T>
    __device__ Follows(const Segment<T> &of, unsigned int channel, const float (&mean_)[N], const float (&inverse_std_)[N])
        : kind(BATCH) {
        for (unsigned int k = 0; k < N; k++) {
            bias[k] = of.bias[channel + k];
            mean[k] = mean_[k];
            inverse_std[k] = inverse_std_[k];
            scale[k] = of.weight[channel + k] * inverse_std[k];
        }
    }
    __device__ float value(unsigned int k, float raw) const {
        return kind == BIAS ? raw + bias[k] : multiply_add(raw - mean[k], scale[k], bias[k]);
    }
};

// A block's packs of a segment's channels, in `per_part` rows. A thread has one pack of every `step`-th row.
template <typename T, unsigned int N> struct Column {
    const Segment<T> &segment;
    // The first channel of the block, and of the thread.
    unsigned int first_channel, channel;
    unsigned int row, end, step, count;
    bool inside;

    __device__ Column(const Segments<T> &all, unsigned int block, unsigned int per_part)
        : segment(all.of[entry_of(all.end, block)]) {
        unsigned int log2_packs = segment.log2_packs, start = blockIdx.y * per_part;
        first_channel = (block << log2_packs) * N;
        channel = first_channel + (threadIdx.x & ((1u << log2_packs) - 1)) * N;
        inside = channel < segment.channels;
        count = all.rows - start < per_part ? all.rows - start : per_part;
        end = start + count;
        row = start + (threadIdx.x >> log2_packs);
        step = THREADS >> log2_packs;
    }
    // Whether it is one of the threads that hold the block's sums.
    __device__ bool first() const { return inside && threadIdx.x < 1u << segment.log2_packs; }
};

// The packs at `from` of ROWS rows, `step` apart, so far as they come before `end`: all are under way before the first is needed.
template <typename T, unsigned int N>
static __device__ __forceinline__ void load_rows(Pack<T, N> (&packs)[ROWS], const T *from, unsigned int width, unsigned int row,
                                                 unsigned int step, unsigned int end) {
    for (unsigned int j = 0; j < ROWS; j++) {
        if (row + j * step < end) {
            packs[j] = load_pack<Pack<T, N>>(&from[(row + j * step) * width]);
        }
    }
}

// The sums of `values` over the block's rows, for every thread of the pack.
template <unsigned int N>
static __device__ __forceinline__ void column_sums(float (&values)[N], float (*shared)[THREADS], unsigned int log2_packs) {
    __syncthreads();
    for (unsigned int k = 0; k < N; k++) {
        shared[k][threadIdx.x] = values[k];
    }
    for (unsigned int half = THREADS / 2; half >> log2_packs; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            for (unsigned int k = 0; k < N; k++) {
                shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
            }
        }
    }
    __syncthreads();
    for (unsigned int k = 0; k < N; k++) {
        values[k] = shared[k][threadIdx.x & ((1u << log2_packs) - 1)];
    }
}

// map = ReLU of what follows `raw`, in a thread's rows.
template <typename T, unsigned int N>
static __device__ __forceinline__ void finish(const Column<T, N> &at, const Follows<N> &follows) {
    const Segment<T> &s = at.segment;
    for (unsigned int row = at.row; row < at.end; row += ROWS * at.step) {
        Pack<T, N> packs[ROWS] = {};
        load_rows(packs, s.raw + at.channel, s.raw_width, row, at.step, at.end);
        for (unsigned int j = 0; j < ROWS; j++) {
            unsigned int r = row + j * at.step, mask = 0;
            if (r >= at.end) {
                break;
            }
            for (unsigned int k = 0; k < N; k++) {
                float value = follows.value(k, packs[j].at(k));
                packs[j].set(k, keep_positive(value, value));
                // Asked of what is stored, since rounding may have made it 0.
                mask |= packs[j].at(k) <= 0 ? 0 : 1u << k;
            }
            store_pack(&s.map[r * s.map_width + at.channel], packs[j]);
            if (N > 1 && s.mask) {
                s.mask[(r * s.channels + at.channel) / N] = static_cast<unsigned char>(mask);
            }
        }
    }
}

template <typename T, unsigned int N>
static __device__ __forceinline__ void finish(const Segments<T> &all, unsigned int per_part) {
    Column<T, N> at(all, blockIdx.x, per_part);
    if (at.inside) {
        finish<T, N>(at, Follows<N>(at.segment, at.channel));
    }
}

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
// Of a single part the statistics are written at once, as `join_moments` has them, and what `finish` would write as well.
template <typename T, unsigned int N>
static __device__ __forceinline__ void moments(const Segments<T> &all, double *means, float *squares, float *statistics,
                                               unsigned int per_part) {
    __shared__ float shared[N][THREADS];
    Column<T, N> at(all, blockIdx.x, per_part);
    const Segment<T> &s = at.segment;
    const T *x = s.raw + at.channel;
    float mean[N], square[N], rest[N];
    for (unsigned int k = 0; k < N; k++) {
        mean[k] = square[k] = rest[k] = 0;
    }
    for (unsigned int row = at.row; at.inside && row < at.end; row += ROWS * at.step) {
        Pack<T, N> packs[ROWS] = {};
        load_rows(packs, x, s.raw_width, row, at.step, at.end);
        // Rows that are not there are zeros.
        for (unsigned int j = 0; j < ROWS; j++) {
            for (unsigned int k = 0; k < N; k++) {
                mean[k] += packs[j].at(k);
            }
        }
    }
    column_sums<N>(mean, shared, s.log2_packs);
    for (unsigned int k = 0; k < N; k++) {
        mean[k] /= at.count;
    }
    for (unsigned int row = at.row; at.inside && row < at.end; row += ROWS * at.step) {
        Pack<T, N> packs[ROWS] = {};
        load_rows(packs, x, s.raw_width, row, at.step, at.end);
        for (unsigned int j = 0; j < ROWS; j++) {
            if (row + j * at.step >= at.end) {
                break;
            }
            for (unsigned int k = 0; k < N; k++) {
                float difference = packs[j].at(k) - mean[k];
                square[k] += difference * difference;
                rest[k] += difference;
            }
        }
    }
    column_sums<N>(rest, shared, s.log2_packs);
    column_sums<N>(square, shared, s.log2_packs);
    // The rest takes double, a channel a thread: what one thread has of each channel is handed over.
    __shared__ float handed[3][N << MOST_LOG2_PACKS];
    if (at.first()) {
        for (unsigned int k = 0; k < N; k++) {
            handed[0][threadIdx.x * N + k] = mean[k];
            handed[1][threadIdx.x * N + k] = rest[k];
            handed[2][threadIdx.x * N + k] = square[k];
        }
    }
    __syncthreads();
    unsigned int own = threadIdx.x, in_segment = at.first_channel + own;
    if (own < N << s.log2_packs && in_segment < s.channels) {
        float of_rest = handed[1][own];
        float squared = handed[2][own] - of_rest * of_rest / at.count;
        double exact = handed[0][own] + static_cast<double>(of_rest) / at.count;
        unsigned int channel = s.first + in_segment;
        if (gridDim.y == 1) {
            set_statistics(all, statistics, s, channel, exact, squared);
            handed[0][own] = statistics[channel];
            handed[1][own] = statistics[all.channels + channel];
        } else {
            means[blockIdx.y * all.channels + channel] = exact;
            squares[blockIdx.y * all.channels + channel] = squared;
        }
    }
    if (gridDim.y > 1) {
        return;
    }
    __syncthreads();
    if (at.inside) {
        float inverse_std[N];
        for (unsigned int k = 0; k < N; k++) {
            unsigned int of_pack = at.channel - at.first_channel + k;
            mean[k] = handed[0][of_pack];
            inverse_std[k] = handed[1][of_pack];
        }
        finish<T, N>(at, Follows<N>(s, at.channel, mean, inverse_std));
    }
}

// Channels of a block that joins parts.
#define CHANNELS_PER_JOIN_BLOCK 32
// Threads of a channel there: number i takes part i and every JOIN_THREADS-th after it.
#define JOIN_THREADS (THREADS / CHANNELS_PER_JOIN_BLOCK)
// Parts that a thread loads before it adds the first.
#define PARTS_AT_ONCE 8

// The sum of `value` over the threads of a channel, for each of them.
static __device__ __forceinline__ double joined_sum(double value, double *shared) {
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    double sum = 0;
    for (unsigned int i = 0; i < JOIN_THREADS; i++) {
        sum += shared[i * CHANNELS_PER_JOIN_BLOCK + threadIdx.x % CHANNELS_PER_JOIN_BLOCK];
    }
    return sum;
}

// What a thread adds up at once of (parts, channels), from its channel on: every JOIN_THREADS-th part from `part` on, and 0 beyond
// the last.
template <typename S>
static __device__ __forceinline__ void load_parts(S (&of)[PARTS_AT_ONCE], const S *from, unsigned int part, unsigned int parts,
                                                  unsigned int channels) {
    for (unsigned int j = 0; j < PARTS_AT_ONCE; j++) {
        of[j] = part + j * JOIN_THREADS < parts ? from[(part + j * JOIN_THREADS) * channels] : 0;
    }
}

// The statistics of each channel from its parts.
template <typename T>
static __device__ __forceinline__ void join_moments(const Segments<T> &all, const double *means, const float *squares,
                                                    float *statistics, unsigned int parts, unsigned int per_part) {
    __shared__ double shared[THREADS];
    unsigned int channel = blockIdx.x * CHANNELS_PER_JOIN_BLOCK + threadIdx.x % CHANNELS_PER_JOIN_BLOCK;
    unsigned int first = threadIdx.x / CHANNELS_PER_JOIN_BLOCK;
    unsigned int last_rows = all.rows - (parts - 1) * per_part;
    double total = 0, squared = 0;
    for (unsigned int part = first; channel < all.channels && part < parts; part += PARTS_AT_ONCE * JOIN_THREADS) {
        double of[PARTS_AT_ONCE];
        load_parts(of, means + channel, part, parts, all.channels);
        for (unsigned int j = 0; j < PARTS_AT_ONCE; j++) {
            total += of[j] * (part + j * JOIN_THREADS + 1 < parts ? per_part : last_rows);
        }
    }
    double mean = joined_sum(total, shared) / all.rows;
    for (unsigned int part = first; channel < all.channels && part < parts; part += PARTS_AT_ONCE * JOIN_THREADS) {
        double of[PARTS_AT_ONCE];
        float inside[PARTS_AT_ONCE];
        load_parts(of, means + channel, part, parts, all.channels);
        load_parts(inside, squares + channel, part, parts, all.channels);
        for (unsigned int j = 0; j < PARTS_AT_ONCE && part + j * JOIN_THREADS < parts; j++) {
            double difference = of[j] - mean;
            squared += inside[j] + difference * difference * (part + j * JOIN_THREADS + 1 < parts ? per_part : last_rows);
        }
    }
    squared = joined_sum(squared, shared);
    if (channel < all.channels && first == 0) {
        unsigned int s = 0;
        while (channel >= all.of[s].first + all.of[s].channels) {
            s++;
        }
        set_statistics(all, statistics, all.of[s], channel, mean, squared);
    }
}

// raw = the gradient before the batch norm: weight/σ · (g − Σg/rows − x̂·Σgx̂/rows), in a thread's rows.
template <typename T, unsigned int N>
static __device__ __forceinline__ void input_gradient(const Column<T, N> &at, const Follows<N> &follows, const float (&plain)[N],
                                                      const float (&with_x)[N], float share) {
    const Segment<T> &s = at.segment;
    for (unsigned int row = at.row; row < at.end; row += ROWS * at.step) {
        Pack<T, N> raw[ROWS], dy[ROWS];
        load_rows(raw, s.raw + at.channel, s.raw_width, row, at.step, at.end);
        load_rows(dy, s.gradient + at.channel, s.map_width, row, at.step, at.end);
        for (unsigned int j = 0; j < ROWS; j++) {
            unsigned int r = row + j * at.step;
            if (r >= at.end) {
                break;
            }
            for (unsigned int k = 0; k < N; k++) {
                float value = raw[j].at(k);
                float gradient = keep_positive(dy[j].at(k), follows.value(k, value));
                float x = (value - follows.mean[k]) * follows.inverse_std[k];
                gradient -= plain[k] * share + x * (with_x[k] * share);
                raw[j].set(k, follows.scale[k] * gradient);
            }
            store_pack(&s.raw[r * s.raw_width + at.channel], raw[j]);
        }
    }
}

template <typename T, unsigned int N>
static __device__ __forceinline__ void input_gradient(const Segments<T> &all, const float *joined, float share,
                                                      unsigned int per_part) {
    Column<T, N> at(all, blockIdx.x, per_part);
    if (!at.inside) {
        return;
    }
    unsigned int channel = at.segment.first + at.channel;
    float plain[N], with_x[N];
    for (unsigned int k = 0; k < N; k++) {
        plain[k] = joined[channel + k];
        with_x[k] = joined[all.channels + channel + k];
    }
    input_gradient<T, N>(at, Follows<N>(at.segment, at.channel), plain, with_x, share);
}

// sums[0][part][channel] = Σ g, sums[1][part][channel] = Σ g·x̂, where g is the gradient before the ReLU. Behind a bias there
// is no x̂ and no sums[1], and `raw` becomes g. Of a single part these are the sums of all, with which `raw` of a batch norm becomes
// what `input_gradient` would make of it. Poolings are those of maps behind a bias, with windows of K pixels to a side, S apart;
// with 0 there are none.
template <typename T, unsigned int N, unsigned int K, unsigned int S>
static __device__ __forceinline__ void gradient_sums(const Segments<T> &all, float *sums, unsigned int per_part) {
    // Where there are windows, those of one row are loads enough.
    constexpr unsigned int AT_ONCE = K ? 1 : ROWS;
    __shared__ float shared[N][THREADS];
    Column<T, N> at(all, blockIdx.x, per_part);
    const Segment<T> &s = at.segment;
    bool bias = K || s.kind == BIAS, masked = bias && N > 1 && s.mask;
    float plain[N], with_x[N];
    for (unsigned int k = 0; k < N; k++) {
        plain[k] = with_x[k] = 0;
    }
    if (at.inside) {
        Follows<N> follows(s, at.channel);
        const T *by = bias ? s.map : s.raw;
        unsigned int width = bias ? s.map_width : s.raw_width;
        for (unsigned int row = at.row; row < at.end; row += AT_ONCE * at.step) {
            Pack<T, N> dy[AT_ONCE] = {}, of[AT_ONCE] = {};
            unsigned int mask[AT_ONCE] = {};
            // By hand: with `load_rows` it takes 87 registers instead of 80 in f32, and two blocks fit where three did.
            for (unsigned int j = 0; j < AT_ONCE; j++) {
                unsigned int r = row + j * at.step;
                if (r < at.end) {
                    if (!K || s.gradient) {
                        dy[j] = load_pack<Pack<T, N>>(&s.gradient[r * s.map_width + at.channel]);
                    }
                    if (masked) {
                        mask[j] = s.mask[(r * s.channels + at.channel) / N];
                    } else {
                        of[j] = load_pack<Pack<T, N>>(&by[r * width + at.channel]);
                    }
                }
            }
            for (unsigned int j = 0; j < AT_ONCE; j++) {
                unsigned int r = row + j * at.step;
                if (r >= at.end) {
                    break;
                }
                float gradient[N];
                for (unsigned int k = 0; k < N; k++) {
                    gradient[k] = dy[j].at(k);
                }
                if (K && s.pooled) {
                    unsigned int column = r, line = all.width.divide(column), image = all.height.divide(line);
                    Seeing<K, S> lines(all.h, line), columns(all.w, column);
                    add_windows<T, N, K, S>(gradient, s.winners + at.channel, s.pooled + at.channel, lines, columns,
                                            image * all.h.output * all.w.output, s.map_width);
                }
                for (unsigned int k = 0; k < N; k++) {
                    float number = of[j].at(k);
                    if (bias) {
                        bool passes = masked ? mask[j] >> k & 1 : !(number <= 0);
                        gradient[k] = passes ? gradient[k] : 0;
                        K ? dy[j].set(k, gradient[k]) : dy[j].put(k, gradient[k]);
                    } else {
                        gradient[k] = keep_positive(gradient[k], follows.value(k, number));
                        with_x[k] += gradient[k] * ((number - follows.mean[k]) * follows.inverse_std[k]);
                    }
                    plain[k] += gradient[k];
                }
                if (bias) {
                    store_pack(&s.raw[r * s.raw_width + at.channel], dy[j]);
                }
            }
        }
    }
    unsigned int to = blockIdx.y * all.channels + s.first + at.channel;
    column_sums<N>(plain, shared, s.log2_packs);
    if (at.first()) {
        for (unsigned int k = 0; k < N; k++) {
            sums[to + k] = plain[k];
        }
    }
    if (!bias) {
        column_sums<N>(with_x, shared, s.log2_packs);
        if (at.first()) {
            for (unsigned int k = 0; k < N; k++) {
                sums[gridDim.y * all.channels + to + k] = with_x[k];
            }
        }
        if (gridDim.y == 1 && at.inside) {
            input_gradient<T, N>(at, Follows<N>(s, at.channel), plain, with_x, 1.0f / all.rows);
        }
    }
}

// Sums of a launch that joins their parts, at the most.
#define SUMS_PER_LAUNCH 64

// Sums (parts, channels), some at a time, and where the sums of all parts go. Number j has the blocks before `end[j]`, of
// CHANNELS_PER_JOIN_BLOCK channels each.
struct Joins {
    const float *sums[SUMS_PER_LAUNCH];
    float *joined[SUMS_PER_LAUNCH];
    unsigned int channels[SUMS_PER_LAUNCH], parts[SUMS_PER_LAUNCH], end[SUMS_PER_LAUNCH];
};

// joined[channel] = the sum over the parts.
static __device__ __forceinline__ void join_sums(const Joins &all) {
    __shared__ double shared[THREADS];
    unsigned int block = blockIdx.x, j = entry_of(all.end, block);
    unsigned int channel = block * CHANNELS_PER_JOIN_BLOCK + threadIdx.x % CHANNELS_PER_JOIN_BLOCK, channels = all.channels[j];
    unsigned int first = threadIdx.x / CHANNELS_PER_JOIN_BLOCK;
    const float *sums = all.sums[j];
    double sum = 0;
    for (unsigned int part = first, parts = all.parts[j]; channel < channels && part < parts; part += PARTS_AT_ONCE * JOIN_THREADS) {
        float of[PARTS_AT_ONCE];
        load_parts(of, sums + channel, part, parts, channels);
        for (unsigned int i = 0; i < PARTS_AT_ONCE; i++) {
            sum += of[i];
        }
    }
    sum = joined_sum(sum, shared);
    if (channel < channels && first == 0) {
        all.joined[j][channel] = static_cast<float>(sum);
    }
}

// The largest numbers that were seen so far and their places: the first of equals, or the last NaN.
template <unsigned int N> struct Best {
    float of[N] = {};
    unsigned int place[N] = {};

    __device__ void see(unsigned int k, float value, unsigned int at, bool first) {
        bool wins = first || value > of[k] || value != value;
        of[k] = wins ? value : of[k];
        place[k] = wins ? at : place[k];
    }
    // `winners` may be null.
    template <typename T> __device__ void write(T *y, unsigned char *winners, unsigned int to) const {
        Pack<T, N> maxima = {};
        for (unsigned int k = 0; k < N; k++) {
            maxima.put(k, of[k]);
        }
        store_pack(&y[to], maxima);
        if (winners) {
            Winners<N> won;
            for (unsigned int k = 0; k < N; k++) {
                won.set(k, place[k]);
            }
            store_pack(&winners[to], won);
        }
    }
};

// y = the window's maximum, and winners = where in the window it is: the first in row-major order, or the last NaN. `winners`
// may be null. A thread a pack; `packs` of a pixel, and pixels of the output, divide.
template <typename T, unsigned int N>
static __device__ __forceinline__ void max_pool(const T *x, T *y, unsigned char *winners, const Axis &h, const Axis &w,
                                                const Divisor &packs, const Divisor &width, const Divisor &height,
                                                unsigned int threads) {
    unsigned int i = thread_of_grid();
    if (i >= threads) {
        return;
    }
    Place at(i, N, packs, width, height);
    unsigned int channels = packs.divisor * N;
    const T *image = x + at.image * h.input * w.input * channels + at.channel;
    // The window's first line and column, which may lie before 0 as large numbers.
    unsigned int top = at.h * h.stride - h.padding, left = at.w * w.stride - w.padding;
    unsigned int r0 = top < h.input ? 0 : 0 - top, s0 = left < w.input ? 0 : 0 - left;
    Best<N> best;
    for (unsigned int r = r0; r < h.kernel && top + r < h.input; r++) {
        for (unsigned int s = s0; s < w.kernel && left + s < w.input; s++) {
            auto pack = load_pack<Pack<T, N>>(&image[((top + r) * w.input + left + s) * channels]);
            for (unsigned int k = 0; k < N; k++) {
                best.see(k, pack.at(k), r * w.kernel + s, r == r0 && s == s0);
            }
        }
    }
    best.write(y, winners, i * N);
}

// The position inside of the input that is nearest to `start + i`, which may lie before 0 as a large number.
static __device__ __forceinline__ unsigned int inside(unsigned int start, unsigned int i, unsigned int input) {
    int position = static_cast<int>(start + i), last = static_cast<int>(input) - 1;
    position = position < 0 ? 0 : position;
    return static_cast<unsigned int>(position < last ? position : last);
}

// Windows of 3x3 pixels, STRIDE apart, of which a thread takes LINES below each other: it compares each line of three pixels
// once. Instead of a pixel outside it sees the nearest inside once more, which changes nothing. `height` divides by the
// groups of such lines.
template <typename T, unsigned int N, unsigned int STRIDE, unsigned int LINES>
static __device__ __forceinline__ void max_pool_3(const T *x, T *y, unsigned char *winners, const Axis &h, const Axis &w,
                                                  const Divisor &packs, const Divisor &width, const Divisor &height,
                                                  unsigned int threads) {
    unsigned int i = thread_of_grid();
    if (i >= threads) {
        return;
    }
    Place at(i, N, packs, width, height);
    unsigned int channels = packs.divisor * N, oh = at.h * LINES;
    const T *image = x + at.image * h.input * w.input * channels + at.channel;
    unsigned int top = oh * STRIDE - h.padding, left = at.w * STRIDE - w.padding;
    unsigned int column[3];
    for (unsigned int s = 0; s < 3; s++) {
        column[s] = inside(left, s, w.input);
    }
    Best<N> best[LINES];
    UNROLL(3 + (LINES - 1) * STRIDE)
    for (unsigned int r = 0; r < 3 + (LINES - 1) * STRIDE; r++) {
        unsigned int ih = inside(top, r, h.input);
        Best<N> of_line;
        UNROLL(3)
        for (unsigned int s = 0; s < 3; s++) {
            auto pack = load_pack<Pack<T, N>>(&image[(ih * w.input + column[s]) * channels]);
            for (unsigned int k = 0; k < N; k++) {
                of_line.see(k, pack.at(k), column[s] - left, s == 0);
            }
        }
        for (unsigned int line = 0; line < LINES; line++) {
            if (r >= line * STRIDE && r - line * STRIDE < 3) {
                unsigned int before = (ih - (top + line * STRIDE)) * 3;
                for (unsigned int k = 0; k < N; k++) {
                    best[line].see(k, of_line.of[k], before + of_line.place[k], r == line * STRIDE);
                }
            }
        }
    }
    for (unsigned int line = 0; line < LINES; line++) {
        if (oh + line < h.output) {
            best[line].write(y, winners, ((at.image * h.output + oh + line) * w.output + at.w) * channels + at.channel);
        }
    }
}

// dx of a number = the sum of dy over the windows that it won, in their order; with `add`, more than what is there. A thread a
// pack; `packs` of a pixel, and pixels of the input, divide.
template <typename T, unsigned int N, unsigned int K, unsigned int S>
static __device__ __forceinline__ void max_pool_gradient(const unsigned char *winners, const T *dy, T *dx, const Axis &h,
                                                         const Axis &w, const Divisor &packs, const Divisor &width,
                                                         const Divisor &height, unsigned int add, unsigned int threads) {
    unsigned int i = thread_of_grid();
    if (i >= threads) {
        return;
    }
    Place at(i, N, packs, width, height);
    unsigned int channels = packs.divisor * N;
    Seeing<K, S> lines(h, at.h), columns(w, at.w);
    float sum[N];
    for (unsigned int k = 0; k < N; k++) {
        sum[k] = 0;
    }
    if (add) {
        auto before = load_pack<Pack<T, N>>(&dx[i * N]);
        for (unsigned int k = 0; k < N; k++) {
            sum[k] = before.at(k);
        }
    }
    add_windows<T, N, K, S>(sum, winners + at.channel, dy + at.channel, lines, columns, at.image * h.output * w.output, channels);
    Pack<T, N> sums = {};
    for (unsigned int k = 0; k < N; k++) {
        sums.set(k, sum[k]);
    }
    store_pack(&dx[i * N], sums);
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

// The gradient of `average`: each pixel's share; a thread a pixel's number.
template <typename T>
static __device__ __forceinline__ void spread(const float *features, T *map, unsigned int pixels, unsigned int channels,
                                              unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        store(&map[i], features[i / (pixels * channels) * channels + i % channels] / pixels);
    }
}

#define PLAIN(NAME, T)                                                                                                 \
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
    extern "C" __global__ void static_graph_join_moments_##NAME(Segments<T> all, const double *means,                  \
                                                                const float *squares, float *statistics,               \
                                                                unsigned int parts, unsigned int per_part) {           \
        join_moments<T>(all, means, squares, statistics, parts, per_part);                                             \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_average_##NAME(const T *map, float *features, unsigned int pixels,         \
                                                           unsigned int channels, unsigned int elements) {             \
        average<T>(map, features, pixels, channels, elements);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_spread_##NAME(const float *features, T *map, unsigned int pixels,          \
                                                          unsigned int channels, unsigned int elements) {              \
        spread<T>(features, map, pixels, channels, elements);                                                          \
    }

// Kernels whose threads take N channels.
#define OF_PACKS(NAME, T, N)                                                                                           \
    extern "C" __global__ void static_graph_finish_##NAME(Segments<T> all, unsigned int per_part) {                    \
        finish<T, N>(all, per_part);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_moments_##NAME(Segments<T> all, double *means, float *squares,             \
                                                           float *statistics, unsigned int per_part) {                 \
        moments<T, N>(all, means, squares, statistics, per_part);                                                      \
    }                                                                                                                  \
    GRADIENT_SUMS(NAME, T, N, 0, 1, )                                                                                  \
    extern "C" __global__ void static_graph_input_gradient_##NAME(Segments<T> all, const float *joined, float share,   \
                                                                  unsigned int per_part) {                             \
        input_gradient<T, N>(all, joined, share, per_part);                                                            \
    }                                                                                                                  \
    POOLINGS(NAME, T, N, (max_pool<T, N>), 0, 1)

#define GRADIENT_SUMS(NAME, T, N, K, S, BOUNDS)                                                                        \
    extern "C" __global__ void BOUNDS static_graph_gradient_sums_##NAME(Segments<T> all, float *sums,                  \
                                                                        unsigned int per_part) {                       \
        gradient_sums<T, N, K, S>(all, sums, per_part);                                                                \
    }

#define POOLINGS(NAME, T, N, POOL, K, S)                                                                               \
    extern "C" __global__ void static_graph_max_pool_##NAME(const T *x, T *y, unsigned char *winners, Axis h, Axis w,  \
                                                            Divisor packs, Divisor width, Divisor height,              \
                                                            unsigned int threads) {                                    \
        POOL(x, y, winners, h, w, packs, width, height, threads);                                                      \
    }                                                                                                                  \
    extern "C" __global__ void static_graph_max_pool_gradient_##NAME(                                                  \
        const unsigned char *winners, const T *dy, T *dx, Axis h, Axis w, Divisor packs, Divisor width, Divisor height,\
        unsigned int add, unsigned int threads) {                                                                      \
        max_pool_gradient<T, N, K, S>(winners, dy, dx, h, w, packs, width, height, add, threads);                      \
    }

PLAIN(f32, float)
PLAIN(bf16, bf16)
OF_PACKS(1_f32, float, 1)
OF_PACKS(1_bf16, bf16, 1)
OF_PACKS(4_f32, float, 4)
OF_PACKS(8_bf16, bf16, 8)
// Windows of 3x3 pixels. At least four blocks fit on a multiprocessor, whose threads have the registers for the loads of a line.
#define OF_WINDOWS(NAME, T, N, S, LINES)                                                                               \
    GRADIENT_SUMS(NAME, T, N, 3, S, __launch_bounds__(THREADS, 4))                                                     \
    POOLINGS(NAME, T, N, (max_pool_3<T, N, S, LINES>), 3, S)

OF_WINDOWS(3_1_4_f32, float, 4, 1, 2)
OF_WINDOWS(3_1_8_bf16, bf16, 8, 1, 2)
OF_WINDOWS(3_2_4_f32, float, 4, 2, 1)
OF_WINDOWS(3_2_8_bf16, bf16, 8, 2, 1)

extern "C" __global__ void static_graph_join_sums_f32(Joins all) { join_sums(all); }
