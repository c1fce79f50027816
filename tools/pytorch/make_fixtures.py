"""Regenerates every committed fixture and `fixtures.sha256`: `python make_fixtures.py`."""

import hashlib

import torch

import fixture_file
import ops

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

for script in (ops,):
    script.make()

files = sorted(fixture_file.REPOSITORY.glob("crates/*/tests/fixtures/*.safetensors"))
lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(fixture_file.REPOSITORY).as_posix()}\n" for f in files]
(fixture_file.REPOSITORY / "tools/pytorch/fixtures.sha256").write_text("".join(lines))
