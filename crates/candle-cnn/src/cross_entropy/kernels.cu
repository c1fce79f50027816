// Cross entropy of (examples, classes); a block a row, computed in double. A label that is no class makes the loss NaN.

// log Σ exp(row), shifted by the maximum so that nothing overflows; for every thread.
template <typename T>
static __device__ __forceinline__ double log_sum_exp(const T *row, unsigned int classes, double *shared) {
    double max = -1.0 / 0.0;
    for (unsigned int c = threadIdx.x; c < classes; c += THREADS) {
        max = fmax(max, static_cast<double>(widen(row[c])));
    }
    __syncthreads();
    shared[threadIdx.x] = max;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            shared[threadIdx.x] = fmax(shared[threadIdx.x], shared[threadIdx.x + half]);
        }
        __syncthreads();
    }
    max = shared[0];
    bool infinite = max - max != 0;
    double sum = 0;
    for (unsigned int c = threadIdx.x; c < classes; c += THREADS) {
        double logit = widen(row[c]);
        // All −∞, or a +∞, of which a NaN is made below: the shift would be ∞ − ∞. A NaN still shows.
        sum += infinite ? (logit != logit ? logit : 0) : exp(logit - max);
    }
    sum = block_sum<double>(sum, shared);
    return infinite ? (max > 0 ? max - max : max + sum) : max + log(sum);
}

static __device__ __forceinline__ double target(unsigned int c, unsigned int label, unsigned int classes, double smoothing) {
    return (c == label ? 1 - smoothing : 0) + smoothing / classes;
}

template <typename T>
static __device__ __forceinline__ void row_loss(const T *logits, const unsigned int *labels, double *losses,
                                                unsigned int classes, double smoothing) {
    __shared__ double shared[THREADS];
    const T *row = logits + static_cast<unsigned long long>(blockIdx.x) * classes;
    unsigned int label = labels[blockIdx.x];
    double log_sum = log_sum_exp<T>(row, classes, shared);
    double loss = 0;
    for (unsigned int c = threadIdx.x; c < classes; c += THREADS) {
        double share = target(c, label, classes, smoothing);
        // 0 · ∞ would make a NaN of a class that has no share.
        if (share != 0) {
            loss += share * (log_sum - widen(row[c]));
        }
    }
    loss = block_sum<double>(loss, shared);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = label < classes ? loss : 0.0 / 0.0;
    }
}

// loss = the mean of the rows' losses. One block.
template <typename S>
static __device__ __forceinline__ void mean(const double *losses, S *loss, unsigned int examples) {
    __shared__ double shared[THREADS];
    double sum = 0;
    for (unsigned int row = threadIdx.x; row < examples; row += THREADS) {
        sum += losses[row];
    }
    sum = block_sum<double>(sum, shared);
    if (threadIdx.x == 0) {
        *loss = static_cast<S>(sum / examples);
    }
}

template <typename T, typename S>
static __device__ __forceinline__ void gradient(const T *logits, const unsigned int *labels, const S *upstream, T *dlogits,
                                                unsigned int examples, unsigned int classes, double smoothing) {
    __shared__ double shared[THREADS];
    unsigned long long start = static_cast<unsigned long long>(blockIdx.x) * classes;
    unsigned int label = labels[blockIdx.x];
    double log_sum = log_sum_exp<T>(logits + start, classes, shared);
    double scale = label < classes ? static_cast<double>(*upstream) / examples : 0.0 / 0.0;
    for (unsigned int c = threadIdx.x; c < classes; c += THREADS) {
        double probability = exp(widen(logits[start + c]) - log_sum);
        store(&dlogits[start + c], static_cast<S>(scale * (probability - target(c, label, classes, smoothing))));
    }
}

#define KERNELS(NAME, T, S)                                                                                            \
    extern "C" __global__ void cross_entropy_rows_##NAME(const T *logits, const unsigned int *labels, double *losses,  \
                                                         unsigned int classes, double smoothing) {                     \
        row_loss<T>(logits, labels, losses, classes, smoothing);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void cross_entropy_mean_##NAME(const double *losses, S *loss, unsigned int examples) {       \
        mean<S>(losses, loss, examples);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void cross_entropy_gradient_##NAME(const T *logits, const unsigned int *labels,              \
                                                             const S *upstream, T *dlogits, unsigned int examples,     \
                                                             unsigned int classes, double smoothing) {                 \
        gradient<T, S>(logits, labels, upstream, dlogits, examples, classes, smoothing);                               \
    }

KERNELS(f32, float, float)
KERNELS(f64, double, double)
KERNELS(bf16, bf16, float)
