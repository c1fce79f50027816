"""Writing fixture files: safetensors whose bytes depend on their content alone.

The safetensors package writes metadata in an order that changes from run to
run, so the (simple) format is written here, with sorted metadata, and every
file is read back through the package before it counts as written.
"""

import hashlib
import json
import pathlib

import safetensors.torch
import torch

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}


def write(path, tensors, script, seed, **metadata):
    """Writes `tensors` to `path` (relative to the repository).

    Metadata values that are no strings are stored as JSON.
    """
    metadata = {"script": f"tools/pytorch/{script}", "torch": torch.__version__.split("+")[0], "seed": seed} | metadata
    text = {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in metadata.items()}
    header, data = {"__metadata__": dict(sorted(text.items()))}, bytearray()
    # Widest type first keeps every tensor aligned to its own size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        raw = tensor.detach().contiguous().numpy().tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    target = REPOSITORY / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(len(head).to_bytes(8, "little") + head + data)

    read = safetensors.torch.load_file(target)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name].nan_to_num(), tensor.detach().nan_to_num()), name
    print(f"{path}: {len(tensors)} tensors, {target.stat().st_size / 1e3:.0f} kB")


def write_manifest():
    """SHA-256 of every fixture that a script of this folder made, in the format of `sha256sum --check`."""
    lines = []
    for path in sorted(REPOSITORY.glob("*/*/tests/fixtures/*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("script", "").startswith("tools/pytorch/"):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lines.append(f"{digest}  {path.relative_to(REPOSITORY).as_posix()}\n")
    (REPOSITORY / "tools/pytorch/fixtures.sha256").write_text("".join(lines))
