"""The PyTorch side of `cargo xtask bench train-step`: one long-lived process, one line in, one line out.

A line `run <steps>` on stdin runs that many steps on seeded random data and is
answered by one line of JSON:

    {"seconds_per_step": 2.5, "images_per_second": 12.8, "peak_mib": 1900.0, "threads": 2, "framework": "PyTorch 2.15.0"}

A training step is zero_grad, forward, cross-entropy, backward, SGD step. The end of stdin ends the process.

With `--device cuda` the time ends when the GPU is done, `--compile` is torch.compile with CUDA graphs
(mode="reduce-overhead") and a fused update, and `--precision bf16` is autocast; f32 is PyTorch's default, TF32 in convolutions.
"""

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F

from lesson_googlenet import LessonGoogLeNet


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as our side: the shapes do not change
    step = MODES[arguments.mode](arguments)
    for line in sys.stdin:
        word, steps = line.split()
        if word != "run" or int(steps) < 1:
            sys.exit(f"expected `run <steps>`, got {line!r}")
        start = time.perf_counter()
        for _ in range(int(steps)):
            step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / int(steps)
        answer = {
            "seconds_per_step": seconds,
            "images_per_second": arguments.batch / seconds,
            "peak_mib": peak_mib(),
            "threads": torch.get_num_threads(),
            "framework": framework(arguments.device),
        }
        print(json.dumps(answer), flush=True)


def framework(device):
    name = "PyTorch " + torch.__version__.split("+")[0]
    if device == "cuda":
        name += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return name


def training(arguments):
    model, images, labels = prepare(arguments)
    if arguments.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("fc.")
    trainable = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    # A small step: the data are noise, and the weights must stay finite however long the benchmark runs.
    momentum = 0.0 if arguments.frozen else 0.9
    # The fastest PyTorch has the fastest update as well.
    fused = True if arguments.compile else None
    optimizer = torch.optim.SGD(trainable, lr=1e-5, momentum=momentum, fused=fused)

    def loss_of(images, labels):
        with autocast(arguments):
            return F.cross_entropy(model(images), labels)

    if arguments.compile:
        loss_of = torch.compile(loss_of, mode="reduce-overhead")

    def step():
        optimizer.zero_grad()
        loss_of(images, labels).backward()
        optimizer.step()

    return step


def inference(arguments):
    model, images, _ = prepare(arguments)
    model.eval()

    @torch.no_grad()
    def step():
        with autocast(arguments):
            model(images)

    return step


def prepare(arguments):
    layout = LAYOUTS[arguments.layout]
    model = MODELS[arguments.model]().to(arguments.device, memory_format=layout)
    images = torch.rand(arguments.batch, 3, arguments.image_size, arguments.image_size) * 2 - 1
    images = images.to(arguments.device, memory_format=layout)
    return model, images, torch.randint(10, (arguments.batch,)).to(arguments.device)


def autocast(arguments):
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.precision == "bf16")


def torchvision_googlenet():
    from torchvision.models import googlenet

    return googlenet(weights=None, num_classes=10, aux_logits=False, transform_input=True, init_weights=True)


def peak_mib():
    """The most memory this process has held, or null where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


MODES = {"train": training, "inference": inference}
MODELS = {"lesson": LessonGoogLeNet, "torchvision": torchvision_googlenet}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="lesson")
    parser.add_argument("--frozen", action="store_true", help="train the head alone, in training mode (torchvision)")
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32, help="height and width of the pictures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--compile", action="store_true", help='torch.compile(mode="reduce-overhead")')
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.frozen and arguments.model != "torchvision":
        parser.error("--frozen needs --model torchvision")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this PyTorch finds no GPU")
    return arguments


if __name__ == "__main__":
    main()
