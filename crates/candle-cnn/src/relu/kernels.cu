// out = value where `by` is not at most 0, else 0. Forward: both x. Backward: value dy, by y.

template <typename T>
static __device__ __forceinline__ void relu(const T *value, const T *by, T *out, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        store(&out[i], keep_positive(widen(value[i]), widen(by[i])));
    }
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void relu_##NAME(const T *value, const T *by, T *out, unsigned int elements) {               \
        relu<T>(value, by, out, elements);                                                                             \
    }

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(bf16, bf16)
