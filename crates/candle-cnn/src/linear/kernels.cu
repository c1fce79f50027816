// The bias of a fully connected layer.

// y = y + bias, to each row of y, which has as many values.
template <typename T>
static __device__ __forceinline__ void add_to_rows(T *y, const T *bias, const Divisor &outputs, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        unsigned int output = i;
        outputs.divide(output);
        store(&y[i], widen(y[i]) + widen(bias[output]));
    }
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void linear_add_to_rows_##NAME(T *y, const T *bias, Divisor outputs, unsigned int elements) { \
        add_to_rows<T>(y, bias, outputs, elements);                                                                    \
    }

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(bf16, bf16)
