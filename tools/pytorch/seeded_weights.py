"""Numbers that a program in any language can make again, from a name alone.

Weights of the whole net would be 23 MB of fixture, so both sides generate them:

    hash  = FNV-1a, 64 bit, of the UTF-8 name
            (start 0xCBF29CE484222325; for each byte: hash = (hash XOR byte) * 0x100000001B3)
    state = hash + i * 0x9E3779B97F4A7C15                   for element i = 0, 1, 2, ...
    z     = state
    z     = (z XOR (z >> 30)) * 0xBF58476D1CE4E5B9
    z     = (z XOR (z >> 27)) * 0x94D049BB133111EB
    z     =  z XOR (z >> 31)                                (splitmix64's finaliser)

All of it in wrapping unsigned 64-bit arithmetic; elements in row-major order.

    uniform(name, width)  element = ((z >> 40) as f64 / 2^24 - 0.5) * width, rounded to f32
    index(name, below)    element = z mod below

Uses:
    weight `name` of standard deviation s:  uniform(name, (2 * sqrt(3)) * s), in f64, in this order of operations
    images in [-1, 1):                      uniform("input", 2)
    labels:                                 index("labels", 10)

Test values: the hash of "input" is 0x1EBBAE8F5810B65B and its first three z are
0x02E17CA90FF2EC39, 0x190A9F76A9BD8BF6, 0xA70117D09CB2BC5B.
"""

import math

import numpy
import torch

U64 = numpy.uint64


def fnv1a(name):
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def bits(name, count):
    z = U64(fnv1a(name)) + numpy.arange(count, dtype=U64) * U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def uniform(name, shape, width):
    u = (bits(name, math.prod(shape)) >> U64(40)).astype(numpy.float64) / 2**24
    return torch.from_numpy(((u - 0.5) * width).astype(numpy.float32)).reshape(shape)


def index(name, count, below):
    return torch.from_numpy((bits(name, count) % U64(below)).astype(numpy.int64))


def weight(name, shape):
    """Standard deviation sqrt(2 / fan_in) for weights, 0.05 for biases: activations keep their scale through the net."""
    s = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.05
    return uniform(name, shape, (2 * math.sqrt(3)) * s)


def load_into(model):
    """Replaces every parameter by the seeded weight of its name."""
    model.load_state_dict({name: weight(name, tensor.shape) for name, tensor in model.state_dict().items()})
    return model


def images(name, count):
    return uniform(name, (count, 3, 32, 32), 2)


def block_images(name, count):
    """Pictures of 8x8 flat squares of 4x4 pixels: uniform(name, 2) of shape (count, 3, 8, 8), each value repeated."""
    return uniform(name, (count, 3, 8, 8), 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
