// An engine's results beside sums in f64, at some places: exactness.rs says what for.
//
// Tensors are f32, of fewer than 2^31 elements, without gaps.

// Mixes the bits of a number: Chris Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/).
static __device__ unsigned int mix(unsigned int n) {
    n = (n ^ n >> 16) * 0x7feb352d;
    n = (n ^ n >> 15) * 0x846ca68b;
    return n ^ n >> 16;
}

// Numbers between -1 and 1, which need all 24 bits of f32's mantissa.
extern "C" __global__ void conv2d_draw_f32(float *x, unsigned int elements, unsigned int seed) {
    unsigned int i = thread_of_grid();
    if (i < elements) {
        x[i] = static_cast<float>(static_cast<int>(mix(i ^ mix(seed)))) / 2147483648.0f;
    }
}

// `Geometry` of exactness.rs; pairs are vertical, horizontal.
struct Geometry {
    unsigned int batch, c_in, input[2], c_out, kernel[2], output[2], stride[2], padding[2], dilation[2], channels_last;

    // Where an element lies in a tensor of so many channels and of these lines and columns.
    __device__ unsigned int place(unsigned int image, unsigned int channel, const unsigned int (&at)[2], unsigned int channels,
                                  const unsigned int (&sizes)[2]) const {
        return channels_last ? ((image * sizes[0] + at[0]) * sizes[1] + at[1]) * channels + channel
                             : ((image * channels + channel) * sizes[0] + at[0]) * sizes[1] + at[1];
    }

    // The input's pixel that a tap of the kernel sees from the output's; false in the padding.
    __device__ bool seen(const unsigned int (&out)[2], const unsigned int (&tap)[2], unsigned int (&in)[2]) const {
        bool inside = true;
        for (int d = 0; d < 2; d++) {
            // Left of the input it wraps around, to more than there is.
            in[d] = out[d] * stride[d] + tap[d] * dilation[d] - padding[d];
            inside = inside && in[d] < input[d];
        }
        return inside;
    }

    // The output's pixel from which a tap sees the input's; false if none does.
    __device__ bool seeing(const unsigned int (&in)[2], const unsigned int (&tap)[2], unsigned int (&out)[2]) const {
        bool one = true;
        for (int d = 0; d < 2; d++) {
            unsigned int from = in[d] + padding[d], to = tap[d] * dilation[d];
            out[d] = (from - to) / stride[d];
            one = one && from >= to && (from - to) % stride[d] == 0 && out[d] < output[d];
        }
        return one;
    }
};

// A number taken apart into two that it was put together from and a pair, by their sizes; the first has the rest.
static __device__ void take_apart(unsigned int number, unsigned int size, const unsigned int (&sizes)[2], unsigned int &first,
                                  unsigned int &second, unsigned int (&pair)[2]) {
    pair[1] = number % sizes[1];
    number /= sizes[1];
    pair[0] = number % sizes[0];
    number /= sizes[0];
    second = number % size;
    first = number / size;
}

enum { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT };

// What is known of an element: the sum of its products, and that of their squares.
struct Sums {
    double products, squares;
    __device__ Sums &operator+=(const Sums &other) {
        products += other.products;
        squares += other.squares;
        return *this;
    }
};

// How often a block looks for an element in which there is something to round.
#define TRIES 64

// The square of how far one element of a pass's result is off, and the sum of the squares of the products in it. Each block looks for
// an element with a product: of most strided gradients few elements have any product, and behind a ReLU half of them are 0. `bias` is
// null where there is none.
extern "C" __global__ void conv2d_deviations_f32(Geometry g, const float *x, const float *weight, const float *y, const float *bias,
                                                 unsigned int pass, unsigned int relu, double *deviations) {
    __shared__ Sums shared[THREADS];
    unsigned int image = 0, in_channel = 0, out_channel = 0, in[2] = {}, tap[2] = {}, out[2] = {};
    unsigned int elements, terms;
    if (pass == FORWARD) {
        elements = g.batch * g.c_out * g.output[0] * g.output[1];
        terms = g.c_in * g.kernel[0] * g.kernel[1];
    } else if (pass == INPUT_GRADIENT) {
        elements = g.batch * g.c_in * g.input[0] * g.input[1];
        terms = g.c_out * g.kernel[0] * g.kernel[1];
    } else {
        elements = g.c_out * g.c_in * g.kernel[0] * g.kernel[1];
        terms = g.batch * g.output[0] * g.output[1];
    }
    Sums sums = {0, 0};
    for (unsigned int i = 0; i < TRIES && sums.squares == 0; i++) {
        unsigned int element = mix(blockIdx.x + 1 + i * gridDim.x) % elements;
        if (pass == FORWARD) {
            take_apart(element, g.c_out, g.output, image, out_channel, out);
        } else if (pass == INPUT_GRADIENT) {
            take_apart(element, g.c_in, g.input, image, in_channel, in);
        } else {
            take_apart(element, g.c_in, g.kernel, out_channel, in_channel, tap);
        }
        sums = {0, 0};
        for (unsigned int term = threadIdx.x; term < terms; term += THREADS) {
            unsigned int none;
            bool meet;
            if (pass == FORWARD) {
                take_apart(term, g.c_in, g.kernel, none, in_channel, tap);
                meet = g.seen(out, tap, in);
            } else if (pass == INPUT_GRADIENT) {
                take_apart(term, g.c_out, g.kernel, none, out_channel, tap);
                meet = g.seeing(in, tap, out);
            } else {
                take_apart(term, 1, g.output, image, none, out);
                meet = g.seen(out, tap, in);
            }
            if (meet) {
                double a = pass == INPUT_GRADIENT ? y[g.place(image, out_channel, out, g.c_out, g.output)]
                                                  : x[g.place(image, in_channel, in, g.c_in, g.input)];
                double b = pass == WEIGHT_GRADIENT ? y[g.place(image, out_channel, out, g.c_out, g.output)]
                                                   : weight[g.place(out_channel, in_channel, tap, g.c_in, g.kernel)];
                sums += {a * b, a * b * (a * b)};
            }
        }
        sums = block_sum(sums, shared);
        if (bias) {
            sums.products += bias[out_channel];
        }
        if (relu && sums.products <= 0) {
            sums = {0, 0};
        }
    }
    if (threadIdx.x != 0) {
        return;
    }
    double found = pass == FORWARD          ? y[g.place(image, out_channel, out, g.c_out, g.output)]
                   : pass == INPUT_GRADIENT ? x[g.place(image, in_channel, in, g.c_in, g.input)]
                                            : weight[g.place(out_channel, in_channel, tap, g.c_in, g.kernel)];
    double error = found - sums.products;
    deviations[2 * blockIdx.x] = error * error;
    deviations[2 * blockIdx.x + 1] = sums.squares;
}
