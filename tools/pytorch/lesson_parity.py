"""Fixtures of the lesson's net: logits, activations, gradients, training losses.

Weights, images and labels come from `seeded_weights` and are not stored.
Everything but the 20 steps from the lesson's own initialisation is evaluated in f64.

lesson_net.safetensors
    logits [2, 10], loss []           images("input", 2), index("labels", 2, 10); no dropout; mean cross-entropy
    <stage>.norm [], .values [16]     each stage's output: L2 norm, elements at index("positions.<stage>", 16, elements)
    grad.<parameter>                  the whole gradient of a parameter of at most 512 elements; of a larger one:
    grad.<parameter>.norm []          its L2 norm
    grad.<parameter>.values [64]      its elements at index("positions.<parameter>", 64, elements)
    grad.<parameter>.projections [8]  its dot products with uniform("projection.<k>.<parameter>", 2), k = 0 ... 7
    training.losses [5]               SGD (metadata `training`), step t on images("input.<t>", 8), index("labels.<t>", 8, 10)
    training.losses_f32 [5]           the same in f32: how far rounding alone takes PyTorch

A projection vector has variance 1/3 an element, so the squared error of a
projection is on average a third of the gradient's squared error:
sqrt(3 * mean(error^2)) / norm estimates the relative error of the whole gradient.

lesson_initialisation.safetensors
    losses [4, 20]                    f32, dropout 0.4 (metadata `training`), seeds 0 ... 3, step t on
                                      block_images("blocks.<t>", 32), index("labels.blocks.<t>", 32, 10)
"""

import torch
import torch.nn.functional as F

import fixture_file
import seeded_weights as seeded
from lesson_googlenet import PARAMETERS, LessonGoogLeNet

FOLDER = "crates/inception-model/tests/fixtures"
WHOLE = 512
VALUES = 64
PROJECTIONS = 8


def make():
    seeded_net()
    lesson_initialisation()


def seeded_net():
    model = seeded.load_into(LessonGoogLeNet(dropout=0).double())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    tensors = forward_and_gradients(model)

    training = {"steps": 5, "batch": 8, "lr": 0.001, "momentum": 0.9, "dropout": 0.0}
    for key, dtype in (("losses", torch.float64), ("losses_f32", torch.float32)):
        model = seeded.load_into(LessonGoogLeNet(dropout=0).to(dtype))
        batches = [
            (seeded.images(f"input.{t}", 8).to(dtype), seeded.index(f"labels.{t}", 8, 10)) for t in range(training["steps"])
        ]
        tensors[f"training.{key}"] = torch.tensor(train(model, batches, training), dtype=torch.float64)

    parameters = [[name, list(p.shape)] for name, p in model.state_dict().items()]
    path = f"{FOLDER}/lesson_net.safetensors"
    fixture_file.write(path, tensors, "lesson_parity.py", "by name", training=training, parameters=parameters)


def forward_and_gradients(model):
    tensors = {}

    def observe(stage, activation):
        activation = activation.detach().flatten()
        tensors[f"{stage}.norm"] = activation.norm()
        tensors[f"{stage}.values"] = activation[seeded.index(f"positions.{stage}", 16, activation.numel())].float()

    logits = model(seeded.images("input", 2).double(), observe)
    loss = F.cross_entropy(logits, seeded.index("labels", 2, 10))
    loss.backward()
    tensors |= {"logits": logits, "loss": loss}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.flatten()
        if gradient.numel() <= WHOLE:
            tensors[f"grad.{name}"] = parameter.grad.float()
            continue
        tensors[f"grad.{name}.norm"] = gradient.norm()
        tensors[f"grad.{name}.values"] = gradient[seeded.index(f"positions.{name}", VALUES, gradient.numel())].float()
        tensors[f"grad.{name}.projections"] = torch.stack(
            [gradient @ seeded.uniform(f"projection.{k}.{name}", gradient.shape, 2).double() for k in range(PROJECTIONS)]
        )
    return tensors


def lesson_initialisation():
    training = {"steps": 20, "batch": 32, "lr": 1e-4, "momentum": 0.9, "dropout": 0.4, "seeds": [0, 1, 2, 3]}
    batches = [
        (seeded.block_images(f"blocks.{t}", 32), seeded.index(f"labels.blocks.{t}", 32, 10)) for t in range(training["steps"])
    ]
    losses = []
    for seed in training["seeds"]:
        torch.manual_seed(seed)
        losses.append(train(LessonGoogLeNet(dropout=training["dropout"]), batches, training))
        print(f"lesson's initialisation, seed {seed}: " + " ".join(f"{loss:.4g}" for loss in losses[-1]), flush=True)
    path = f"{FOLDER}/lesson_initialisation.safetensors"
    tensors = {"losses": torch.tensor(losses, dtype=torch.float32)}
    fixture_file.write(path, tensors, "lesson_parity.py", training["seeds"], training=training)


def train(model, batches, training):
    """The loss of every step, each taken before the step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), training["lr"], training["momentum"])
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
