"""Fixture of torch.optim.SGD: 100 steps of linear regression, 8 inputs to 4 outputs, whole batch of 16.

loss = mean((x weight^T + bias - target)^2), so with r = x weight^T + bias - target
and n = 16 * 4:  dweight = 2/n r^T x,  dbias = 2/n sum(r).

    <dtype>.x, .target, .weight, .bias                   the problem and its start, f32 numbers in both types
    <case>.<dtype>.weight.<step>, .bias.<step>           parameters after 1, 2, 10 and 100 steps
    <case>.<dtype>.weight_momentum.<step>, .bias_momentum.<step>   the buffers, if there is momentum

Metadata `cases` lists the hyperparameters.
"""

import torch
import torch.nn.functional as F

import fixture_file

SEED = 2014
STEPS = 100
KEPT = (1, 2, 10, STEPS)
PLAIN = {"lr": 0.05, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
CASES = {
    "plain": PLAIN,
    "momentum": PLAIN | {"momentum": 0.9},
    "dampening": PLAIN | {"momentum": 0.9, "dampening": 0.3},
    "nesterov": PLAIN | {"momentum": 0.9, "nesterov": True},
    "weight_decay": PLAIN | {"weight_decay": 5e-4},
    "weight_decay_momentum": PLAIN | {"momentum": 0.9, "weight_decay": 5e-4},
    "weight_decay_nesterov": PLAIN | {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}


def make():
    torch.manual_seed(SEED)
    x, target = torch.randn(16, 8), torch.randn(16, 4)
    start = {"weight": torch.randn(4, 8), "bias": torch.randn(4)}
    tensors = {}
    for dtype_name, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        problem = {"x": x, "target": target} | start
        tensors |= {f"{dtype_name}.{k}": v.to(dtype) for k, v in problem.items()}
        for case, hyperparameters in CASES.items():
            kept = train(x.to(dtype), target.to(dtype), {k: v.to(dtype) for k, v in start.items()}, hyperparameters)
            tensors |= {f"{case}.{dtype_name}.{k}": v for k, v in kept.items()}
    cases = [{"name": case, "steps": STEPS, **hyperparameters} for case, hyperparameters in CASES.items()]
    fixture_file.write("crates/trainer/tests/fixtures/sgd.safetensors", tensors, "sgd.py", SEED, cases=cases)


def train(x, target, start, hyperparameters):
    parameters = {k: v.clone().requires_grad_() for k, v in start.items()}
    optimizer = torch.optim.SGD(parameters.values(), **hyperparameters)
    kept = {}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        F.mse_loss(F.linear(x, parameters["weight"], parameters["bias"]), target).backward()
        optimizer.step()
        if step in KEPT:
            for name, parameter in parameters.items():
                kept[f"{name}.{step}"] = parameter.detach().clone()
                if hyperparameters["momentum"]:
                    kept[f"{name}_momentum.{step}"] = optimizer.state[parameter]["momentum_buffer"].clone()
    return kept
