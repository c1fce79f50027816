"""Both transfer stages, ours beside PyTorch's, alternating: accuracy, images a second, memory.

    python compare_finetune.py --programs target/debug --data-dir DIR --out FOLDER [--rounds N] [--weights FILE|random]
        [--train-limit N] [--test-limit N]

Every run is a process of its own, and each round has a seed of its own. Writes
`rounds.json` and the table as `table.md`.
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

parser = argparse.ArgumentParser()
parser.add_argument("--programs", required=True, type=pathlib.Path)
parser.add_argument("--data-dir", required=True)
parser.add_argument("--out", required=True, type=pathlib.Path)
parser.add_argument("--weights", default="random")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--train-limit", default="5000")
parser.add_argument("--test-limit", default="1000")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True)
script = pathlib.Path(__file__).with_name("finetune.py")


def waited(command):
    """Runs a command; its output and the most memory it held, in MiB."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return output, usage.ru_maxrss / 1024


def ours(stage, source, seed, folder):
    limits = ["--train-limit", arguments.train_limit, "--test-limit", arguments.test_limit]
    command = [arguments.programs / f"finetune-{stage}", "--data-dir", arguments.data_dir, "--eval-every", "0", *source]
    command += ["--seed", str(seed), "--out", folder, "--checkpoint-every", "0", "--threads", "2", *limits]
    _, peak = waited(command)
    run = max(folder.glob(f"finetune-{stage}/*"))
    test = json.loads((run / "finished.json").read_text())["evaluations"]["test"]
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = sum(float(row["train_seconds"]) for row in rows)
    return run, {
        "accuracy": test["correct"] / test["images"],
        "train_images_per_second": len(rows) * int(arguments.train_limit) / seconds,
        "test_images_per_second": test["images"] / float(rows[-1]["evaluation_seconds"]),
        "peak_mib": peak,
    }


def pytorch(stage, source, seed, layout):
    command = [sys.executable, script, stage, "--data-dir", arguments.data_dir, *source, "--seed", str(seed), *layout]
    command += ["--train-limit", arguments.train_limit, "--test-limit", arguments.test_limit]
    output, _ = waited(command)
    return json.loads(output)


rounds = []
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    weights = ["--weights", arguments.weights]
    for seed in range(arguments.rounds):
        entry = {}
        run, entry["full, ours"] = ours("full", weights, seed, folder)
        state = folder / "state.pth"
        entry["full, PyTorch nchw"] = pytorch("full", [*weights, "--save", state], seed, [])
        entry["full, PyTorch channels_last"] = pytorch("full", weights, seed, ["--channels-last"])
        _, entry["frozen, ours"] = ours("frozen", ["--init", run], seed, folder)
        entry["frozen, PyTorch nchw"] = pytorch("frozen", ["--init", state], seed, [])
        entry["frozen, PyTorch channels_last"] = pytorch("frozen", ["--init", state], seed, ["--channels-last"])
        rounds.append(entry)
        (arguments.out / "rounds.json").write_text(json.dumps(rounds, indent=1) + "\n")
        print(f"round {seed + 1} of {arguments.rounds}", file=sys.stderr)

lines = [
    "| stage and side | test accuracy by seed | train images/s | test images/s | our training time ÷ its (least to most) | peak MiB |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
]
for side in rounds[0]:
    of = [entry[side] for entry in rounds]
    median = {key: statistics.median(run[key] for run in of) for key in of[0] if key not in ("accuracy", "torch")}
    accuracy = ", ".join(f"{100 * run['accuracy']:.1f} %" for run in of)
    ratio = ""
    if "PyTorch" in side:
        mine = side.split(",")[0] + ", ours"
        ratios = [e[side]["train_images_per_second"] / e[mine]["train_images_per_second"] for e in rounds]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    lines.append(
        f"| {side} | {accuracy} | {median['train_images_per_second']:.0f} | {median['test_images_per_second']:.0f}"
        f" | {ratio} | {median['peak_mib']:.0f} |"
    )
table = "\n".join(lines) + "\n"
(arguments.out / "table.md").write_text(table)
print(table)
