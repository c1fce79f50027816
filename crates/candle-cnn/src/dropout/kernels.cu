// Dropout by the random numbers of `ChaCha8Rng` (seeded by `seed_from_u64`, stream `salt`): element i meets its i-th 32 bits.
// A thread makes a block of 16 of them.

static __device__ __forceinline__ unsigned int rotated(unsigned int value, unsigned int left) {
    return (value << left) | (value >> (32 - left));
}

static __device__ __forceinline__ void quarter_round(unsigned int &a, unsigned int &b, unsigned int &c, unsigned int &d) {
    a += b; d = rotated(d ^ a, 16);
    c += d; b = rotated(b ^ c, 12);
    a += b; d = rotated(d ^ a, 8);
    c += d; b = rotated(b ^ c, 7);
}

// `seed_at` is null, or holds the seed, the lower half first, in the place of `seed`.
template <typename T>
static __device__ __forceinline__ void dropout(const T *x, T *y, const unsigned int *seed_at, unsigned long long seed,
                                               unsigned long long salt, unsigned long long threshold, double scale,
                                               unsigned int elements) {
    unsigned int block = thread_of_grid();
    if (static_cast<unsigned long long>(block) * 16 >= elements) {
        return;
    }
    unsigned long long state = seed;
    if (seed_at) {
        state = seed_at[0] | static_cast<unsigned long long>(seed_at[1]) << 32;
    }
    unsigned int start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    // The key, as rand_core's `seed_from_u64` expands a seed: PCG32.
    for (unsigned int word = 4; word < 12; word++) {
        state = state * 6364136223846793005ull + 11634580027462260723ull;
        unsigned int shifted = static_cast<unsigned int>(((state >> 18) ^ state) >> 27);
        unsigned int right = static_cast<unsigned int>(state >> 59);
        start[word] = (shifted >> right) | (shifted << ((32 - right) & 31));
    }
    start[12] = block;
    start[13] = 0;
    start[14] = static_cast<unsigned int>(salt);
    start[15] = static_cast<unsigned int>(salt >> 32);
    unsigned int s[16];
    for (unsigned int word = 0; word < 16; word++) {
        s[word] = start[word];
    }
    for (unsigned int round = 0; round < 8; round += 2) {
        quarter_round(s[0], s[4], s[8], s[12]);
        quarter_round(s[1], s[5], s[9], s[13]);
        quarter_round(s[2], s[6], s[10], s[14]);
        quarter_round(s[3], s[7], s[11], s[15]);
        quarter_round(s[0], s[5], s[10], s[15]);
        quarter_round(s[1], s[6], s[11], s[12]);
        quarter_round(s[2], s[7], s[8], s[13]);
        quarter_round(s[3], s[4], s[9], s[14]);
    }
    typedef typename Compute<T>::Type Number;
    for (unsigned int word = 0; word < 16; word++) {
        unsigned int i = block * 16 + word;
        if (i < elements) {
            bool dropped = s[word] + start[word] < threshold;
            // Multiplied, so that what is not finite stays seen as NaN.
            Number factor = dropped ? 0 : static_cast<Number>(scale);
            store(&y[i], widen(x[i]) * factor);
        }
    }
}

#define KERNELS(NAME, T)                                                                                               \
    extern "C" __global__ void dropout_##NAME(const T *x, T *y, const unsigned int *seed_at, unsigned long long seed,  \
                                              unsigned long long salt, unsigned long long threshold, double scale,     \
                                              unsigned int elements) {                                                 \
        dropout<T>(x, y, seed_at, seed, salt, threshold, scale, elements);                                             \
    }

KERNELS(f32, float)
KERNELS(f64, double)
KERNELS(bf16, bf16)
