"""The lesson's first experiment in PyTorch, beside `scratch-train`: from nothing, on the Hub's parquet files.

    python train_lesson.py --data-dir DIR [--device cuda] [--compile] [--seed N ...] [--epochs N] [--train-limit N]
        [--test-limit N] [--max-steps N]

Prints a line of JSON for each seed: test accuracy in percent, loss, images a second in training; or the step at which the loss
was not finite any more. The same recipe: the lesson's initialisation, pictures at mean and standard deviation 0.5, batches of
32, SGD 1e-4 with momentum 0.9, 7 epochs, the last, smaller batch of an epoch included. Pictures stay on the device as bytes.
Their order, the first weights and the masks of the dropout are PyTorch's own.

`--max-steps` ends each seed after so many steps, and prints their losses instead.

`--compile` is torch.compile with CUDA graphs (mode="reduce-overhead"), once for all seeds: on a GPU it computes the same
three times as fast. The time that it takes to compile counts for the first seed.
"""

import argparse
import json
import math
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
        seconds, accuracy, losses = 0.0, None, Losses(device)
        for epoch in range(arguments.epochs):
            net.train()
            start = time.perf_counter()
            for chosen in torch.randperm(len(train), device=device).split(BATCH):
                optimizer.zero_grad()
                # Not compiled again for the last batch of an epoch, which may be smaller.
                compute = loss_of_whole_batch if len(chosen) == BATCH else loss_of
                loss = compute(images(train[chosen]), train_labels[chosen])
                loss.backward()
                optimizer.step()
                losses.add(loss)
                if losses.diverged or losses.count == arguments.max_steps:
                    break
            losses.look()
            seconds += time.perf_counter() - start
            if losses.diverged or losses.count == arguments.max_steps:
                break
            accuracy, loss = evaluate(net, test, test_labels)
            if not math.isfinite(loss):
                losses.diverged = losses.count
                break
            epochs = f"seed {seed}, epoch {epoch + 1}"
            print(f"{epochs}: test accuracy {accuracy:.2f} %, loss {loss:.4f}", file=sys.stderr, flush=True)
        if losses.diverged:
            print(f"seed {seed} diverged at step {losses.diverged}", file=sys.stderr, flush=True)
        answer = {"seed": seed, "diverged": losses.diverged}
        if arguments.max_steps is not None:
            answer["losses"] = losses.known
        elif not losses.diverged:
            answer |= {"accuracy": accuracy, "loss": loss, "images_per_second": arguments.epochs * len(train) / seconds}
        print(json.dumps(answer | {"framework": "PyTorch " + torch.__version__.split("+")[0]}), flush=True)


class Losses:
    """The finite losses of a run's first steps, which stay on the device until they are looked at, every 64 steps."""

    def __init__(self, device):
        self.waiting = torch.empty(64, device=device)
        self.count = 0
        self.known = []
        # The first step, from 1 on, whose loss is not finite.
        self.diverged = None

    def add(self, loss):
        self.waiting[self.count - len(self.known)] = loss.detach()
        self.count += 1
        # A CPU has it at hand.
        if self.count - len(self.known) == len(self.waiting) or loss.device.type == "cpu":
            self.look()

    def look(self):
        if self.diverged:
            return
        for loss in self.waiting[: self.count - len(self.known)].tolist():
            if not math.isfinite(loss):
                self.diverged = len(self.known) + 1
                break
            self.known.append(loss)


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
    parser.add_argument("--max-steps", type=int)
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs: at least 1")
    if arguments.max_steps is not None and arguments.max_steps < 1:
        parser.error("--max-steps: at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this PyTorch finds no GPU")
    return arguments


if __name__ == "__main__":
    main()
