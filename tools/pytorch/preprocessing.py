"""Fixtures of torchvision's preprocessing and of Pillow's JPEG, on pictures that this script draws.

The pictures go to experiments/predict/tests/pictures. They have the spectrum of photographs (noise whose
amplitude falls with frequency), edges, and saturated colours, in each format that `predict` reads; sizes are odd,
short and long, smaller and larger than what they become.

    <picture>.imagenet     16x16 pixels of GoogLeNet_Weights.IMAGENET1K_V1.transforms(), rows and columns 7, 21, ..., f32
    <picture>.cifar        Resize((32, 32)) with antialiasing, bytes, all pixels
    resize.images          (2, 3, 32, 32)
    resize.<size>          F.interpolate(bilinear, align_corners=False, antialias=True) of them, every
                           size // 16-th row and column, computed in f64

Another fixture, of cifar-data, has 32x32 pictures as JPEG files, `<name>.file`, and the bytes that Pillow decodes, `<name>.pixels`
(3, 32, 32).
"""

import io

import numpy
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models, transforms

import fixture_file

SEED = 256
PICTURES = {
    "wide.jpg": (500, 375, "RGB", {"quality": 85}),
    "tall_444.jpg": (201, 303, "RGB", {"quality": 90, "subsampling": 0}),
    "grey.jpg": (331, 260, "L", {"quality": 85}),
    "small.png": (120, 97, "RGB", {}),
    "transparent.png": (64, 150, "RGBA", {}),
    "lossy.webp": (341, 257, "RGB", {"quality": 80}),
    "tiny.bmp": (32, 32, "RGB", {}),
}
SIZES = (20, 48, 224)
JPEGS = {
    "subsampled": ("RGB", {"quality": 75}),
    "full_colour": ("RGB", {"quality": 95, "subsampling": 0}),
    "coarse": ("RGB", {"quality": 30}),
    "progressive": ("RGB", {"quality": 85, "progressive": True}),
    "grey": ("L", {"quality": 75}),
}


def make():
    folder = fixture_file.REPOSITORY / "experiments/predict/tests/pictures"
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(SEED)
    imagenet = models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    cifar = transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()])
    tensors = {}
    for name, (width, height, mode, options) in PICTURES.items():
        encoded = io.BytesIO()
        draw(random, width, height, mode).save(encoded, format={"jpg": "JPEG"}.get(name[-3:], name.split(".")[1]), **options)
        (folder / name).write_bytes(encoded.getvalue())
        picture = Image.open(encoded).convert("RGB")
        tensors[f"{name}.imagenet"] = imagenet(picture)[:, 7::14, 7::14]
        tensors[f"{name}.cifar"] = cifar(picture)
    images = torch.from_numpy(random.uniform(-1, 1, (2, 3, 32, 32)).astype("float32"))
    tensors["resize.images"] = images
    for size in SIZES:
        resized = F.interpolate(images.double(), (size, size), mode="bilinear", align_corners=False, antialias=True)
        tensors[f"resize.{size}"] = resized[:, :, :: size // 16, :: size // 16].float()
    path = "experiments/predict/tests/fixtures/preprocessing.safetensors"
    fixture_file.write(path, tensors, "preprocessing.py", SEED, pictures=list(PICTURES))
    make_jpegs(random)


def make_jpegs(random):
    tensors = {}
    for name, (mode, options) in JPEGS.items():
        encoded = io.BytesIO()
        draw(random, 32, 32, mode).save(encoded, format="JPEG", **options)
        tensors[f"{name}.file"] = torch.tensor(list(encoded.getvalue()), dtype=torch.uint8)
        pixels = numpy.array(Image.open(encoded).convert("RGB"))
        tensors[f"{name}.pixels"] = torch.from_numpy(pixels).permute(2, 0, 1)
    metadata = {"pillow": PIL.__version__, "pictures": list(JPEGS)}
    fixture_file.write("crates/cifar-data/tests/fixtures/jpeg.safetensors", tensors, "preprocessing.py", SEED, **metadata)


def draw(random, width, height, mode):
    channels = len(mode)
    fy, fx = numpy.fft.fftfreq(height)[:, None], numpy.fft.rfftfreq(width)[None]
    amplitude = 1 / numpy.maximum(numpy.hypot(fx, fy), 1 / max(width, height)) ** 1.3
    shared = random.normal(size=(height, width))
    planes = []
    for _ in range(channels):
        noise = 0.8 * shared + 0.6 * random.normal(size=(height, width))
        plane = numpy.fft.irfft2(numpy.fft.rfft2(noise) * amplitude, (height, width))
        planes.append(128 + 60 * (plane - plane.mean()) / plane.std())
    pixels = numpy.stack(planes, -1)
    # A saturated rectangle and a disc: edges, where filters and decoders differ most.
    y, x = numpy.mgrid[:height, :width]
    pixels[height // 8 : height // 3, width // 5 : width // 2] = numpy.resize([255, 0, 20, 200], channels)
    disc = numpy.hypot(x - 0.65 * width, y - 0.6 * height) < min(width, height) / 5
    pixels[disc] = numpy.resize([10, 90, 255, 128], channels)
    pixels = pixels.clip(0, 255).round().astype("uint8")
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
