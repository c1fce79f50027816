// What the emulated device and `real_cudnn.cpp` tell each other: calls of cuDNN's graph API, and how they went.
#pragma once

#include <unistd.h>

#include <cstdint>

struct Call {
    enum What : int32_t { CREATE, DESTROY, SET, GET, FINALIZE } what;
    // The kind of descriptor, or the attribute.
    int32_t name;
    int32_t type;
    // How many values follow, or fit.
    int64_t count;
    // A pointer of the other process, as are the values where they are descriptors.
    uint64_t descriptor;
    // Of what follows.
    uint64_t bytes;
};

struct Reply {
    int32_t status;
    int64_t count;
    uint64_t descriptor;
    // Values, or where the status is not 0 what cuDNN says of it.
    uint64_t bytes;
};

inline bool write_all(int to, const void *from, size_t bytes) {
    auto at = static_cast<const char *>(from);
    for (ssize_t done; bytes > 0; at += done, bytes -= static_cast<size_t>(done)) {
        if ((done = write(to, at, bytes)) <= 0) {
            return false;
        }
    }
    return true;
}

inline bool read_all(int from, void *to, size_t bytes) {
    auto at = static_cast<char *>(to);
    for (ssize_t done; bytes > 0; at += done, bytes -= static_cast<size_t>(done)) {
        if ((done = read(from, at, bytes)) <= 0) {
            return false;
        }
    }
    return true;
}
