// What surrounds a convolution: bias and ReLU behind it, the ReLU's mask and the bias gradient before its backward pass.
//
// Tensors are (images, channels, pixels), contiguous, of fewer than 2^31 elements. Every sum has an order that does not
// depend on timing; those of bf16 are float.

// y = activation(y + bias of its channel), in place. `bias` may be null, for none.
template <typename T>
static __device__ __forceinline__ void bias_activation(T *y, const T *bias, unsigned int relu, const Divisor &channels,
                                                       const Divisor &pixels, unsigned int elements) {
    // 64 bits: the last step of the loop goes beyond 2^31.
    unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += step) {
        auto value = widen(y[i]);
        if (bias) {
            unsigned int pixel = static_cast<unsigned int>(i), channel = pixels.divide(pixel);
            channels.divide(channel);
            value += widen(bias[channel]);
        }
        // A NaN is not at most 0, and stays.
        if (relu && value <= 0) {
            value = 0;
        }
        store(&y[i], value);
    }
}

// masked = dy where y is not at most 0, else 0; sums[channel][part] = its sum over one part of the channel's values, which
// are numbered image by image. Block (channel, part). `y` and `masked` are null where there is no ReLU, `sums` where
// nobody needs the bias gradient.
template <typename T, typename Sum>
static __device__ __forceinline__ void mask_and_sum(const T *dy, const T *y, T *masked, Sum *sums, unsigned int images,
                                                    unsigned int channels, const Divisor &pixels, unsigned int per_part) {
    __shared__ Sum shared[THREADS];
    unsigned int channel = blockIdx.x;
    unsigned int values = images * pixels.divisor;
    unsigned int start = blockIdx.y * per_part;
    unsigned int end = values - start < per_part ? values : start + per_part;
    Sum sum = 0;
    for (unsigned int v = start + threadIdx.x; v < end; v += THREADS) {
        unsigned int pixel = v, image = pixels.divide(pixel);
        unsigned int i = (image * channels + channel) * pixels.divisor + pixel;
        Sum value = widen(dy[i]);
        if (y) {
            if (widen(y[i]) <= 0) {
                value = 0;
            }
            store(&masked[i], value);
        }
        sum += value;
    }
    if (!sums) {
        return;
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            shared[threadIdx.x] += shared[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        sums[channel * gridDim.y + blockIdx.y] = shared[0];
    }
}

// dbias[channel] = the sum of its parts, in their order. One thread a channel.
template <typename T, typename Sum>
static __device__ __forceinline__ void add_parts(const Sum *sums, T *dbias, unsigned int channels, unsigned int parts) {
    unsigned int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) {
        return;
    }
    Sum sum = 0;
    for (unsigned int part = 0; part < parts; part++) {
        sum += sums[channel * parts + part];
    }
    store(&dbias[channel], sum);
}

#define KERNELS(NAME, T, SUM)                                                                                          \
    extern "C" __global__ void conv2d_bias_activation_##NAME(T *y, const T *bias, unsigned int relu,                   \
                                                             Divisor channels, Divisor pixels,                         \
                                                             unsigned int elements) {                                  \
        bias_activation<T>(y, bias, relu, channels, pixels, elements);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void conv2d_mask_and_sum_##NAME(const T *dy, const T *y, T *masked, SUM *sums,               \
                                                          unsigned int images, unsigned int channels,                  \
                                                          Divisor pixels, unsigned int per_part) {                     \
        mask_and_sum<T, SUM>(dy, y, masked, sums, images, channels, pixels, per_part);                                 \
    }                                                                                                                  \
    extern "C" __global__ void conv2d_add_parts_##NAME(const SUM *sums, T *dbias, unsigned int channels,               \
                                                       unsigned int parts) {                                           \
        add_parts<T, SUM>(sums, dbias, channels, parts);                                                               \
    }

KERNELS(f32, float, float)
KERNELS(f64, double, double)
KERNELS(bf16, bf16, float)
