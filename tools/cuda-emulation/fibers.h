// A block's threads as fibers of one thread: they change places at barriers only, so that what differs from run to run
// on a GPU does not here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>

#include "emulation.h"

struct Fiber {
    jmp_buf place;
    void *stack = nullptr;
    bool ended = false;
};

struct Fibers {
    static constexpr size_t STACK = 64 << 10;
    static constexpr unsigned int MOST = 1024;
    Fiber all[MOST];
    jmp_buf home;
    const std::function<void()> *run = nullptr;
    unsigned int current = 0;
};
inline Fibers fibers;

// Back to where the fibers take turns. `_setjmp` and `_longjmp` leave the signals alone, which would take two system
// calls a change.
__attribute__((noinline)) inline void leave_fiber() {
    if (_setjmp(fibers.all[fibers.current].place) == 0) {
        _longjmp(fibers.home, 1);
    }
}

inline void __syncthreads() { leave_fiber(); }

// A fiber never returns: it waits for the next block.
inline void live_fiber() {
    for (;;) {
        (*fibers.run)();
        fibers.all[fibers.current].ended = true;
        leave_fiber();
    }
}

__attribute__((noinline)) inline void enter_fiber() {
    Fiber &fiber = fibers.all[fibers.current];
    if (_setjmp(fibers.home) != 0) {
        return;
    }
    if (fiber.stack) {
        _longjmp(fiber.place, 1);
    }
    fiber.stack = std::malloc(Fibers::STACK);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = Fibers::STACK;
    context.uc_link = nullptr;
    makecontext(&context, live_fiber, 0);
    setcontext(&context);
}

// Runs `run` as `count` threads that meet at barriers. A thread that ends while others wait is a fault of the kernel.
inline void run_fibers(unsigned int count, const std::function<void()> &run) {
    fibers.run = &run;
    for (unsigned int t = 0; t < count; t++) {
        fibers.all[t].ended = false;
    }
    for (unsigned int left = count; left > 0;) {
        for (unsigned int t = 0; t < count; t++) {
            if (fibers.all[t].ended) {
                continue;
            }
            fibers.current = t;
            threadIdx = {t, 0, 0};
            enter_fiber();
            left -= fibers.all[t].ended;
        }
        if (left > 0 && left != count) {
            std::fputs("CUDA emulation: threads of a block do not all meet at a barrier\n", stderr);
            std::abort();
        }
    }
}
