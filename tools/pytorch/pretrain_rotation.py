"""Weights better than random, without labels: torchvision's net learns by how many quarter turns a picture was turned.

    python pretrain_rotation.py --data-dir DIR --out googlenet-rotation.pth [--epochs N] [--threads N]

Gidaris et al., "Unsupervised Representation Learning by Predicting Image
Rotations" (2018), on CIFAR-10's training pictures. Writes torchvision's whole
state dict (364 tensors) in the legacy format: the auxiliary heads as they were
initialised, and a fresh head of 1000 classes.
"""

import argparse
import os
import time

import torch
import torchvision

import cifar10

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--limit", type=int)
parser.add_argument("--threads", type=int, default=2)
arguments = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(arguments.threads)
net = torchvision.models.googlenet(weights=None, init_weights=True, aux_logits=True, transform_input=True)
net.fc = torch.nn.Linear(1024, 4)
net = net.to(memory_format=torch.channels_last)
pictures, _ = cifar10.load(arguments.data_dir, "train", arguments.limit)
batch = 64
steps = arguments.epochs * (len(pictures) // batch)
optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
net.train()
# Auxiliary heads take no part.
net.aux1, net.aux2, aux = None, None, (net.aux1, net.aux2)
net.aux_logits = False
for epoch in range(arguments.epochs):
    correct = count = 0
    start = time.perf_counter()
    for chosen in torch.randperm(len(pictures)).split(batch):
        if len(chosen) < batch:
            break
        images = cifar10.normalise(pictures[chosen])
        turns = torch.randint(0, 4, (batch,))
        images = torch.stack([torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(images, turns)])
        optimizer.zero_grad()
        answers = net(images.contiguous(memory_format=torch.channels_last))
        torch.nn.functional.cross_entropy(answers, turns).backward()
        optimizer.step()
        schedule.step()
        correct += (answers.argmax(1) == turns).sum().item()
        count += batch
    print(f"epoch {epoch + 1}: {100 * correct / count:.1f} % of turns, {count / (time.perf_counter() - start):.0f} images/s", flush=True)
    whole = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True)
    state = whole.state_dict() | {name: value.contiguous() for name, value in net.state_dict().items() if not name.startswith("fc.")}
    torch.save(state, arguments.out + ".part", _use_new_zipfile_serialization=False)
    os.replace(arguments.out + ".part", arguments.out)
