// The part of CUDA C++ that the kernels use, for one block at a time on the CPU.
#pragma once

#include <cmath>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so that what it shares can be the process's.
#define __shared__ static

struct Index {
    unsigned int x, y, z;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

// Defined where blocks are run.
inline void __syncthreads();

inline float __uint_as_float(unsigned int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
// The upper half of a product.
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
    return static_cast<unsigned int>(static_cast<unsigned long long>(a) * b >> 32);
}
using std::exp, std::fma, std::fmax, std::log, std::sqrt;
