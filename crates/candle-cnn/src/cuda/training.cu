// What a training step does besides its network: the batch, the right answers, the update.

// out[n][c][pixel] = (images[indices[n]][c][pixel] / 255 − mean[c]) / std[c]; of an index beyond the images NaN.
template <typename T>
static __device__ __forceinline__ void gather(const unsigned char *images, const unsigned int *indices, T *out,
                                              unsigned int total, unsigned int pixels, float mean0, float mean1, float mean2,
                                              float std0, float std1, float std2, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    unsigned int within = i % (3 * pixels), channel = within / pixels;
    unsigned int image = indices[i / (3 * pixels)];
    float mean = channel == 0 ? mean0 : channel == 1 ? mean1 : mean2;
    float std = channel == 0 ? std0 : channel == 1 ? std1 : std2;
    float value = __uint_as_float(0x7fc00000);
    if (image < total) {
        value = images[static_cast<unsigned long long>(image) * (3 * pixels) + within];
    }
    store(&out[i], static_cast<typename Compute<T>::Type>((value / 255.0f - mean) / std));
}

// correct = rows whose first largest value stands at the label. One block.
template <typename T>
static __device__ __forceinline__ void count_correct(const T *logits, const unsigned int *labels, float *correct,
                                                     unsigned int rows, unsigned int classes) {
    __shared__ unsigned int shared[THREADS];
    unsigned int count = 0;
    for (unsigned int n = threadIdx.x; n < rows; n += THREADS) {
        const T *row = logits + static_cast<unsigned long long>(n) * classes;
        unsigned int best = 0;
        for (unsigned int c = 1; c < classes; c++) {
            if (widen(row[c]) > widen(row[best])) {
                best = c;
            }
        }
        count += best == labels[n];
    }
    count = block_sum<unsigned int>(count, shared);
    if (threadIdx.x == 0) {
        *correct = static_cast<float>(count);
    }
}

// As many parameters as fit into a kernel's 4 KiB of arguments.
#define TENSORS 96

// `Chunk` in training.rs.
template <typename T> struct Chunk {
    T *parameter[TENSORS];
    const T *gradient[TENSORS];
    T *buffer[TENSORS]; // null without momentum
    unsigned int elements[TENSORS];
    unsigned int end[TENSORS]; // of its blocks
    unsigned char first[TENSORS];
};

// Elements of a block.
#define PER_BLOCK (4 * THREADS)

template <typename T>
static __device__ __forceinline__ void sgd(const Chunk<T> &chunk, const float *lr, double momentum_, double dampening_,
                                           double weight_decay_, unsigned int nesterov) {
    unsigned int block = blockIdx.x, tensor = entry_of(chunk.end, block), begin = block * PER_BLOCK;
    unsigned int elements = chunk.elements[tensor];
    T *parameter = chunk.parameter[tensor], *buffer = chunk.buffer[tensor];
    const T *gradient = chunk.gradient[tensor];
    T rate = *lr, momentum = static_cast<T>(momentum_), weight_decay = static_cast<T>(weight_decay_);
    T gain = static_cast<T>(1 - dampening_);
    for (unsigned int i = begin + threadIdx.x; i < begin + PER_BLOCK && i < elements; i += THREADS) {
        T p = parameter[i], d = gradient[i] + weight_decay * p;
        if (buffer) {
            T b = chunk.first[tensor] ? d : momentum * buffer[i] + gain * d;
            buffer[i] = b;
            d = nesterov ? d + momentum * b : b;
        }
        parameter[i] = p - rate * d;
    }
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void gather_normalized_##NAME(                                                               \
        const unsigned char *images, const unsigned int *indices, T *out, unsigned int total, unsigned int pixels,     \
        float mean0, float mean1, float mean2, float std0, float std1, float std2, unsigned int elements) {            \
        gather<T>(images, indices, out, total, pixels, mean0, mean1, mean2, std0, std1, std2, elements);               \
    }                                                                                                                  \
    extern "C" __global__ void count_correct_##NAME(const T *logits, const unsigned int *labels, float *correct,       \
                                                    unsigned int rows, unsigned int classes) {                         \
        count_correct<T>(logits, labels, correct, rows, classes);                                                      \
    }

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(bf16, bf16)

#define SGD(NAME, T)                                                                                                   \
    extern "C" __global__ void sgd_##NAME(Chunk<T> chunk, const float *lr, double momentum, double dampening,          \
                                          double weight_decay, unsigned int nesterov) {                                \
        sgd<T>(chunk, lr, momentum, dampening, weight_decay, nesterov);                                                \
    }

SGD(f32, float)
SGD(f64, double)

// As many batch norms as fit likewise.
#define NORMS 64

// The statistics of some batch norms, running and of a batch; `end` as above.
template <typename T> struct Norms {
    T *mean[NORMS], *variance[NORMS];
    long long *batches[NORMS];
    const T *batch_mean[NORMS], *batch_variance[NORMS];
    unsigned int channels[NORMS], end[NORMS];
};

// running = (1 − momentum) running + momentum batch, rounded after each product as on the CPU, of each batch norm's mean and
// variance; one more batch is counted. A thread a channel.
template <typename T> static __device__ __forceinline__ void take_up(const Norms<T> &all, double momentum_) {
    unsigned int block = blockIdx.x, n = entry_of(all.end, block), channel = block * THREADS + threadIdx.x;
    T keep = static_cast<T>(1 - momentum_), momentum = static_cast<T>(momentum_);
    if (channel < all.channels[n]) {
        // Fused with a zero, so that the compiler fuses no product with the sum.
        T taken = multiply_add(all.batch_mean[n][channel], momentum, static_cast<T>(0));
        T kept = multiply_add(all.mean[n][channel], keep, static_cast<T>(0));
        all.mean[n][channel] = kept + taken;
        taken = multiply_add(all.batch_variance[n][channel], momentum, static_cast<T>(0));
        kept = multiply_add(all.variance[n][channel], keep, static_cast<T>(0));
        all.variance[n][channel] = kept + taken;
    }
    if (channel == 0) {
        *all.batches[n] += 1;
    }
}

extern "C" __global__ void take_up_f32(Norms<float> all, double momentum) { take_up<float>(all, momentum); }
extern "C" __global__ void take_up_f64(Norms<double> all, double momentum) { take_up<double>(all, momentum); }
