"""Weights better than random, without labels: torchvision's net learns by how many quarter turns a picture was turned.

    python pretrain_rotation.py --data-dir DIR --out googlenet-rotation.pth [--epochs N] [--minutes M] [--threads N]

Gidaris et al., "Unsupervised Representation Learning by Predicting Image
Rotations" (2018), on CIFAR-10's training pictures, shifted by up to 4 pixels and
mirrored at random. After each epoch writes torchvision's whole state dict (364
tensors) in the legacy format: the auxiliary heads as they were initialised, and
a fresh head of 1000 classes in place of the one that tells turns. A reader never
sees half a file.

Ends after --epochs, or after --minutes if these are over first. The learning
rate falls along a cosine to zero at whichever comes first, so that a run which
is cut by the clock ends as low as one that is not; such a run does not repeat
bit by bit.
"""

import argparse
import math
import os
import time

import torch
import torch.nn.functional as F
import torchvision

import cifar10

SHIFT = 4
EVALUATION_BATCH = 250


def main():
    arguments = parse_arguments()
    start = time.perf_counter()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    net = torchvision.models.googlenet(weights=None, init_weights=True, aux_logits=True, transform_input=True)
    # The auxiliary heads and the head of 1000 classes take no part; they are put aside for the file.
    unused = {name: value.clone() for name, value in net.state_dict().items() if name.startswith("aux")}
    unused |= {f"fc.{name}": value for name, value in torch.nn.Linear(1024, 1000).state_dict().items()}
    net.aux1 = net.aux2 = None
    net.aux_logits = False
    net.fc = torch.nn.Linear(1024, 4)
    net = net.to(memory_format=torch.channels_last)
    pictures, _ = cifar10.load(arguments.data_dir, "train", arguments.train_limit)
    test, _ = cifar10.load(arguments.data_dir, "test", arguments.test_limit)
    optimizer = torch.optim.SGD(net.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(pictures) // arguments.batch
    begin = time.perf_counter()
    step = 0

    def progress():
        """The share of the run that is over, 0 to 1."""
        shares = [step / (arguments.epochs * steps)]
        if arguments.minutes is not None:
            # What comes after the last step, and reading, count as well.
            seconds = 60 * arguments.minutes - (begin - start)
            shares.append((time.perf_counter() - begin) / (0.98 * seconds))
        return min(1.0, max(shares))

    epoch = 0
    while progress() < 1:
        net.train()
        correct = count = 0
        epoch_start = time.perf_counter()
        for chosen in torch.randperm(len(pictures))[: steps * arguments.batch].split(arguments.batch):
            share = progress()
            if share == 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * (1 + math.cos(math.pi * share)) / 2
            images, turns = turned(shifted_and_mirrored(pictures[chosen]))
            optimizer.zero_grad()
            answers = net(prepared(images))
            F.cross_entropy(answers, turns).backward()
            optimizer.step()
            step += 1
            correct += (answers.argmax(1) == turns).sum().item()
            count += len(chosen)
        if count == 0:
            break
        epoch += 1
        speed = count / (time.perf_counter() - epoch_start)
        save(net, unused, arguments.out)
        print(
            f"epoch {epoch}: {100 * correct / count:.1f} % of the turns of {count} training pictures,"
            f" {100 * accuracy(net, test):.1f} % of {4 * len(test)} of test pictures, {speed:.0f} images/s,"
            f" {(time.perf_counter() - start) / 60:.1f} minutes",
            flush=True,
        )


def shifted_and_mirrored(pictures):
    # Mirrored edges: a black one would tell which side was up once.
    padded = F.pad(pictures.float(), (SHIFT,) * 4, mode="reflect")
    side = pictures.shape[-1]
    cut = []
    for picture, (y, x, mirror) in zip(padded, torch.randint(0, 2 * SHIFT + 1, (len(pictures), 3)).tolist()):
        picture = picture[:, y : y + side, x : x + side]
        cut.append(picture.flip(2) if mirror % 2 else picture)
    return torch.stack(cut)


def turned(pictures):
    """Each turned by a number of quarter turns, and these numbers."""
    turns = torch.randint(0, 4, (len(pictures),))
    return torch.stack([picture.rot90(turn, (1, 2)) for picture, turn in zip(pictures, turns.tolist())]), turns


def prepared(pictures):
    return cifar10.normalise(pictures).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(net, pictures):
    """The share of right answers for every picture in all four turns."""
    net.eval()
    correct = 0
    for batch in pictures.split(EVALUATION_BATCH):
        for turn in range(4):
            answers = net(prepared(batch.rot90(turn, (2, 3)))).argmax(1)
            correct += (answers == turn).sum().item()
    return correct / (4 * len(pictures))


def save(net, unused, path):
    own = {name: value.contiguous() for name, value in net.state_dict().items() if not name.startswith("fc.")}
    # In torchvision's order.
    names = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True).state_dict()
    state = {name: (own | unused)[name] for name in names}
    torch.save(state, path + ".part", _use_new_zipfile_serialization=False)
    os.replace(path + ".part", path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that holds plain_text/ with the Hub's parquet files")
    parser.add_argument("--out", required=True, help="the .pth file to write")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--minutes", type=float, help="end after this time, reading included [default: none]")
    parser.add_argument("--train-limit", type=int, help="train on the first N pictures only")
    parser.add_argument("--test-limit", type=int, help="test on the first N pictures only")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
