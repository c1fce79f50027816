"""The lesson's two transfer stages in PyTorch, beside `finetune-full` and `finetune-frozen`.

    python finetune.py full --data-dir DIR --weights FILE|random --save STATE.pth [--train-limit N] [--test-limit N]
    python finetune.py frozen --data-dir DIR --init STATE.pth ...

Prints one line of JSON: accuracy, images a second in training and evaluation,
the most memory. The same recipe: torchvision's net without auxiliary heads,
32×32 pictures at mean and standard deviation 0.5 through `transform_input`,
batches of 32, SGD 0.01 (full: momentum 0.9), 2 epochs; the frozen stage trains
`fc` alone, in training mode. The order of the pictures and the masks of the
dropout are PyTorch's own.
"""

import argparse
import json
import resource
import time

import safetensors.torch
import torch
import torchvision

import cifar10

parser = argparse.ArgumentParser()
parser.add_argument("stage", choices=["full", "frozen"])
parser.add_argument("--data-dir", required=True)
parser.add_argument("--weights", default="random")
parser.add_argument("--init")
parser.add_argument("--save")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--train-limit", type=int)
parser.add_argument("--test-limit", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--channels-last", action="store_true")
arguments = parser.parse_args()

torch.manual_seed(arguments.seed)
torch.set_num_threads(arguments.threads)


def read(path):
    return safetensors.torch.load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)


net = torchvision.models.googlenet(weights=None, init_weights=True, aux_logits=False, transform_input=True)
if arguments.init is None and arguments.weights != "random":
    state = read(arguments.weights)
    net.load_state_dict({name: value for name, value in state.items() if not name.startswith("aux")})
net.fc = torch.nn.Linear(1024, 10)
if arguments.init is not None:
    net.load_state_dict(read(arguments.init))
if arguments.stage == "frozen":
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
if arguments.channels_last:
    net = net.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(
    [parameter for parameter in net.parameters() if parameter.requires_grad],
    lr=0.01,
    momentum=0.9 if arguments.stage == "full" else 0,
)

train, train_labels = cifar10.load(arguments.data_dir, "train", arguments.train_limit)
test, test_labels = cifar10.load(arguments.data_dir, "test", arguments.test_limit)


def images(pictures):
    batch = cifar10.normalise(pictures)
    return batch.contiguous(memory_format=torch.channels_last) if arguments.channels_last else batch


train_seconds = 0
for epoch in range(arguments.epochs):
    net.train()
    start = time.perf_counter()
    for chosen in torch.randperm(len(train)).split(32):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images(train[chosen])), train_labels[chosen])
        loss.backward()
        optimizer.step()
        loss.item()
    train_seconds += time.perf_counter() - start

net.eval()
start = time.perf_counter()
with torch.no_grad():
    answers = torch.cat([net(images(pictures)).argmax(1) for pictures in test.split(64)])
evaluation_seconds = time.perf_counter() - start
if arguments.save:
    torch.save(net.state_dict(), arguments.save)
print(
    json.dumps(
        {
            "accuracy": (answers == test_labels).double().mean().item(),
            "train_images_per_second": arguments.epochs * len(train) / train_seconds,
            "test_images_per_second": len(test) / evaluation_seconds,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "torch": torch.__version__,
        }
    )
)
