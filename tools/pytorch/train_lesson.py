"""The lesson's first experiment in PyTorch, beside `scratch-train`: from nothing, on the Hub's parquet files.

    python train_lesson.py --data-dir DIR [--device cuda] [--compile] [--seed N ...] [--epochs N] [--train-limit N]
        [--test-limit N]

Prints a line of JSON for each seed: test accuracy in percent, loss, images a second in training. The same recipe: the
lesson's initialisation, pictures at mean and standard deviation 0.5, batches of 32, SGD 1e-4 with momentum 0.9, 7 epochs,
the last, smaller batch of an epoch included. Pictures stay on the device as bytes. Their order, the first weights and the
masks of the dropout are PyTorch's own.

`--compile` is torch.compile with CUDA graphs (mode="reduce-overhead"), once for all seeds: on a GPU it computes the same
three times as fast. The time that it takes to compile counts for the first seed.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F

import cifar10
from lesson_googlenet import LessonGoogLeNet

BATCH = 32


def main():
    arguments = parse_arguments()
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    train, train_labels = (t.to(device) for t in cifar10.load(arguments.data_dir, "train", arguments.train_limit))
    test, test_labels = (t.to(device) for t in cifar10.load(arguments.data_dir, "test", arguments.test_limit))
    net = LessonGoogLeNet().to(device, memory_format=torch.channels_last)

    def loss_of(pictures, labels):
        return F.cross_entropy(net(pictures), labels)

    loss_of_whole_batch = torch.compile(loss_of, mode="reduce-overhead") if arguments.compile else loss_of
    for seed in arguments.seed:
        torch.manual_seed(seed)
        # Into the same memory: what was compiled knows its addresses.
        net.load_state_dict(LessonGoogLeNet().state_dict())
        fused = True if arguments.compile else None
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, fused=fused)
        seconds = 0.0
        for epoch in range(arguments.epochs):
            net.train()
            start = time.perf_counter()
            for chosen in torch.randperm(len(train), device=device).split(BATCH):
                optimizer.zero_grad()
                # Not compiled again for the last batch of an epoch, which may be smaller.
                compute = loss_of_whole_batch if len(chosen) == BATCH else loss_of
                compute(images(train[chosen]), train_labels[chosen]).backward()
                optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            accuracy, loss = evaluate(net, test, test_labels)
            epochs = f"seed {seed}, epoch {epoch + 1}"
            print(f"{epochs}: test accuracy {accuracy:.2f} %, loss {loss:.4f}", file=sys.stderr, flush=True)
        answer = {
            "seed": seed,
            "accuracy": accuracy,
            "loss": loss,
            "images_per_second": arguments.epochs * len(train) / seconds,
            "framework": "PyTorch " + torch.__version__.split("+")[0],
        }
        print(json.dumps(answer), flush=True)


@torch.no_grad()
def evaluate(net, pictures, labels):
    net.eval()
    right, loss = 0, 0.0
    for chosen in torch.arange(len(pictures), device=pictures.device).split(250):
        logits = net(images(pictures[chosen]))
        loss += F.cross_entropy(logits, labels[chosen], reduction="sum").item()
        right += (logits.argmax(1) == labels[chosen]).sum().item()
    return 100 * right / len(pictures), loss / len(pictures)


def images(pictures):
    return cifar10.normalise(pictures).contiguous(memory_format=torch.channels_last)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help='torch.compile(mode="reduce-overhead")')
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--test-limit", type=int)
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs: at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this PyTorch finds no GPU")
    return arguments


if __name__ == "__main__":
    main()
