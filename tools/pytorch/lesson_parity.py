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
    small.<all of the above>          the same for two images of 8x8 pixels, uniform(<metadata `small_images`>, 2)
    training.losses [5]               SGD (metadata `training`), step t on images("input.<t>", 8), index("labels.<t>", 8, 10)
    training.losses_f32 [5]           the same in f32: how far rounding alone takes PyTorch

A projection vector has variance 1/3 an element, so the squared error of a
projection is on average a third of the gradient's squared error:
sqrt(3 * mean(error^2)) / norm estimates the relative error of the whole gradient.

Two sets of gradients, because of the kinks. A net of ReLUs and maxima has
millions of comparisons; where two numbers lie within rounding of each other,
f32 now and then decides the other way, and a whole path of the gradient comes or
goes. At 32x32 PyTorch's own f32 gradients differ from its f64 gradients by up
to the metadata's `gradient_error_of_f32`, about 2e-3: compare these in f64. The
small images are the ones, out of 200, that stay farthest from every kink, and
there f32 can be held to 1e-4.

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
    model = seeded_model(torch.float64)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    sets = {"": seeded.images("input", 2)}
    small_images = max((f"small.{k}" for k in range(200)), key=lambda name: distance_from_kinks(model, small(name)))
    sets["small."] = small(small_images)
    tensors, error_of_f32 = {}, {}
    for prefix, images in sets.items():
        exact = forward_and_gradients(model, images)
        error_of_f32[prefix + "grad"] = largest_error(seeded_model(torch.float32), images, model)
        tensors |= {prefix + name: tensor for name, tensor in exact.items()}

    training = {"steps": 5, "batch": 8, "lr": 0.001, "momentum": 0.9, "dropout": 0.0}
    for key, dtype in (("losses", torch.float64), ("losses_f32", torch.float32)):
        batches = [
            (seeded.images(f"input.{t}", 8).to(dtype), seeded.index(f"labels.{t}", 8, 10)) for t in range(training["steps"])
        ]
        tensors[f"training.{key}"] = torch.tensor(train(seeded_model(dtype), batches, training), dtype=torch.float64)

    metadata = {
        "training": training,
        "parameters": [[name, list(p.shape)] for name, p in model.state_dict().items()],
        "small_images": small_images,
        "gradient_error_of_f32": error_of_f32,
    }
    fixture_file.write(f"{FOLDER}/lesson_net.safetensors", tensors, "lesson_parity.py", "by name", **metadata)


def seeded_model(dtype):
    return seeded.load_into(LessonGoogLeNet(dropout=0).to(dtype))


def small(name):
    return seeded.uniform(name, (2, 3, 8, 8), 2)


def forward_and_gradients(model, images):
    tensors = {}

    def observe(stage, activation):
        activation = activation.detach().flatten()
        tensors[f"{stage}.norm"] = activation.norm()
        tensors[f"{stage}.values"] = activation[seeded.index(f"positions.{stage}", 16, activation.numel())].float()

    tensors["logits"], tensors["loss"] = backward(model, images, observe)
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


def backward(model, images, *observe):
    """Leaves the gradients of the mean loss in the model."""
    model.zero_grad()
    logits = model(images.to(model.fc.weight.dtype), *observe)
    loss = F.cross_entropy(logits, seeded.index("labels", len(images), 10))
    loss.backward()
    return logits, loss


def largest_error(model_f32, images, model_f64):
    """The largest relative error of a parameter's gradient; `model_f64` holds the right ones."""
    backward(model_f32, images)
    pairs = zip(model_f32.parameters(), model_f64.parameters())
    return max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)


def distance_from_kinks(model, images):
    """The least |input| of a ReLU and the least lead of a maximum, in units of its layer's root mean square."""
    distances = []

    def relu_input(_, __, output):
        distances.append(output.abs().min() / output.square().mean().sqrt())

    def pool_input(module, inputs, _):
        (x,) = inputs
        padded = F.pad(x, [module.padding] * 4, value=-torch.inf)
        windows = padded.unfold(2, 3, module.stride).unfold(3, 3, module.stride).flatten(-2)
        first, second = windows.topk(2).values.unbind(-1)
        lead = first - second
        # Exact ties are zeros, or copies of one maximum of overlapping windows: both are decided alike in any precision.
        distances.append(lead[lead > 0].min() / x.square().mean().sqrt())

    hooks = [m.register_forward_hook(relu_input) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks += [m.register_forward_hook(pool_input) for m in model.modules() if isinstance(m, torch.nn.MaxPool2d)]
    with torch.no_grad():
        model(images.double())
    for hook in hooks:
        hook.remove()
    return min(distances).item()


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
