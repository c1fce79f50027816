"""Time and memory of reading a file of weights, ours beside `torch.load`.

`python time_load.py PROGRAM FILE [ROUNDS]`, where PROGRAM is the built
`examples/load` of pretrained-import. The sides alternate, each in a process of
its own that has read the file into the cache of the system before.
"""

import json
import statistics
import subprocess
import sys

TORCH = """
import json, resource, sys, time
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.perf_counter()
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "tensors": len(state), "peak_mib": peak, "added_mib": peak - before}))
"""

program, path = sys.argv[1:3]
rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 9
sides = {"ours": [program, path], "torch.load": [sys.executable, "-c", TORCH, path]}
results = {side: [] for side in sides}
for side in sides:
    subprocess.run(sides[side], check=True, capture_output=True)
for _ in range(rounds):
    for side, command in sides.items():
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[side].append(json.loads(output))

print(f"| {path.rsplit('/', 1)[-1]}, median of {rounds} | read, ms (least to most) | process, peak MiB | added by reading, MiB |")
print("| --- | ---: | ---: | ---: |")
for side, runs in results.items():
    milliseconds = [1000 * run["seconds"] for run in runs]
    peak = statistics.median(run["peak_mib"] for run in runs)
    added = statistics.median(run["added_mib"] for run in runs)
    print(f"| {side} | {statistics.median(milliseconds):.0f} ({min(milliseconds):.0f} to {max(milliseconds):.0f}) | {peak:.0f} | {added:.0f} |")
ratios = [a["seconds"] / b["seconds"] for a, b in zip(results["ours"], results["torch.load"])]
print(f"\nours ÷ torch.load: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
