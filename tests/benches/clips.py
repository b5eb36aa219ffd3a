"""Clips of 720x1280 frames with spikes at the loader, no model: samples/s and memory by cache, against PyTorch's DataLoader.

    scripts/bench clips [--repeats 5] [--quick] [--json FILE]

Three ranks of four threads, clips of 5 frames, crops of 256. Headroom: no cache, `lru`, `pin` and `next_use` at 17 % of the
compact data, all of it. PyTorch: 3 ranks x 4 worker processes, each with an LRU cache of f32 tensors as the guide has it,
17 % of the data as tensors each (less where the machine has not the memory: said). "with voxels": both sides deliver
the f32 frames and voxels that a model takes. PyTorch's job is started and its caches are filled once; in each repeat it
delivers some clips while Headroom rests, and Headroom each case while it rests. Bytes per frame, steady hit rate, and the
guide's 2,222 frames walked through the directory with 50 GB. A figure past its limit ends the bench with 1.
"""

import argparse
import json
import subprocess
import sys
import time

from common import PYTHON, REFERENCE, ROOT, Job, median, say, table
from loader import built

RANKS, THREADS, CROP, CLIP = 3, 4, 256, 5
# Bytes of a 720x1280 frame as the guide holds it: two f32 images and 32 f32 voxel planes.
TENSOR_BYTES = 2 * 720 * 1280 * 3 * 4 + 32 * 720 * 1280 * 4
GUIDE_FRAMES, GUIDE_BYTES = 2222, 50_000_000_000
CASES = [
    ("no cache", {"cache_share": 0, "epochs": 2}),
    ("lru, 17 %", {"cache_share": 0.17, "policy": "lru", "epochs": 3}),
    ("pin, 17 %", {"cache_share": 0.17, "policy": "pin", "epochs": 3}),
    ("next_use, 17 %", {"cache_share": 0.17, "policy": "next_use", "epochs": 3}),
    ("compact, whole", {"cache_share": 1.05, "epochs": 9}),
]
WITH_VOXELS = {"cache_share": 1.05, "epochs": 5, "voxels": 1}
# Clips that each PyTorch worker delivers in a repeat.
TORCH_CLIPS = 2


def words(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def ours(bench, data, **options):
    """One run: its line of JSON, and the peak memory of its processes."""
    job = Job([bench, "--data", str(data), "--ranks", str(RANKS), "--threads", str(THREADS), "--clip", str(CLIP),
               "--crop", str(CROP), *words(options)])
    line = json.loads(job.wait().splitlines()[-1])
    return line, job.peak_bytes


class Torch:
    """PyTorch's job. It rests, and is not looked at, but while it is asked for clips."""

    def __init__(self, data, cache_bytes):
        job = {"data": str(data), "ranks": RANKS, "workers": THREADS, "cache_bytes": cache_bytes, "clip": CLIP, "crop": CROP}
        self.job = Job([PYTHON, REFERENCE / "clips_torch.py", json.dumps(job)], stdin=subprocess.PIPE)

    def ask(self, clips_per_worker):
        self.job.watched = True
        self.job.process.stdin.write(f"{clips_per_worker * THREADS}\n")
        self.job.process.stdin.flush()
        line = self.job.process.stdout.readline()
        self.job.watched = False
        return json.loads(line) if line else sys.exit(self.job.wait())

    def close(self):
        self.job.process.stdin.write("0\n")
        self.job.wait()
        return self.job.peak_bytes


def simulate(bench, frame_bytes, capacity, policy):
    options = {"simulate": GUIDE_FRAMES, "frame_bytes": frame_bytes, "capacity_bytes": capacity, "policy": policy}
    return json.loads(Job([bench, *words(options)]).wait().splitlines()[-1])


def steady(line):
    """Samples/s, hit rate and files decoded per clip of the epochs after the first."""
    later = line["epochs"][1:]
    hits, others = (sum(epoch[name] for epoch in later) for name in ("hits", "others"))
    samples = sum(epoch["samples"] for epoch in later)
    rate = hits / (hits + others) if hits + others else 0.0
    return median(epoch["samples_per_s"] for epoch in later), rate, sum(e["decoded"] for e in later) / samples


def available_bytes():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    bench = built("clips")
    data = ROOT / "sample-data" / "bench-clips"
    if not data.exists():
        print("making frames of 720x1280 (once)", file=sys.stderr)
        Job([bench, "--make", str(data)]).wait()

    started = time.time()
    found = {name: [] for name, _ in CASES}
    with_voxels, torch_runs = [], []
    frames = ours(bench, data, epochs=0)[0]["frames"]
    wanted = int(0.17 * frames * TENSOR_BYTES)
    cache_bytes = min(wanted, available_bytes() // 2 // (RANKS * THREADS))
    torch = Torch(data, cache_bytes)
    # Every worker's cache is full after as many frames as it holds; clips share some.
    first_torch = torch.ask(cache_bytes // (CLIP * TENSOR_BYTES) + 2)
    for _ in range(repeats):
        for name, options in CASES:
            say(f"{name}, run {len(found[name]) + 1} of {repeats}")
            found[name].append(ours(bench, data, **options))
        with_voxels.append(ours(bench, data, **WITH_VOXELS))
        say(f"PyTorch, run {len(torch_runs) + 1} of {repeats}")
        torch_runs.append(torch.ask(TORCH_CLIPS))
    torch_peak = torch.close()
    line = found["compact, whole"][0][0]
    frame_bytes, failed = line["frame_bytes"], []
    mb = lambda value: f"{value / 1e6:,.1f} MB"
    print(f"one frame: {mb(TENSOR_BYTES)} as the guide's tensors, {mb(frame_bytes)} as entries, "
          f"{TENSOR_BYTES / frame_bytes:.1f} times less; {frames} frames here: {mb(line['entry_bytes'])}")
    if frame_bytes > TENSOR_BYTES / 15:
        failed.append(f"a frame takes {frame_bytes} bytes, more than 1/15 of {TENSOR_BYTES}")
    rows = []
    for name, runs in [*found.items(), ("compact, whole, with voxels", with_voxels)]:
        rates, hits, decoded = zip(*(steady(line) for line, _ in runs))
        first = median(line["epochs"][0]["samples_per_s"] for line, _ in runs)
        peak = median(peak for _, peak in runs)
        rows.append([name, f"{first:,.1f}", f"{median(rates):,.1f}", f"{100 * median(hits):.1f} %",
                     f"{median(decoded):.1f}", mb(peak)])
    torch_rate = median(run["samples_per_s"] for run in torch_runs)
    torch_hits = sum(run["hits"] for run in torch_runs) / sum(run["lookups"] for run in torch_runs)
    rows.append([f"PyTorch, with voxels, LRU {mb(cache_bytes)} per worker", f"{first_torch['samples_per_s']:,.1f}",
                 f"{torch_rate:,.1f}", f"{100 * torch_hits:.1f} %", f"{3 * CLIP * (1 - torch_hits):.1f}", mb(torch_peak)])
    table(["samples/s", "cold", "warm", "hits", "files per clip", "memory of the job"], rows)
    if cache_bytes < wanted:
        print(f"(PyTorch's caches: {mb(cache_bytes)} per worker for want of memory; 17 % would be {mb(wanted)}, "
              f"{mb(wanted * RANKS * THREADS)} in all)")
    whole = median(steady(line)[1] for line, _ in found["compact, whole"])
    if whole < 1:
        failed.append(f"all compact data cached, and a hit rate of {whole:.4f}")
    ratios = [steady(line)[0] / run["samples_per_s"] for (line, _), run in zip(with_voxels, torch_runs)]
    print(f"(17 % of {frames} frames are {0.17 * frames:.0f}: what ranks hold ahead of need is most of it; the guide's set is below)")
    print(f"once warm, voxels on both sides: {median(ratios):.1f} times PyTorch (goal: 5), with "
          f"{median(p for _, p in with_voxels) / torch_peak:.2f} of its memory")
    if median(ratios) < 5:
        failed.append(f"{median(ratios):.1f} times PyTorch once warm: expected 5")

    print(f"\n{GUIDE_FRAMES:,} frames of 720x1280 through the directory, simulated, hits from the second epoch on:")
    rows, simulated = [], {}
    total = GUIDE_FRAMES * frame_bytes
    for name, capacity, policy in [("50 GB, next_use", GUIDE_BYTES, "next_use")] + [
        (f"17 % of the compact bytes, {policy}", int(0.17 * total), policy) for policy in ("lru", "pin", "next_use")
    ]:
        simulated[name] = simulate(bench, frame_bytes, capacity, policy)
        rows.append([name, mb(simulated[name]["used_bytes"]), f"{100 * simulated[name]['hit_rate']:.1f} %"])
    table(["cache", "used", "hits"], rows)
    print(f"(the whole set: {total / 1e9:.1f} GB compact, {GUIDE_FRAMES * TENSOR_BYTES / 1e9:.1f} GB as tensors)")
    if simulated["50 GB, next_use"]["hit_rate"] < 1:
        failed.append("2,222 frames in 50 GB miss")
    print(f"(medians of {repeats}, interleaved; {time.time() - started:.0f} s in all)")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"frame_bytes": frame_bytes, "headroom": found, "with_voxels": with_voxels, "pytorch": torch_runs,
                       "pytorch_peak_bytes": torch_peak, "cache_bytes_per_worker": cache_bytes, "simulated": simulated},
                      file, indent=1)
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
