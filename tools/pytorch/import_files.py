"""Small files as `torch.save` writes them, for crates/pretrained-import.

`expected.safetensors` holds what every `.pth` beside it must give: contiguous,
integers below 64 bits as i64, bool as u8.

    legacy.pth, zip.pth        the tensors below as a plain dictionary
    protocol4.pth              the zip format with a newer pickle protocol
    without_checksums.pth      the same under `torch.serialization.set_crc32_options(False)`
    state_dict_legacy.pth      with each tensor as a parameter, `module.` in front and `_metadata`,
    wrapped_zip.pth            the same without prefix in {"state_dict": ..., "epoch": 3, ...}
    wrapped_legacy.pth         the same in {"model": ...}
    trainer_zip.pth            the same in {"net": ...}, each parameter with an attribute, beside a scheduler's Counter,
    trainer_protocol4.pth      a set, bytes, an element type and a complex number, as `weights_only=True` takes them
    averaged.pth               of an AveragedModel of a compiled network: `n_averaged` and `module._orig_mod.`
    compiled.pth               of a compiled DataParallel: `_orig_mod.module.`
    hostile.pth                calls os.system when Python loads it
    torchscript.pth            a program of torch.jit
"""

import collections
import os
import shutil
import tempfile
import zipfile

import torch

import fixture_file

SEED = 11
FOLDER = "crates/pretrained-import/tests/fixtures"


def tensors():
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(3, 4, generator=generator)
    numbers = torch.randint(-100, 100, (5,), generator=generator)
    cube = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return {
        "weight": weight,
        "transposed": weight.t(),
        "row": weight[1],
        "every_other": weight[:, ::2],
        "scalar_in_weight": weight[2, 3],
        "permuted": cube.permute(2, 0, 1),
        "double": cube,
        "half": weight.half(),
        "bfloat16": weight.bfloat16(),
        "counter": torch.tensor(12_345_678_901),
        "int64": numbers,
        "int32": numbers.int(),
        "int16": numbers.short(),
        "int8": numbers.char(),
        "uint8": numbers.abs().byte(),
        "bool": numbers > 0,
        "empty": torch.zeros(0, 3),
        "one": torch.ones(1, 1, 1),
    }


def save_wrapped(save, values, state):
    """What trainers, averages and compilers make of a state dict."""
    marked = collections.OrderedDict(state)
    for value in marked.values():
        if isinstance(value, torch.nn.Parameter):
            value.mark = "kept"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    trainer = {
        "net": marked,
        "acc": 93.5,
        "epoch": 3,
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]).state_dict(),
        "classes": {1, 2},
        "digest": b"\x00\xff",
        "buffer": bytearray(b"ab"),
        "dtype": torch.float32,
        "root": 1j,
    }
    save("trainer_zip.pth", trainer)
    save("trainer_protocol4.pth", trainer, pickle_protocol=4)

    net = torch.nn.Module()
    # Not by `register_buffer`, which refuses names that modules have, such as `half`.
    net._buffers.update(values)
    save("averaged.pth", torch.optim.swa_utils.AveragedModel(torch.compile(net)).state_dict())
    save("compiled.pth", torch.compile(torch.nn.DataParallel(net)).state_dict())


class Hostile:
    def __reduce__(self):
        return (os.system, ("echo this was run",))


def make():
    values = tensors()
    widened = {
        name: value.long() if value.dtype in (torch.int32, torch.int16, torch.int8) else value
        for name, value in values.items()
    }
    expected = {
        # The fixture format has neither bool nor the small floats, which f32 holds exactly.
        name: value.byte() if value.dtype == torch.bool else value.float() if value.element_size() == 2 else value
        for name, value in widened.items()
    }
    fixture_file.write(f"{FOLDER}/expected.safetensors", expected, "import_files.py", SEED)

    folder = fixture_file.REPOSITORY / FOLDER

    def save(name, value, **options):
        torch.save(value, folder / name, **options)
        print(f"{FOLDER}/{name}: {(folder / name).stat().st_size / 1e3:.0f} kB")

    legacy = {"_use_new_zipfile_serialization": False}
    state = collections.OrderedDict()
    for name, value in values.items():
        is_float = value.is_floating_point()
        state[name] = torch.nn.Parameter(value) if is_float else value
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    prefixed = collections.OrderedDict((f"module.{name}", value) for name, value in state.items())
    prefixed._metadata = state._metadata
    extra = {
        "epoch": 3,
        "lr": 0.1,
        "best": torch.tensor(75.67),
        "scheduler": None,
        "name": "net",
        "done": True,
        "history": [1, 2.5],
        "shape": values["weight"].shape,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    save("legacy.pth", values, **legacy)
    save("zip.pth", values)
    save("protocol4.pth", values, pickle_protocol=4)
    torch.serialization.set_crc32_options(False)
    save("without_checksums.pth", values)
    torch.serialization.set_crc32_options(True)
    save("state_dict_legacy.pth", prefixed, **legacy)
    save("wrapped_zip.pth", {"state_dict": state} | extra)
    save("wrapped_legacy.pth", extra | {"model": state}, **legacy)
    save_wrapped(save, values, state)
    save("hostile.pth", {"weight": values["weight"], "surprise": Hostile()}, **legacy)

    module = torch.jit.script(torch.nn.Linear(2, 2))
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "torchscript.pth")
        module.save(path)
        # Without what the program was compiled from, to keep it small.
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(folder / "torchscript.pth", "w") as target:
            for entry in source.infolist():
                if not entry.filename.endswith(".debug_pkl"):
                    target.writestr(entry.filename, source.read(entry.filename))
    shutil.copymode(folder / "zip.pth", folder / "torchscript.pth")
