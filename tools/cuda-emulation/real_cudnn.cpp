// Makes the calls of an emulated device to the real cuDNN, whose path is the argument. It is a process of its own, since
// the emulated device has functions of the same names.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "real_cudnn.h"

namespace {

void *library;

template <typename F> void find(const char *name, F &function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) {
        std::fprintf(stderr, "real_cudnn: there is no %s\n", name);
        _exit(1);
    }
}

} // namespace

int main(int count, char **arguments) {
    library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
    if (!library) {
        std::fprintf(stderr, "real_cudnn: %s\n", count == 2 ? dlerror() : "the argument is cuDNN's path");
        return 1;
    }
    int (*create)(int, void **);
    int (*destroy)(void *);
    int (*set)(void *, int, int, int64_t, const void *);
    int (*get)(void *, int, int, int64_t, int64_t *, void *);
    int (*finalize)(void *);
    void (*last_error)(char *, size_t);
    find("cudnnBackendCreateDescriptor", create);
    find("cudnnBackendDestroyDescriptor", destroy);
    find("cudnnBackendSetAttribute", set);
    find("cudnnBackendGetAttribute", get);
    find("cudnnBackendFinalize", finalize);
    find("cudnnGetLastErrorString", last_error);
    Call call;
    std::vector<char> values;
    while (read_all(0, &call, sizeof call)) {
        values.resize(call.bytes);
        if (!read_all(0, values.data(), values.size())) {
            return 1;
        }
        auto descriptor = reinterpret_cast<void *>(call.descriptor);
        Reply reply = {};
        switch (call.what) {
        case Call::CREATE:
            reply.status = create(call.name, &descriptor);
            reply.descriptor = reinterpret_cast<uint64_t>(descriptor);
            break;
        case Call::DESTROY:
            reply.status = destroy(descriptor);
            break;
        case Call::SET:
            reply.status = set(descriptor, call.name, call.type, call.count, values.data());
            break;
        case Call::GET:
            // Only without an address it tells how many there are.
            reply.status = get(descriptor, call.name, call.type, call.count, &reply.count, call.count ? values.data() : nullptr);
            break;
        case Call::FINALIZE:
            reply.status = finalize(descriptor);
            break;
        }
        if (reply.status) {
            values.assign(1024, 0);
            last_error(values.data(), values.size() - 1);
            values.resize(std::strlen(values.data()));
        } else if (call.what != Call::GET) {
            values.clear();
        }
        reply.bytes = values.size();
        if (!write_all(1, &reply, sizeof reply) || !write_all(1, values.data(), values.size())) {
            return 1;
        }
    }
    return 0;
}
