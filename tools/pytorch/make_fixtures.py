"""Regenerates the committed fixtures and `fixtures.sha256`: `python make_fixtures.py [ops] [sgd] [lesson_parity] [googlenet_parity] [preprocessing] [import_files]`."""

import sys

import torch

import fixture_file
import googlenet_parity
import import_files
import lesson_parity
import ops
import preprocessing
import sgd

# One thread and fixed algorithms: sums are taken in the same order every time.
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

scripts = {script.__name__: script for script in (ops, sgd, lesson_parity, googlenet_parity, preprocessing, import_files)}
for name in sys.argv[1:] or scripts:
    scripts[name].make()

fixture_file.write_manifest()
