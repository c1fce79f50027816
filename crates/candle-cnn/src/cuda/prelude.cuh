// What every kernel of this crate begins with: NVRTC gets it before the kernel's own file.
//
// bf16 is taken apart by hand, so that no header is needed. A thread counts in 32 bits: no tensor has 2^31 elements.

// Threads of every block.
#define THREADS 256

// Before a loop: so many of its rounds at once.
#ifdef __CUDACC__
#define PRAGMA(TEXT) _Pragma(#TEXT)
#define UNROLL(ROUNDS) PRAGMA(unroll ROUNDS)
#else
#define UNROLL(ROUNDS) static_cast<void>(ROUNDS);
#endif

struct bf16 {
    unsigned short bits;
};

static __device__ __forceinline__ float widen(float value) { return value; }
static __device__ __forceinline__ double widen(double value) { return value; }
static __device__ __forceinline__ float widen(bf16 value) {
    return __uint_as_float(static_cast<unsigned int>(value.bits) << 16);
}

static __device__ __forceinline__ void store(float *to, float value) { *to = value; }
static __device__ __forceinline__ void store(double *to, double value) { *to = value; }
// To the nearest, ties to even. A NaN keeps its sign and is made quiet: rounding could carry it to infinity.
static __device__ __forceinline__ void store(bf16 *to, float value) {
    unsigned int bits = __float_as_uint(value);
    to->bits = static_cast<unsigned short>(value != value ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Stores a value that was a `T` before it was widened, so that nothing is rounded.
static __device__ __forceinline__ void narrow(float *to, float value) { *to = value; }
static __device__ __forceinline__ void narrow(bf16 *to, float value) {
    to->bits = static_cast<unsigned short>(__float_as_uint(value) >> 16);
}

// What numbers of a type are computed in.
template <typename T> struct Compute { typedef float Type; };
template <> struct Compute<double> { typedef double Type; };

// `value` where `by` is not at most 0, else 0: a NaN keeps it.
template <typename T> static __device__ __forceinline__ T keep_positive(T value, T by) { return by <= 0 ? 0 : value; }

// Fused by name, so that it is the same in every kernel.
static __device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
static __device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// A pooling's window along one axis, as `Axis` in window.rs.
struct Axis {
    unsigned int input, output, kernel, stride, padding;

    // Positions start..end of window o that lie inside the input.
    __device__ unsigned int start(unsigned int o) const { return o * stride > padding ? o * stride - padding : 0; }
    __device__ unsigned int end(unsigned int o) const {
        unsigned int end = o * stride + kernel - padding;
        return end < input ? end : input;
    }
    // Windows first..last+1 that see position i.
    __device__ unsigned int first(unsigned int i) const {
        return i + padding < kernel ? 0 : (i + padding - kernel) / stride + 1;
    }
    __device__ unsigned int last(unsigned int i) const {
        unsigned int last = (i + padding) / stride;
        return last < output ? last : output - 1;
    }
};

// A number by which threads divide: n / divisor = (n·multiplier / 2^32 + n) / 2^shift for every n below 2^31.
struct Divisor {
    unsigned int divisor, multiplier, shift;

    // The quotient; `n` becomes the rest.
    __device__ unsigned int divide(unsigned int &n) const {
        unsigned int quotient = (__umulhi(n, multiplier) + n) >> shift;
        n -= quotient * divisor;
        return quotient;
    }
};

// This thread's number in the grid.
static __device__ __forceinline__ unsigned int thread_of_grid() { return blockIdx.x * THREADS + threadIdx.x; }

// The entry of a table that `block` is for, where entry i has the blocks before `end[i]`, and those behind the last have the
// largest number there is; `block` becomes its number there.
template <unsigned int N> static __device__ __forceinline__ unsigned int entry_of(const unsigned int (&end)[N], unsigned int &block) {
    unsigned int first = 0, last = N - 1;
    while (first < last) {
        unsigned int middle = (first + last) / 2;
        if (block < end[middle]) {
            last = middle;
        } else {
            first = middle + 1;
        }
    }
    block -= first ? end[first - 1] : 0;
    return first;
}

// The sum of `value` over the block, in an order that does not change; for every thread.
template <typename T> static __device__ __forceinline__ T block_sum(T value, T *shared) {
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    for (unsigned int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            shared[threadIdx.x] += shared[threadIdx.x + half];
        }
        __syncthreads();
    }
    return shared[0];
}
