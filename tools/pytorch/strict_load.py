"""Whether torchvision takes a file that `pretrained-import` wrote: `python strict_load.py EXPORT.safetensors [ORIGINAL.pth]`.

Loads it with `strict=True`, auxiliary heads or not, and compares every tensor's
bits with the original's, if that is given.
"""

import sys

import safetensors.torch
import torch
import torchvision

export = safetensors.torch.load_file(sys.argv[1])
has_aux = any(name.startswith("aux1.") for name in export)
classes = export["fc.weight"].shape[0]
net = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=has_aux, num_classes=classes)
net.load_state_dict(export, strict=True)
print(f"{sys.argv[1]}: {len(export)} tensors, loaded with strict=True")
if len(sys.argv) > 2:
    original = torch.load(sys.argv[2], weights_only=True)
    if not has_aux:
        original = {name: value for name, value in original.items() if not name.startswith(("aux1.", "aux2."))}
    assert export.keys() == original.keys(), export.keys() ^ original.keys()
    for name, value in original.items():
        assert export[name].dtype == value.dtype and torch.equal(export[name], value), name
    print(f"every tensor has the bits of {sys.argv[2]}")
