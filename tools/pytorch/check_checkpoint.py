"""Does PyTorch take a checkpoint written in Rust? `python check_checkpoint.py FILE.safetensors`

Loads it into the lesson's net with `load_state_dict(strict=True)` and runs it once.
"""

import sys

import safetensors.torch
import torch

import seeded_weights as seeded
from lesson_googlenet import LessonGoogLeNet


def main(path):
    model = LessonGoogLeNet().eval()
    try:
        model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    except Exception as error:
        sys.exit(f"{path}: not a checkpoint of the lesson's net: {str(error)[:1000]}")
    with torch.no_grad():
        logits = model(seeded.images("input", 2))
    if not logits.isfinite().all():
        sys.exit(f"{path}: loads, but its logits are not finite")
    tensors = model.state_dict()
    print(f"{path}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values())} parameters, loaded strictly")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
