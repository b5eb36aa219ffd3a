"""Clips of 720x1280 frames with spikes at the loader, no model: samples/s and memory by cache, against PyTorch's DataLoader.

    scripts/bench clips [--repeats 3] [--quick] [--json FILE]

Three ranks of four threads, clips of 5 frames, crops of 256. Headroom: no cache, `lru`, `pin` and `next_use` at 17 % of the
compact data, all of it. PyTorch: 3 ranks x 4 worker processes, each with an LRU cache of f32 tensors as the guide has it,
17 % of the data as tensors each (less where the machine has not the memory: said). "with voxels": both sides deliver
the f32 frames and voxels that a model takes. Bytes per frame, steady hit rate, and the guide's 2,222 frames walked
through the directory with 50 GB. A figure past its limit ends the bench with 1.
"""

import argparse
import json
import sys

from common import PYTHON, REFERENCE, ROOT, Job, median, table
from loader import built

RANKS, THREADS, CROP, CLIP = 3, 4, 256, 5
# Bytes of a 720x1280 frame as the guide holds it: two f32 images and 32 f32 voxel planes.
TENSOR_BYTES = 2 * 720 * 1280 * 3 * 4 + 32 * 720 * 1280 * 4
GUIDE_FRAMES, GUIDE_BYTES = 2222, 50_000_000_000
CASES = [
    ("no cache", {"cache_share": 0}),
    ("lru, 17 %", {"cache_share": 0.17, "policy": "lru"}),
    ("pin, 17 %", {"cache_share": 0.17, "policy": "pin"}),
    ("next_use, 17 %", {"cache_share": 0.17, "policy": "next_use"}),
    ("compact, whole", {"cache_share": 1.05}),
]


def words(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def ours(bench, data, **options):
    """One run: its line of JSON, and the peak memory of its processes."""
    job = Job([bench, "--data", str(data), "--ranks", str(RANKS), "--threads", str(THREADS), "--clip", str(CLIP),
               "--crop", str(CROP), *words(options)])
    line = json.loads(job.wait().splitlines()[-1])
    return line, job.peak_bytes


def theirs(data, cache_bytes, epochs, workers):
    job = {"data": str(data), "ranks": RANKS, "workers": workers, "cache_bytes": cache_bytes, "epochs": epochs,
           "clip": CLIP, "crop": CROP}
    run = Job([PYTHON, REFERENCE / "clips_torch.py", json.dumps(job)])
    return json.loads(run.wait().splitlines()[-1])["samples_per_s"], run.peak_bytes


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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer epochs")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    repeats, epochs = (1, 3) if args.quick else (args.repeats, 5)
    bench = built("clips")
    data = ROOT / "sample-data" / "bench-clips"
    if not data.exists():
        print("making frames of 720x1280 (once)", file=sys.stderr)
        Job([bench, "--make", str(data)]).wait()

    found = {name: [] for name, _ in CASES}
    with_voxels, torch_runs = [], []
    frames = ours(bench, data, epochs=0)[0]["frames"]
    wanted = int(0.17 * frames * TENSOR_BYTES)
    share = 4 if args.quick else 2
    cache_bytes = min(wanted, available_bytes() // share // (RANKS * THREADS))
    for _ in range(repeats):
        for name, options in CASES:
            few = 2 if name == "no cache" else epochs
            found[name].append(ours(bench, data, epochs=few, **options))
        with_voxels.append(ours(bench, data, epochs=epochs, cache_share=1.05, voxels=1))
        torch_runs.append(theirs(data, cache_bytes, 2, THREADS))
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
    torch_rate = median(median(rates[1:]) for rates, _ in torch_runs)
    torch_peak = median(peak for _, peak in torch_runs)
    rows.append([f"PyTorch, with voxels, LRU {mb(cache_bytes)} per worker", f"{median(r[0] for r, _ in torch_runs):,.1f}",
                 f"{torch_rate:,.1f}", "", "", mb(torch_peak)])
    table(["samples/s", "first epoch", "later", "hits", "files per clip", "peak memory"], rows)
    if cache_bytes < wanted:
        print(f"(PyTorch's caches: {mb(cache_bytes)} per worker for want of memory; 17 % would be {mb(wanted)}, "
              f"{mb(wanted * RANKS * THREADS)} in all)")
    whole = median(steady(line)[1] for line, _ in found["compact, whole"])
    if whole < 1:
        failed.append(f"all compact data cached, and a hit rate of {whole:.4f}")
    ratios = [steady(line)[0] / median(rates[1:]) for (line, _), (rates, _) in zip(with_voxels, torch_runs)]
    print(f"once warm, voxels on both sides: {median(ratios):.1f} times PyTorch (goal: 5), with "
          f"{median(p for _, p in with_voxels) / torch_peak:.2f} of its memory")
    if median(ratios) < 5:
        failed.append(f"{median(ratios):.1f} times PyTorch once warm: expected 5")

    print(f"\n{GUIDE_FRAMES:,} frames of 720x1280 through the directory, simulated, hits from the second epoch on:")
    rows, simulated = [], {}
    total = GUIDE_FRAMES * frame_bytes
    for name, capacity, policy in [("50 GB, pin", GUIDE_BYTES, "pin")] + [
        (f"17 % of the compact bytes, {policy}", int(0.17 * total), policy) for policy in ("lru", "pin", "next_use")
    ]:
        simulated[name] = simulate(bench, frame_bytes, capacity, policy)
        rows.append([name, mb(simulated[name]["used_bytes"]), f"{100 * simulated[name]['hit_rate']:.1f} %"])
    table(["cache", "used", "hits"], rows)
    print(f"(the whole set: {total / 1e9:.1f} GB compact, {GUIDE_FRAMES * TENSOR_BYTES / 1e9:.1f} GB as tensors)")
    if simulated["50 GB, pin"]["hit_rate"] < 1:
        failed.append("2,222 frames in 50 GB miss")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"frame_bytes": frame_bytes, "headroom": found, "with_voxels": with_voxels, "pytorch": torch_runs,
                       "cache_bytes_per_worker": cache_bytes, "simulated": simulated}, file, indent=1)
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
