"""Training at 3 CPU ranks: samples/s, memory of the whole job and time to the first step, against DDP + gloo + DataLoader."""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

from common import REFERENCE, RELEASE, ROOT, TORCHRUN, Job, median, sample_data, table

RANKS = 3
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# Label, key of a run, least or most that the ratio to PyTorch should be per layout.
FIGURES = [
    ("samples/s", "samples_per_s", {"contiguous": 1.05, "gzip": 1.25}, "at least"),
    ("peak PSS of the job, MB", "peak_mb", {"contiguous": 0.5, "gzip": 0.35}, "at most"),
    ("first step after, s", "first_step_s", {}, ""),
]


def figures(job, ends, losses, samples, args):
    """`ends`, `losses`: by step; both sides look at the same steps, the first `args.every` of which warm up."""
    steady = samples * (args.steps - args.every) / args.steps
    return {"samples_per_s": steady / (ends[args.steps] - ends[args.every]), "first_step_s": ends[1] - job.started,
            "peak_mb": job.peak_bytes / 1e6, "loss": losses[args.steps], "samples": samples}


def headroom(data, args, work, run):
    sets = {
        "data.dataset_path": data, "data.stride": args.stride, "data.window_size": 500, "data.split_ratio": "[0.8,0.1,0.1]",
        "train.batch_size": args.batch, "train.max_steps": args.steps, "train.num_epochs": 100000, "log.runs_dir": work,
        "train.scheduler": "none", "train.warmup_epochs": 0, "log.log_every": 1, "log.save_every": 0,
        "log.plots": "false", "train.restore_best_weights": "false", "train.num_workers": args.threads,
        # Little validation: PyTorch has none.
        "data.max_val_windows": args.batch * RANKS,
    }
    command = [RELEASE / "launch", "--ranks", str(RANKS), "--device", "cpu", "--config", ROOT / "configs/default.yaml",
               "--name", run]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    job = Job(command, cwd=work, env=ONE_THREAD)
    out = job.wait()
    records = [json.loads(line) for line in (Path(work) / run / "metrics.jsonl").read_text().splitlines()]
    ends, losses = ({r["step"]: r[key] for r in records} for key in ("t", "loss"))
    windows, files = map(int, re.search(r"train: (\d+) windows.* of (\d+) files", out).groups())
    samples = len(records) * args.batch * RANKS
    return {**figures(job, ends, losses, samples, args), "windows": windows, "files": files}


def pytorch(data, args, work, files):
    job = Job([*TORCHRUN, "--standalone", "--nproc-per-node", str(RANKS), REFERENCE / "train_torch.py", "--data", data,
               "--files", str(files), "--batch", str(args.batch), "--stride", str(args.stride),
               "--steps", str(args.steps), "--every", str(args.every)], cwd=work, env=ONE_THREAD)
    result = json.loads(job.wait().strip().splitlines()[-1])
    ends, losses = ({int(step): value for step, value in result[key].items()} for key in ("ends", "losses"))
    return {**figures(job, ends, losses, result["samples"], args), "windows": result["windows"], "files": files}


def compare(layout, args, work):
    """Runs of both, in turn."""
    data = sample_data(ROOT / "sample-data" / f"bench-{layout}", layout)
    runs = {"headroom": [], "pytorch": []}
    for number in range(args.repeats):
        runs["headroom"].append(headroom(data, args, work, f"bench-{layout}-{number}"))
        runs["pytorch"].append(pytorch(data, args, work, runs["headroom"][-1]["files"]))
        ours, theirs = runs["headroom"][-1], runs["pytorch"][-1]
        assert ours["samples"] == theirs["samples"], (ours, theirs)
        print(f"  {layout} {number}: " + "; ".join(
            f"{name} {r['samples_per_s']:.0f}/s, {r['peak_mb']:.0f} MB, first step {r['first_step_s']:.2f} s, loss {r['loss']:.4f}"
            for name, r in (("Headroom", ours), ("PyTorch", theirs))), flush=True)
    return runs


def show(layout, runs, mid, args):
    ours, theirs = mid["headroom"], mid["pytorch"]
    of = runs["headroom"][0]
    print(f"\n{layout}: {RANKS} ranks, batch {args.batch} each, {args.steps} steps, medians of {args.repeats}; "
          f"{of['windows']} windows of {of['files']} files (PyTorch: {runs['pytorch'][0]['windows']})")
    rows = []
    for label, key, goals, sense in FIGURES:
        ratio, goal = ours[key] / theirs[key], goals.get(layout)
        rows.append([label, f"{ours[key]:.1f}", f"{theirs[key]:.1f}", f"{ratio:.2f}", f"{sense} {goal}" if goal else ""])
    rows.append(["loss at the last step", f"{ours['loss']:.4f}", f"{theirs['loss']:.4f}", f"{ours['loss'] / theirs['loss']:.2f}", ""])
    table(["", "Headroom", "PyTorch", "ratio", "goal"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="steps of warm-up")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stride", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="Headroom's loader threads per rank")
    parser.add_argument("--layouts", default="contiguous,gzip")
    parser.add_argument("--quick", action="store_true", help="one short run of each: does it work at all")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.steps = 1, 10
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for layout in args.layouts.split(","):
            runs = compare(layout, args, work)
            keys = [key for _, key, _, _ in FIGURES] + ["loss"]
            mid = {name: {key: median([r[key] for r in of]) for key in keys} for name, of in runs.items()}
            found[layout] = {"runs": runs, "median": mid}
            show(layout, runs, mid, args)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
