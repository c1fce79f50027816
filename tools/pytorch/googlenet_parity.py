"""Fixtures of torchvision's GoogLeNet: state dict, logits, gradients, 20 training steps.

Weights, statistics, images and labels come from names (`seeded_weights`) and are not stored:

    bn.weight, bn.running_var     1 + uniform(name, 0.5)
    bn.bias                       0.6 + uniform(name, 0.4)
    bn.running_mean               uniform(name, 0.4)
    bn.num_batches_tracked        3
    all others                    seeded_weights.weight

Ten classes, no dropout, `transform_input` on. Everything is evaluated in f64.

Most activations are positive by that bias, because batch norm in training mode amplifies the differences between images from
layer to layer, and rounding with them: around a bias of 0, PyTorch's own f32 logits at 32x32 are 2.5e-5 off.

googlenet.safetensors
    logits.<size>.<mode>          images uniform("input.<size>", 2), labels as below; sizes 224x224, 32x32, 97x65; modes train, eval
    aux1.<size>, aux2.<size>      the auxiliary heads' logits, in training
    grad.<set>.norms [P]          of every parameter's gradient, in the state dict's order, and its dot products with
    grad.<set>.projections [P, 8] uniform("projection.<k>.<name>", 2), k = 0 ... 7
    grad.<set>.loss []
      set `train`                 16 images of 32x32 in training mode, auxiliary heads on: loss + 0.3 (loss1 + loss2)
      set `eval`                  2 images of 32x32, uniform(<metadata `eval_images`>, 2), in evaluation mode
      set `small`                 16 images of 15x15, uniform(<metadata `small_images`>, 2), in training mode
    statistics.norms [B], .projections [B, 8]   running mean and variance of every batch norm after the step of set `train`
    <run>.losses [20]             step t on uniform("input.<t>", 2), index("labels.<t>", batch, 10)
    <run>.losses_f32 [20]         the same in f32: how far rounding alone takes PyTorch
    <run>.norms, .projections     of every parameter and then every running statistic at the end
    <run>.moved [P + B]           how far each has moved: the norm of the difference to its beginning
      runs `full`, `frozen`       metadata `training`: all parameters, or `fc` alone in train mode, so that statistics move

A projection vector has variance 1/3 an element: sqrt(3 mean(error^2)) / norm estimates a whole tensor's relative error.

The images of the sets `eval` and `small` are those of 100 candidates that stay farthest from every kink (see lesson_parity.py):
only there can f32 gradients be held to 1e-4. One kink among the million of set `train` that f32 decides the other way
moves every gradient by about a hundredth, and 20 steps of full training multiply that to a tenth of the loss. metadata
`gradient_error_of_f32` and `losses_f32` show it of PyTorch itself: compare these in f64.
"""

import torch
import torch.nn.functional as F
from torchvision.models import GoogLeNet

import fixture_file
import seeded_weights as seeded

PATH = "crates/inception-model/tests/fixtures/googlenet.safetensors"
SIZES = {"224x224": (2, 224, 224), "32x32": (16, 32, 32), "97x65": (4, 97, 65)}
TRAINING = {
    "steps": 20,
    "batch": 16,
    "full": {"lr": 0.01, "momentum": 0.9},
    "frozen": {"lr": 0.01, "momentum": 0.0},
}
AUX_WEIGHT = 0.3
PROJECTIONS = 8
CANDIDATES = 100


def make():
    tensors = {}
    for size, shape in SIZES.items():
        tensors |= logits(size, images(f"input.{size}", *shape))

    small_images = farthest_from_kinks(f"small.{k}" for k in range(CANDIDATES))
    eval_images = farthest_from_kinks(f"eval.{k}" for k in range(CANDIDATES))
    sets = [
        ("train", images("input.32x32", *SIZES["32x32"]), True, True),
        ("eval", chosen(eval_images), False, False),
        ("small", chosen(small_images), False, True),
    ]
    errors = {}
    for name, pictures, aux, train in sets:
        exact = gradients(seeded_model(aux), pictures, train)
        rounded = gradients(seeded_model(aux).float(), pictures, train)
        errors[name] = max(((r.double() - e).norm() / e.norm()).item() for r, e in zip(rounded["grad"].values(), exact["grad"].values()))
        tensors[f"grad.{name}.loss"] = exact["loss"]
        tensors |= fingerprints(f"grad.{name}", exact["grad"])
        if name == "train":
            tensors |= fingerprints("statistics", exact["statistics"])

    for run in ("full", "frozen"):
        tensors |= training(run, torch.float64)
        tensors[f"{run}.losses_f32"] = training(run, torch.float32)[f"{run}.losses"]

    describe = lambda aux: [[k, list(v.shape), str(v.dtype)[6:]] for k, v in googlenet(aux).state_dict().items()]
    metadata = {
        "state_dict": describe(False),
        "state_dict_aux": describe(True),
        "small_images": small_images,
        "eval_images": eval_images,
        "gradient_error_of_f32": errors,
        "training": TRAINING,
    }
    fixture_file.write(PATH, tensors, "googlenet_parity.py", "by name", **metadata)


def googlenet(aux):
    return GoogLeNet(num_classes=10, aux_logits=aux, transform_input=True, init_weights=False, dropout=0.0, dropout_aux=0.0)


def seeded_model(aux):
    def value(name, tensor):
        match name.rsplit(".", 1)[1] if ".bn." in name else "":
            case "weight" | "running_var":
                return 1 + seeded.uniform(name, tensor.shape, 0.5)
            case "bias":
                return 0.6 + seeded.uniform(name, tensor.shape, 0.4)
            case "running_mean":
                return seeded.uniform(name, tensor.shape, 0.4)
            case "num_batches_tracked":
                return torch.tensor(3)
            case _:
                return seeded.weight(name, tensor.shape)

    model = googlenet(aux)
    model.load_state_dict({name: value(name, tensor) for name, tensor in model.state_dict().items()})
    return model.double()


def images(name, count, height, width):
    return seeded.uniform(name, (count, 3, height, width), 2)


def chosen(name):
    """The candidate of that name: 16 images of 15x15 pixels, or two of 32x32 pixels."""
    return images(name, 16, 15, 15) if name.startswith("small") else images(name, 2, 32, 32)


def logits(size, pictures):
    tensors = {}
    with torch.no_grad():
        for mode in ("train", "eval"):
            plain = seeded_model(aux=False).train(mode == "train")(pictures.double())
            heads = seeded_model(aux=True).train(mode == "train")(pictures.double())
            tensors[f"logits.{size}.{mode}"] = plain
            if mode == "train":
                # By name: the tuple's order is logits, aux2, aux1.
                assert torch.equal(heads.logits, plain)
                tensors |= {f"aux1.{size}": heads.aux_logits1, f"aux2.{size}": heads.aux_logits2}
            else:
                assert torch.equal(heads, plain)
    return tensors


def loss_of(model, pictures, labels):
    outputs = model(pictures.to(model.fc.weight.dtype))
    if isinstance(outputs, torch.Tensor):
        return F.cross_entropy(outputs, labels)
    losses = [F.cross_entropy(output, labels) for output in (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)]
    return losses[0] + AUX_WEIGHT * (losses[1] + losses[2])


def gradients(model, pictures, train):
    loss = loss_of(model.train(train), pictures, seeded.index("labels", len(pictures), 10))
    loss.backward()
    return {
        "loss": loss,
        "grad": {name: parameter.grad for name, parameter in model.named_parameters()},
        "statistics": statistics(model),
    }


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def fingerprints(prefix, tensors):
    """What is stored of tensors too large to store."""
    flat = {name: tensor.detach().double().flatten() for name, tensor in tensors.items()}
    return {
        f"{prefix}.norms": torch.stack([values.norm() for values in flat.values()]),
        f"{prefix}.projections": torch.stack(
            [
                torch.stack([values @ seeded.uniform(f"projection.{k}.{name}", values.shape, 2).double() for k in range(PROJECTIONS)])
                for name, values in flat.items()
            ]
        ),
    }


def farthest_from_kinks(names):
    model = seeded_model(aux=False)
    return max(names, key=lambda name: distance_from_kinks(model.train(name.startswith("small")), chosen(name)))


def distance_from_kinks(model, pictures):
    """The least |input| of a ReLU and the least lead of a maximum, in units of its layer's root mean square."""
    distances = []

    def relu_input(_, __, output):
        distances.append(output.abs().min() / output.square().mean().sqrt())

    def pool_input(module, inputs, output):
        (x,) = inputs
        # ceil_mode: as much padding on the right as the last window reaches beyond the image.
        beyond = [(o - 1) * module.stride + module.kernel_size - s - module.padding for o, s in zip(output.shape[2:], x.shape[2:])]
        height, width = (max(b, 0) for b in beyond)
        padded = F.pad(x, [module.padding, width, module.padding, height], value=-torch.inf)
        windows = padded.unfold(2, module.kernel_size, module.stride).unfold(3, module.kernel_size, module.stride).flatten(-2)
        first, second = windows.topk(2).values.unbind(-1)
        lead = first - second
        # Exact ties are zeros, or copies of one maximum of overlapping windows: both are decided alike in any precision.
        if (lead > 0).any():
            distances.append(lead[lead > 0].min() / x.square().mean().sqrt())

    hooks = [m.register_forward_hook(relu_input) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks += [m.register_forward_hook(pool_input) for m in model.modules() if isinstance(m, torch.nn.MaxPool2d)]
    with torch.no_grad():
        model(pictures.double())
    for hook in hooks:
        hook.remove()
    return min(distances).item()


def training(run, dtype):
    model = seeded_model(aux=False).to(dtype).train()
    start = {name: tensor.clone() for name, tensor in end_of(model).items()}
    if run == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("fc.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, **TRAINING[run])
    losses = []
    for t in range(TRAINING["steps"]):
        pictures = images(f"input.{t}", TRAINING["batch"], 32, 32)
        loss = loss_of(model, pictures, seeded.index(f"labels.{t}", TRAINING["batch"], 10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    end = end_of(model)
    moved = torch.stack([(end[name] - start[name]).double().norm() for name in end])
    tensors = {f"{run}.losses": torch.tensor(losses, dtype=torch.float64), f"{run}.moved": moved}
    return tensors | fingerprints(run, end)


def end_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | statistics(model)
