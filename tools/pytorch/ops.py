"""Fixtures of the single operations: inputs, output, upstream gradient, gradients.

The metadata key `cases` lists every case with its hyperparameters; a case's
tensors are named `<case>.x`, `<case>.weight`, `<case>.y`, `<case>.dy`,
`<case>.dx`, ... Pairs are [height, width]. Images are NCHW.

PyTorch evaluates every case in f64. In an f32 case the inputs are f32 numbers
and the results are rounded to f32 at the end, so a fixture is the right answer
and not one library's rounding of it.
"""

import math
import zlib

import torch
import torch.nn.functional as F

import fixture_file

SEED = 2014
cases, tensors = [], {}


def make():
    conv2d_cases()
    max_pool2d_cases()
    average_pool_cases()
    relu_cases()
    batch_norm_cases()
    cross_entropy_cases()
    linear_cases()
    names = [case["name"] for case in cases]
    assert len(names) == len(set(names)), "two cases share a name"
    path = "crates/candle-cnn/tests/fixtures/ops.safetensors"
    fixture_file.write(path, tensors, "ops.py", SEED, cases=cases)


def conv2d_cases():
    # name, input NCHW, output channels, kernel, then what differs from stride 1, padding 0, dilation 1
    def case(name, shape, out, kernel, stride=1, padding=0, dilation=1, bias=True, relu=False, f64=False):
        hyper = dict(stride=pair(stride), padding=pair(padding), dilation=pair(dilation))

        def function(x, weight, bias=None):
            y = F.conv2d(x, weight, bias, **hyper)
            if relu:
                # A kink within rounding distance of an output would make the gradient a coin toss.
                assert y.abs().min() > 1e-5, f"{name}: choose another seed"
            return F.relu(y) if relu else y

        kernel = pair(kernel)
        inputs = {"x": normal(shape), "weight": normal((out, shape[1], *kernel)) / math.sqrt(shape[1] * math.prod(kernel))}
        if bias:
            inputs["bias"] = normal((out,))
        op = "conv2d_relu" if relu else "conv2d"
        record(op, name, function, inputs, f64, kernel=kernel, bias=bias, **hyper)

    for f64 in (False, True):
        start("conv2d", f64)
        case("1x1", (2, 16, 5, 5), 17, 1, f64=f64)
        case("3x3_pad1", (2, 3, 8, 8), 16, 3, padding=1, f64=f64)
        case("5x5_pad2", (2, 5, 7, 6), 3, 5, padding=2, f64=f64)
        case("3x5_stride2x1_pad1x2", (2, 3, 9, 8), 5, (3, 5), stride=(2, 1), padding=(1, 2), f64=f64)
        case("3x3_dilation2_pad2", (2, 5, 8, 9), 3, 3, padding=2, dilation=2, f64=f64)
    case("1x1_no_bias", (1, 33, 4, 4), 5, 1, bias=False)
    case("1x1_one_channel", (3, 1, 5, 3), 1, 1)
    case("1x1_one_pixel", (1, 17, 1, 1), 33, 1)
    case("1x1_stride2", (2, 16, 5, 6), 3, 1, stride=2)
    case("1x1_stride3", (2, 3, 7, 8), 5, 1, stride=3)
    case("1x1_pad1", (2, 3, 4, 5), 5, 1, padding=1)
    case("2x2", (2, 3, 5, 6), 5, 2)
    case("2x2_stride2", (2, 5, 7, 6), 3, 2, stride=2)
    case("2x2_pad1", (1, 5, 4, 4), 3, 2, padding=1)
    case("3x3", (2, 5, 6, 7), 3, 3)
    case("3x3_no_bias", (2, 5, 6, 7), 16, 3, padding=1, bias=False)
    case("3x3_one_channel", (1, 1, 5, 5), 1, 3, padding=1)
    case("3x3_channels_17_to_33", (1, 17, 5, 5), 33, 3, padding=1)
    case("3x3_channels_16_to_16", (2, 16, 9, 9), 16, 3, padding=1)
    case("3x3_channels_33_to_17", (2, 33, 6, 6), 17, 3, padding=1)
    case("3x3_one_pixel_pad1", (2, 5, 1, 1), 3, 3, padding=1)
    case("3x3_image_2x2_pad1", (2, 3, 2, 2), 5, 3, padding=1)
    case("3x3_image_2x1_pad2", (1, 3, 2, 1), 5, 3, padding=2)
    case("3x3_pad3", (1, 3, 4, 5), 5, 3, padding=3)
    case("3x3_stride2_pad1", (2, 3, 9, 8), 16, 3, stride=2, padding=1)
    case("3x3_stride3", (2, 3, 11, 10), 5, 3, stride=3)
    case("3x3_stride3_pad1", (2, 3, 8, 10), 5, 3, stride=3, padding=1)
    case("3x3_stride1x3_pad2x0", (1, 3, 5, 9), 5, 3, stride=(1, 3), padding=(2, 0))
    case("3x3_stride2_dilation2_pad2", (1, 3, 9, 9), 5, 3, stride=2, padding=2, dilation=2)
    case("3x3_dilation1x2_pad1x2", (2, 3, 6, 7), 5, 3, padding=(1, 2), dilation=(1, 2))
    case("3x3_image_32x32", (1, 3, 32, 32), 3, 3, padding=1)
    case("5x5", (2, 3, 8, 7), 5, 5)
    case("5x5_pad2_channels_16_to_33", (1, 16, 6, 6), 33, 5, padding=2, bias=False)
    case("5x5_one_pixel_pad2", (2, 16, 1, 1), 5, 5, padding=2)
    case("5x5_image_4x3_pad1x2", (1, 3, 4, 3), 5, 5, padding=(1, 2))
    case("5x5_stride2_pad2", (1, 5, 9, 8), 3, 5, stride=2, padding=2)
    case("7x7_stride2_pad3", (2, 3, 13, 12), 5, 7, stride=2, padding=3)
    case("7x7_image_3x4_pad3", (1, 3, 3, 4), 5, 7, padding=3)
    case("3x5", (2, 3, 6, 8), 5, (3, 5), bias=False)
    case("5x3_pad2x1", (2, 5, 6, 5), 16, (5, 3), padding=(2, 1))
    case("1x3_pad0x1", (2, 5, 4, 6), 3, (1, 3), padding=(0, 1))
    for f64 in (False, True):
        start("conv2d_relu", f64)
        case("3x3_pad1", (2, 3, 6, 7), 17, 3, padding=1, relu=True, f64=f64)
    case("1x1", (2, 17, 4, 5), 16, 1, relu=True)
    case("1x1_no_bias", (2, 5, 4, 3), 3, 1, bias=False, relu=True)
    case("5x5_pad2", (1, 16, 5, 5), 5, 5, padding=2, relu=True)
    case("3x3_stride2_pad1", (2, 5, 7, 7), 3, 3, stride=2, padding=1, relu=True)
    case("3x3_one_pixel_pad1", (1, 3, 1, 1), 16, 3, padding=1, relu=True)


def max_pool2d_cases():
    def case(name, x, kernel, stride, padding=0, ceil_mode=False, f64=False):
        hyper = dict(stride=pair(stride), padding=pair(padding), ceil_mode=ceil_mode)
        kernel = pair(kernel)
        x = x() if callable(x) else normal(x)
        record("max_pool2d", name, lambda x: F.max_pool2d(x, kernel, **hyper), {"x": x}, f64, kernel=kernel, **hyper)

    for f64 in (False, True):
        start("max_pool2d", f64)
        case("3_1_1", (2, 3, 7, 6), 3, 1, 1, f64=f64)
        case("3_2_1", (2, 5, 8, 9), 3, 2, 1, f64=f64)
        case("3_2_0_ceil", (2, 3, 8, 9), 3, 2, 0, True, f64=f64)
        case("2_2_0", (2, 3, 6, 8), 2, 2, f64=f64)
        case("3_1_1_ties", lambda: integers((2, 3, 8, 8)), 3, 1, 1, f64=f64)
    case("3_1_1_one_pixel", (2, 3, 1, 1), 3, 1, 1)
    case("3_1_1_channels_17_wide_33", (1, 17, 3, 33), 3, 1, 1)
    case("3_2_1_image_32x32", (1, 2, 32, 32), 3, 2, 1)
    case("3_2_1_one_row", (1, 3, 1, 9), 3, 2, 1)
    case("3_2_1_ceil", (2, 3, 8, 7), 3, 2, 1, True)
    case("3_2_0", (2, 3, 9, 8), 3, 2, 0)
    case("3_2_0_ceil_image_14x14", (1, 3, 14, 14), 3, 2, 0, True)
    case("2_2_0_odd", (2, 3, 7, 5), 2, 2)
    case("2_2_0_odd_ceil", (2, 3, 7, 5), 2, 2, 0, True)
    case("5_3_2", (2, 3, 11, 13), 5, 3, 2)
    case("3_3_0", (2, 3, 9, 10), 3, 3)
    case("4_1_2_overlapping", (2, 2, 6, 7), 4, 1, 2)
    case("2_3_0_gaps", (2, 2, 8, 9), 2, 3)
    case("1_2_0", (2, 2, 5, 6), 1, 2)
    case("3x2_2x1_1x0", (2, 3, 9, 7), (3, 2), (2, 1), (1, 0))
    case("2x5_1x3_1x2_ceil", (2, 3, 6, 11), (2, 5), (1, 3), (1, 2), True)
    # Without the rule that a window must start inside the image or its left padding,
    # ceil mode would give one more row and column here: (5 + 2 - 2) / 2 rounds up to 3, + 1.
    case("2_2_1_ceil_last_window_in_padding", (2, 3, 5, 5), 2, 2, 1, True)
    case("3_3_1_ceil_last_window_in_padding", (1, 3, 6, 9), 3, 3, 1, True)
    case("3_2_1_ties", lambda: integers((2, 3, 9, 8)), 3, 2, 1)
    case("2_2_0_ties", lambda: integers((2, 3, 6, 6)), 2, 2)
    case("3_2_0_ceil_ties", lambda: integers((2, 3, 8, 8)), 3, 2, 0, True)
    case("3_1_1_all_equal", lambda: torch.full((1, 2, 5, 5), -2.0), 3, 1, 1)

    def with_special(value):
        x = normal((2, 2, 6, 6))
        x[0, 0, :4, :4] = value
        x[1, :, ::2, 1::3] = value
        return x

    case("3_2_1_negative_infinity", lambda: with_special(-math.inf), 3, 2, 1)
    case("3_2_1_infinity", lambda: with_special(math.inf), 3, 2, 1)
    case("3_2_1_nan", lambda: with_special(math.nan), 3, 2, 1)


def average_pool_cases():
    def adaptive(name, shape, output, op="adaptive_avg_pool2d", f64=False):
        record(op, name, lambda x: F.adaptive_avg_pool2d(x, output), {"x": normal(shape)}, f64, output=pair(output))

    for f64 in (False, True):
        start("global_avg_pool2d", f64)
        adaptive("8x8", (2, 5, 8, 8), 1, "global_avg_pool2d", f64)
    adaptive("7x5_channels_17", (3, 17, 7, 5), 1, "global_avg_pool2d")
    adaptive("one_pixel", (1, 3, 1, 1), 1, "global_avg_pool2d")
    for f64 in (False, True):
        start("adaptive_avg_pool2d", f64)
        adaptive("14x14_to_4x4", (2, 3, 14, 14), 4, f64=f64)
    adaptive("8x8_to_4x4", (2, 3, 8, 8), 4)
    adaptive("9x11_to_7x5", (2, 3, 9, 11), (7, 5))
    adaptive("5x3_to_7x5_upwards", (1, 3, 5, 3), (7, 5))
    adaptive("2x2_to_4x4_upwards", (1, 3, 2, 2), 4)
    adaptive("6x6_to_1x3", (2, 3, 6, 6), (1, 3))

    def average(name, shape, kernel, stride, padding=0, ceil_mode=False, count_include_pad=True, f64=False):
        hyper = dict(stride=pair(stride), padding=pair(padding), ceil_mode=ceil_mode, count_include_pad=count_include_pad)
        kernel = pair(kernel)
        record("avg_pool2d", name, lambda x: F.avg_pool2d(x, kernel, **hyper), {"x": normal(shape)}, f64, kernel=kernel, **hyper)

    for f64 in (False, True):
        start("avg_pool2d", f64)
        average("3_1_1", (2, 3, 6, 7), 3, 1, 1, f64=f64)
    average("3_1_1_exclude_pad", (2, 3, 6, 7), 3, 1, 1, count_include_pad=False)
    average("2_2_0", (2, 3, 6, 8), 2, 2)
    average("5_3_0", (2, 3, 14, 11), 5, 3)
    average("3_2_1_exclude_pad", (2, 3, 8, 9), 3, 2, 1, count_include_pad=False)
    average("3_2_0_ceil", (2, 3, 8, 9), 3, 2, 0, ceil_mode=True)
    average("3_2_1_ceil", (2, 3, 8, 6), 3, 2, 1, ceil_mode=True)
    average("3_2_1_ceil_exclude_pad", (2, 3, 8, 6), 3, 2, 1, ceil_mode=True, count_include_pad=False)
    average("2_2_1_ceil_last_window_in_padding", (2, 3, 5, 5), 2, 2, 1, ceil_mode=True)
    average("3x2_2x1_1x0", (2, 3, 9, 7), (3, 2), (2, 1), (1, 0))


def relu_cases():
    for f64 in (False, True):
        start("relu", f64)
        record("relu", "normal", F.relu, {"x": normal((2, 3, 5, 7))}, f64)
        # Exact zeros of both signs: PyTorch's gradient there is 0.
        record("relu", "zeros", F.relu, {"x": integers((2, 3, 4, 4)) * normal((2, 3, 4, 4)).sign()}, f64)
    record("relu", "extremes", F.relu, {"x": torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38])})


def batch_norm_cases():
    def training(name, shape, eps=1e-5, momentum=0.1, affine=True, f64=False):
        """Two training steps: x, then x2. `running_*0` before, `running_*1` after the first, `running_*2` after both."""
        channels = shape[1]
        x2 = stored(normal(shape) * 2 + 1, f64)
        module = torch.nn.BatchNorm2d(channels, eps, momentum, affine, dtype=torch.float64)
        extra = {"x2": x2}

        def keep(step):
            extra[f"running_mean{step}"] = module.running_mean.clone()
            extra[f"running_var{step}"] = module.running_var.clone()

        def function(x, *affine_parameters):
            parameters = dict(zip(("weight", "bias"), affine_parameters))
            keep(0)
            y = torch.func.functional_call(module, parameters, x)
            keep(1)
            extra["y2"] = torch.func.functional_call(module, parameters, x2.double())
            keep(2)
            extra["num_batches_tracked2"] = module.num_batches_tracked
            return y

        inputs = {"x": normal(shape) * 1.5 - 0.5}
        if affine:
            inputs |= {"weight": uniform((channels,), 0.5, 1.5), "bias": normal((channels,))}
        record("batch_norm", name, function, inputs, f64, extra, training=True, eps=eps, momentum=momentum, affine=affine)

    def inference(name, shape, eps=1e-5, f64=False):
        channels = shape[1]
        extra = {"running_mean": stored(normal((channels,)), f64), "running_var": stored(uniform((channels,), 0.2, 3), f64)}

        def function(x, weight, bias):
            return F.batch_norm(x, extra["running_mean"].double(), extra["running_var"].double(), weight, bias, eps=eps)

        inputs = {"x": normal(shape), "weight": uniform((channels,), 0.5, 1.5), "bias": normal((channels,))}
        record("batch_norm", name, function, inputs, f64, extra, training=False, eps=eps, momentum=0.1, affine=True)

    for f64 in (False, True):
        start("batch_norm", f64)
        training("training_eps_1e-5", (3, 5, 4, 4), f64=f64)
        training("training_eps_1e-3", (2, 3, 5, 3), eps=1e-3, f64=f64)
        training("training_cumulative_average", (2, 3, 4, 4), momentum=None, f64=f64)
        inference("inference_eps_1e-3", (2, 5, 4, 3), eps=1e-3, f64=f64)
    training("training_two_values_1x1", (2, 5, 1, 1))
    training("training_two_values_1x2", (1, 3, 1, 2), eps=1e-3)
    training("training_channels_33", (2, 33, 3, 3), eps=1e-3)
    training("training_momentum_0.5", (2, 3, 4, 4), momentum=0.5)
    training("training_no_affine", (2, 3, 4, 4), affine=False)
    inference("inference_one_pixel", (1, 17, 1, 1))


def cross_entropy_cases():
    def case(name, batch, classes, label_smoothing=0.0, scale=1.0, logits=None, f64=False):
        x = normal((batch, classes)) * scale if logits is None else logits
        extra = {"target": torch.randint(classes, (batch,), generator=generator)}

        def function(x):
            return F.cross_entropy(x, extra["target"], label_smoothing=label_smoothing)

        record("cross_entropy", name, function, {"x": x}, f64, extra, label_smoothing=label_smoothing)

    for f64 in (False, True):
        start("cross_entropy", f64)
        case("batch_4", 4, 10, f64=f64)
        case("batch_4_smoothing_0.1", 4, 10, 0.1, f64=f64)
    case("batch_1", 1, 10)
    case("batch_32", 32, 10, scale=3.0)
    case("two_classes_smoothing_0.1", 5, 2, 0.1)
    case("one_class", 3, 1)
    case("classes_1000_smoothing_0.1", 2, 1000, 0.1)
    large = torch.tensor([[500.0, -500.0, 0.0], [-500.0, 500.0, 499.0], [500.0, 500.0, -500.0], [-500.0, -500.0, -500.0]])
    case("large_logits", 4, 3, logits=large)
    case("large_logits_smoothing_0.1", 4, 3, 0.1, logits=large)


def linear_cases():
    def case(name, batch, inputs, outputs, bias=True, f64=False):
        values = {"x": normal((batch, inputs)), "weight": normal((outputs, inputs)) / math.sqrt(inputs)}
        if bias:
            values["bias"] = normal((outputs,))
        record("linear", name, F.linear, values, f64, bias=bias)

    for f64 in (False, True):
        start("linear", f64)
        case("17_to_10", 4, 17, 10, f64=f64)
    case("64_to_10", 3, 64, 10)
    case("no_bias", 2, 5, 3, bias=False)
    case("batch_1", 1, 33, 16)
    case("one_to_one", 5, 1, 1)


def record(op, name, function, inputs, f64=False, extra=None, **hyperparameters):
    """Evaluates `function(**inputs)` and its gradients in f64 and stores everything in the case's type."""
    name = f"{op}.{name}" + (".f64" if f64 else "")
    inputs = {k: stored(v, f64) for k, v in inputs.items()}
    leaves = {k: v.double().requires_grad_() for k, v in inputs.items()}
    y = function(*leaves.values())
    dy = stored(normal(y.shape), f64)
    y.backward(dy.double())
    results = {"y": y, "dy": dy} | {f"d{k}": v.grad for k, v in leaves.items()}
    for key, value in (inputs | results | (extra or {})).items():
        tensors[f"{name}.{key}"] = stored(value.detach().clone(), f64)
    cases.append({"name": name, "op": op, "dtype": "f64" if f64 else "f32", **hyperparameters})


generator = torch.Generator()


def start(op, f64):
    """Each operation draws from its own stream, so that a new case of one leaves the others alone."""
    generator.manual_seed(SEED + zlib.crc32(f"{op} {f64}".encode()))


def normal(shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(shape, low, high):
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


def integers(shape):
    """Few distinct values: most windows hold several equal maxima."""
    return torch.randint(-2, 3, shape, generator=generator).double()


def stored(tensor, f64):
    return tensor if tensor.dtype == torch.int64 else tensor.to(torch.float64 if f64 else torch.float32)


def pair(value):
    return [value, value] if isinstance(value, int) else list(value)
