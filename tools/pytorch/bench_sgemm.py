"""How fast this machine multiplies matrices: a side of `cargo xtask bench cpu` that stands for the limit.

Speaks the protocol of bench_train_step.py. One "step" is as many operations as a training step of the lesson's net
takes by definition, done as f32 matrix products of 1024 × 1024 by the library PyTorch is built with (MKL on x86).
A share of them is timed, and the time scaled.
"""

import argparse
import json
import sys
import time

import torch

# Multiply-accumulates of one picture (`scratch-train --summary`), two operations each, in three passes.
OPERATIONS_PER_IMAGE = 3 * 2 * 1_447_241_728
SIZE = 1024
PRODUCTS = 24


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    a, b, c = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE), torch.empty(SIZE, SIZE)
    for line in sys.stdin:
        word, steps = line.split()
        if word != "run" or int(steps) < 1:
            sys.exit(f"expected `run <steps>`, got {line!r}")
        products = PRODUCTS * int(steps)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=c)
        rate = 2 * SIZE**3 * products / (time.perf_counter() - start)
        seconds = OPERATIONS_PER_IMAGE * arguments.batch / rate
        answer = {
            "seconds_per_step": seconds,
            "images_per_second": arguments.batch / seconds,
            "peak_mib": None,
            "threads": torch.get_num_threads(),
            "framework": f"PyTorch {torch.__version__.split('+')[0]}, {rate / 1e9:.0f} GFLOP/s at last",
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
