"""CIFAR-10 from the Hub's parquet files, as the training scripts here want it."""

import io
import pathlib

import numpy
import PIL.Image
import pyarrow.parquet
import torch


def load(folder, split, limit=None):
    """Pictures (N, 3, 32, 32) as u8 and labels (N), the first `limit` of `train` or `test`."""
    # The Hub has used both layouts.
    text = pathlib.Path(folder) / "plain_text"
    files = sorted([*text.glob(f"{split}-*.parquet"), *text.glob(f"{split}/*.parquet")])
    if not files:
        raise SystemExit(f"no parquet files of {split} in {text}")
    table = pyarrow.parquet.read_table(files).slice(0, limit)
    pictures = [
        numpy.asarray(PIL.Image.open(io.BytesIO(picture["bytes"])).convert("RGB"))
        for picture in table["img"].to_pylist()
    ]
    labels = torch.tensor(table["label"].to_pylist())
    return torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels


def normalise(pictures):
    """To -1 ... 1."""
    return pictures.float().div_(127.5).sub_(1)
