// Batch normalisation of (images, channels, pixels). Statistics and parameters are float, for double x double.
//
// A channel's values are numbered image by image and cut into parts; block (channel, part) sums one of them. Means are
// taken before squared differences from them, so that a large mean costs no digits, and parts are joined in double.

static __device__ __forceinline__ unsigned int index_of(unsigned int value, unsigned int channel, unsigned int channels,
                                                        const Divisor &pixels) {
    unsigned int image = pixels.divide(value);
    return (image * channels + channel) * pixels.divisor + value;
}

// The channel of element i.
static __device__ __forceinline__ unsigned int channel_of(unsigned int i, const Divisor &channels, const Divisor &pixels) {
    unsigned int channel = pixels.divide(i);
    channels.divide(channel);
    return channel;
}

// means[channel][part], squares[channel][part] = the part's mean and its sum of squared differences from that. The mean that
// S can hold is off by its last digit, which beside a small deviation counts: what the differences still sum to mends both.
template <typename T, typename S>
static __device__ __forceinline__ void moments(const T *x, double *means, S *squares, unsigned int images, unsigned int channels,
                                               const Divisor &pixels, unsigned int per_part) {
    __shared__ S shared[THREADS];
    unsigned int values = images * pixels.divisor, start = blockIdx.y * per_part;
    unsigned int count = values - start < per_part ? values - start : per_part;
    S sum = 0;
    for (unsigned int v = threadIdx.x; v < count; v += THREADS) {
        sum += widen(x[index_of(start + v, blockIdx.x, channels, pixels)]);
    }
    S mean = block_sum<S>(sum, shared) / static_cast<S>(count);
    S square = 0, rest = 0;
    for (unsigned int v = threadIdx.x; v < count; v += THREADS) {
        S difference = widen(x[index_of(start + v, blockIdx.x, channels, pixels)]) - mean;
        square += difference * difference;
        rest += difference;
    }
    rest = block_sum<S>(rest, shared);
    square = block_sum<S>(square, shared) - rest * rest / static_cast<S>(count);
    if (threadIdx.x == 0) {
        means[blockIdx.x * gridDim.y + blockIdx.y] = mean + static_cast<double>(rest) / count;
        squares[blockIdx.x * gridDim.y + blockIdx.y] = square;
    }
}

// Joins a channel's parts, a thread a channel.
template <typename S>
static __device__ __forceinline__ void join_moments(const double *means, const S *squares, S *mean, S *inverse_std, S *unbiased,
                                                    unsigned int values, unsigned int channels, unsigned int parts,
                                                    unsigned int per_part, double eps) {
    unsigned int channel = thread_of_grid();
    if (channel >= channels) {
        return;
    }
    double total = 0, joined = 0;
    for (unsigned int part = 0; part < parts; part++) {
        unsigned int start = part * per_part;
        total += means[channel * parts + part] * (values - start < per_part ? values - start : per_part);
    }
    double all = total / values;
    for (unsigned int part = 0; part < parts; part++) {
        unsigned int start = part * per_part;
        double difference = means[channel * parts + part] - all;
        joined += squares[channel * parts + part] +
                  difference * difference * (values - start < per_part ? values - start : per_part);
    }
    mean[channel] = static_cast<S>(all);
    inverse_std[channel] = static_cast<S>(1 / sqrt(joined / values + eps));
    unbiased[channel] = static_cast<S>(joined / (values - 1));
}

template <typename S>
static __device__ __forceinline__ void invert(const S *variance, S *inverse_std, unsigned int channels, double eps) {
    unsigned int channel = thread_of_grid();
    if (channel < channels) {
        inverse_std[channel] = static_cast<S>(1 / sqrt(static_cast<double>(variance[channel]) + eps));
    }
}

// A channel's numbers.
template <typename S> struct Channel {
    S mean, inverse_std, scale, bias;

    __device__ Channel(const S *means, const S *inverse_stds, const S *weights, const S *biases, unsigned int channel)
        : mean(means[channel]), inverse_std(inverse_stds[channel]), scale(weights[channel] * inverse_stds[channel]),
          bias(biases[channel]) {}
    __device__ S normalized(S x) const { return multiply_add(x - mean, scale, bias); }
};

template <typename T, typename S>
static __device__ __forceinline__ void apply(const T *x, T *y, const S *mean, const S *inverse_std, const S *weight,
                                             const S *bias, const Divisor &channels, const Divisor &pixels, unsigned int relu,
                                             unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        S value = Channel<S>(mean, inverse_std, weight, bias, channel_of(i, channels, pixels)).normalized(widen(x[i]));
        store(&y[i], relu ? keep_positive(value, value) : value);
    }
}

// sums[0][channel][part] = Σ dy, sums[1][channel][part] = Σ dy·x̂, of dy before the ReLU where there is one.
template <typename T, typename S>
static __device__ __forceinline__ void gradient_sums(const T *x, const T *dy, const S *mean, const S *inverse_std,
                                                     const S *weight, const S *bias, S *sums, unsigned int images,
                                                     unsigned int channels, const Divisor &pixels, unsigned int per_part,
                                                     unsigned int relu) {
    __shared__ S shared[THREADS];
    Channel<S> channel(mean, inverse_std, weight, bias, blockIdx.x);
    unsigned int values = images * pixels.divisor, start = blockIdx.y * per_part;
    unsigned int count = values - start < per_part ? values - start : per_part;
    S plain = 0, with_x = 0;
    for (unsigned int v = threadIdx.x; v < count; v += THREADS) {
        unsigned int i = index_of(start + v, blockIdx.x, channels, pixels);
        S value = widen(x[i]), gradient = widen(dy[i]);
        if (relu) {
            gradient = keep_positive(gradient, channel.normalized(value));
        }
        plain += gradient;
        with_x += gradient * ((value - channel.mean) * channel.inverse_std);
    }
    plain = block_sum<S>(plain, shared);
    with_x = block_sum<S>(with_x, shared);
    if (threadIdx.x == 0) {
        unsigned int part = blockIdx.x * gridDim.y + blockIdx.y;
        sums[part] = plain;
        sums[channels * gridDim.y + part] = with_x;
    }
}

// dbias and dweight = the sums of their parts, in their order. A thread a channel.
template <typename S>
static __device__ __forceinline__ void join_sums(const S *sums, S *dbias, S *dweight, unsigned int channels, unsigned int parts) {
    unsigned int channel = thread_of_grid();
    if (channel >= channels) {
        return;
    }
    double plain = 0, with_x = 0;
    for (unsigned int part = channel * parts; part < (channel + 1) * parts; part++) {
        plain += sums[part];
        with_x += sums[channels * parts + part];
    }
    dbias[channel] = static_cast<S>(plain);
    dweight[channel] = static_cast<S>(with_x);
}

// dx = weight/σ · (dy − share·dbias − x̂·share·dweight), where share is 1 / values of a channel, or 0 for given statistics.
template <typename T, typename S>
static __device__ __forceinline__ void input_gradient(const T *x, const T *dy, T *dx, const S *mean, const S *inverse_std,
                                                      const S *weight, const S *bias, const S *dbias, const S *dweight,
                                                      double share, const Divisor &channels, const Divisor &pixels,
                                                      unsigned int relu, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    unsigned int c = channel_of(i, channels, pixels);
    Channel<S> channel(mean, inverse_std, weight, bias, c);
    S value = widen(x[i]), gradient = widen(dy[i]);
    if (relu) {
        gradient = keep_positive(gradient, channel.normalized(value));
    }
    if (share != 0) {
        S part = static_cast<S>(share);
        gradient -= dbias[c] * part + (value - channel.mean) * channel.inverse_std * (dweight[c] * part);
    }
    store(&dx[i], channel.scale * gradient);
}

#define KERNELS(NAME, T, S)                                                                                            \
    extern "C" __global__ void batch_norm_moments_##NAME(const T *x, double *means, S *squares, unsigned int images,   \
                                                         unsigned int channels, Divisor pixels,                        \
                                                         unsigned int per_part) {                                      \
        moments<T, S>(x, means, squares, images, channels, pixels, per_part);                                          \
    }                                                                                                                  \
    extern "C" __global__ void batch_norm_apply_##NAME(const T *x, T *y, const S *mean, const S *inverse_std,          \
                                                       const S *weight, const S *bias, Divisor channels,               \
                                                       Divisor pixels, unsigned int relu, unsigned int elements) {     \
        apply<T, S>(x, y, mean, inverse_std, weight, bias, channels, pixels, relu, elements);                          \
    }                                                                                                                  \
    extern "C" __global__ void batch_norm_gradient_sums_##NAME(                                                        \
        const T *x, const T *dy, const S *mean, const S *inverse_std, const S *weight, const S *bias, S *sums,         \
        unsigned int images, unsigned int channels, Divisor pixels, unsigned int per_part, unsigned int relu) {        \
        gradient_sums<T, S>(x, dy, mean, inverse_std, weight, bias, sums, images, channels, pixels, per_part, relu);   \
    }                                                                                                                  \
    extern "C" __global__ void batch_norm_input_gradient_##NAME(                                                       \
        const T *x, const T *dy, T *dx, const S *mean, const S *inverse_std, const S *weight, const S *bias,           \
        const S *dbias, const S *dweight, double share, Divisor channels, Divisor pixels, unsigned int relu,           \
        unsigned int elements) {                                                                                       \
        input_gradient<T, S>(x, dy, dx, mean, inverse_std, weight, bias, dbias, dweight, share, channels, pixels,      \
                             relu, elements);                                                                          \
    }

KERNELS(f32, float, float)
KERNELS(f64, double, double)
KERNELS(bf16, bf16, float)

#define CHANNEL_KERNELS(NAME, S)                                                                                       \
    extern "C" __global__ void batch_norm_join_moments_##NAME(const double *means, const S *squares, S *mean,          \
                                                              S *inverse_std, S *unbiased, unsigned int values,        \
                                                              unsigned int channels, unsigned int parts,               \
                                                              unsigned int per_part, double eps) {                     \
        join_moments<S>(means, squares, mean, inverse_std, unbiased, values, channels, parts, per_part, eps);          \
    }                                                                                                                  \
    extern "C" __global__ void batch_norm_invert_##NAME(const S *variance, S *inverse_std, unsigned int channels,      \
                                                        double eps) {                                                  \
        invert<S>(variance, inverse_std, channels, eps);                                                               \
    }                                                                                                                  \
    extern "C" __global__ void batch_norm_join_sums_##NAME(const S *sums, S *dbias, S *dweight, unsigned int channels, \
                                                           unsigned int parts) {                                       \
        join_sums<S>(sums, dbias, dweight, channels, parts);                                                           \
    }

CHANNEL_KERNELS(f32, float)
CHANNEL_KERNELS(f64, double)
