// Means over a grid of bins, which may overlap; a thread an element.

// Bins along one axis, as `Rule` in mod.rs.
struct Bins {
    unsigned int input, output, adaptive, kernel, stride, padding, count_include_pad;

    __device__ unsigned int start(unsigned int o) const {
        if (adaptive) {
            return static_cast<unsigned int>(static_cast<unsigned long long>(o) * input / output);
        }
        return o * stride > padding ? o * stride - padding : 0;
    }
    __device__ unsigned int end(unsigned int o) const {
        if (adaptive) {
            return static_cast<unsigned int>((static_cast<unsigned long long>(o + 1) * input + output - 1) / output);
        }
        unsigned int end = o * stride + kernel > padding ? o * stride + kernel - padding : 0;
        return end < input ? end : input;
    }
    // The bin's share of the divisor.
    __device__ unsigned int count(unsigned int o) const {
        if (adaptive || !count_include_pad) {
            return end(o) - start(o);
        }
        unsigned int border = input + 2 * padding - o * stride;
        return kernel < border ? kernel : border;
    }
    // Bins first..last+1 that hold position i.
    __device__ unsigned int first(unsigned int i) const {
        if (adaptive) {
            return static_cast<unsigned int>(static_cast<unsigned long long>(i) * output / input);
        }
        return i + padding < kernel ? 0 : (i + padding - kernel) / stride + 1;
    }
    __device__ unsigned int last(unsigned int i) const {
        if (adaptive) {
            return static_cast<unsigned int>((static_cast<unsigned long long>(i + 1) * output - 1) / input);
        }
        unsigned int last = (i + padding) / stride;
        return last < output ? last : output - 1;
    }
};

template <typename T>
static __device__ __forceinline__ void forward(const T *x, T *y, Bins h, Bins w, unsigned int elements) {
    typedef typename Compute<T>::Type Sum;
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    const T *plane = x + i / (h.output * w.output) * (h.input * w.input);
    unsigned int oh = i / w.output % h.output, ow = i % w.output;
    Sum sum = 0;
    for (unsigned int ih = h.start(oh); ih < h.end(oh); ih++) {
        Sum row = 0;
        for (unsigned int iw = w.start(ow); iw < w.end(ow); iw++) {
            row += widen(plane[ih * w.input + iw]);
        }
        sum += row;
    }
    store(&y[i], sum / static_cast<Sum>(h.count(oh) * w.count(ow)));
}

template <typename T>
static __device__ __forceinline__ void backward(const T *dy, T *dx, Bins h, Bins w, unsigned int elements) {
    typedef typename Compute<T>::Type Sum;
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    unsigned int input_plane = h.input * w.input;
    const T *plane = dy + i / input_plane * (h.output * w.output);
    unsigned int ih = i % input_plane / w.input, iw = i % w.input;
    Sum sum = 0;
    for (unsigned int oh = h.first(ih); oh <= h.last(ih); oh++) {
        for (unsigned int ow = w.first(iw); ow <= w.last(iw); ow++) {
            sum += widen(plane[oh * w.output + ow]) / static_cast<Sum>(h.count(oh) * w.count(ow));
        }
    }
    store(&dx[i], sum);
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void avg_pool2d_forward_##NAME(const T *x, T *y, Bins h, Bins w, unsigned int elements) {    \
        forward<T>(x, y, h, w, elements);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void avg_pool2d_backward_##NAME(const T *dy, T *dx, Bins h, Bins w, unsigned int elements) { \
        backward<T>(dy, dx, h, w, elements);                                                                           \
    }

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(bf16, bf16)
