// Maximum pooling over planes, a thread an element; `line` and `plane_of` divide by the pixels of a line and a plane.

// Index in the plane of the window's first maximum in row-major order, or of its last NaN.
template <typename T>
static __device__ __forceinline__ unsigned int winner(const T *plane, Axis h, Axis w, unsigned int oh, unsigned int ow) {
    unsigned int best_at = h.start(oh) * w.input + w.start(ow);
    auto best = widen(plane[best_at]);
    for (unsigned int ih = h.start(oh); ih < h.end(oh); ih++) {
        for (unsigned int iw = w.start(ow); iw < w.end(ow); iw++) {
            auto value = widen(plane[ih * w.input + iw]);
            if (value > best || value != value) {
                best = value;
                best_at = ih * w.input + iw;
            }
        }
    }
    return best_at;
}

template <typename T>
static __device__ __forceinline__ void forward(const T *x, T *y, Axis h, Axis w, const Divisor &line, const Divisor &plane_of,
                                               unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        unsigned int ow = i;
        const T *plane = x + plane_of.divide(ow) * (h.input * w.input);
        unsigned int oh = line.divide(ow);
        y[i] = plane[winner<T>(plane, h, w, oh, ow)];
    }
}

// winners[window] = where in its plane the window's maximum is.
template <typename T>
static __device__ __forceinline__ void find_winners(const T *x, unsigned int *winners, Axis h, Axis w, const Divisor &line,
                                                    const Divisor &plane_of, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        unsigned int ow = i;
        const T *plane = x + plane_of.divide(ow) * (h.input * w.input);
        unsigned int oh = line.divide(ow);
        winners[i] = winner<T>(plane, h, w, oh, ow);
    }
}

// dx of a pixel = the sum of dy over the windows that it won, in their order.
template <typename T>
static __device__ __forceinline__ void backward(const unsigned int *winners, const T *dy, T *dx, Axis h, Axis w,
                                                const Divisor &line, const Divisor &plane_of, unsigned int elements) {
    unsigned int i = thread_of_grid();
    if (i >= elements) {
        return;
    }
    unsigned int pixel = i, plane = plane_of.divide(pixel) * (h.output * w.output);
    unsigned int iw = pixel, ih = line.divide(iw);
    typename Compute<T>::Type sum = 0;
    for (unsigned int oh = h.first(ih); oh <= h.last(ih); oh++) {
        for (unsigned int ow = w.first(iw); ow <= w.last(iw); ow++) {
            unsigned int window = plane + oh * w.output + ow;
            if (winners[window] == pixel) {
                sum += widen(dy[window]);
            }
        }
    }
    store(&dx[i], sum);
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void max_pool2d_forward_##NAME(const T *x, T *y, Axis h, Axis w, Divisor line,               \
                                                         Divisor plane, unsigned int elements) {                       \
        forward<T>(x, y, h, w, line, plane, elements);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void max_pool2d_winners_##NAME(const T *x, unsigned int *winners, Axis h, Axis w,            \
                                                         Divisor line, Divisor plane, unsigned int elements) {         \
        find_winners<T>(x, winners, h, w, line, plane, elements);                                                      \
    }                                                                                                                  \
    extern "C" __global__ void max_pool2d_backward_##NAME(const unsigned int *winners, const T *dy, T *dx, Axis h,     \
                                                          Axis w, Divisor line, Divisor plane,                         \
                                                          unsigned int elements) {                                     \
        backward<T>(winners, dy, dx, h, w, line, plane, elements);                                                     \
    }

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(bf16, bf16)
