"""Training at 3 CPU ranks: samples/s, memory of the whole job and time to the first step, against DDP + gloo + DataLoader."""

import argparse
import json
import tempfile
import time
from pathlib import Path

from common import REFERENCE, RELEASE, ROOT, TORCHRUN, Job, median, sample_data, table


def headroom(data, args, work, number):
    run = f"bench-{number}"
    sets = {
        "data.dataset_path": data, "data.stride": args.stride, "data.window_size": 500, "data.split_ratio": "[0.8,0.1,0.1]",
        "train.batch_size": args.batch, "train.max_steps": args.steps, "train.num_epochs": 100000, "log.runs_dir": work,
        "train.scheduler": "none", "train.warmup_epochs": 0, "log.log_every": 1, "log.save_every": 0, "log.plots": "false",
        "data.max_val_windows": args.batch * 3, "train.num_workers": args.threads,
    }
    command = [RELEASE / "launch", "--ranks", "3", "--device", "cpu", "--config", ROOT / "configs/default.yaml", "--name", run]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    job = Job(command, cwd=work)
    job.wait()
    folder = Path(work) / run
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    memory = [json.loads(line) for line in (folder / "memory.rank0.jsonl").read_text().splitlines()]
    steady = [r["step_s"] for r in records if args.warmup < r["step"] <= args.steps]
    first = next((m["t"] for m in memory if m["phase"] == "first step"), float("nan"))
    return {"samples_per_s": args.batch * 3 * len(steady) / sum(steady), "first_step_s": first - job.started,
            "peak_mb": job.peak_bytes / 1e6}


def pytorch(data, args, work, number):
    job = Job([*TORCHRUN, "--standalone", "--nproc-per-node", "3", REFERENCE / "train_torch.py", "--data", data,
               "--batch", str(args.batch), "--stride", str(args.stride), "--steps", str(args.steps),
               "--warmup", str(args.warmup), "--started", str(time.time())], cwd=work)
    result = json.loads(job.wait().strip().splitlines()[-1])
    return {**result, "peak_mb": job.peak_bytes / 1e6}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stride", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1, help="Headroom's loader threads per rank")
    parser.add_argument("--layouts", default="contiguous,gzip")
    parser.add_argument("--json")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as work:
        for layout in args.layouts.split(","):
            data = sample_data(ROOT / "sample-data" / f"bench-{layout}", layout)
            runs = {"headroom": [], "pytorch": []}
            for number in range(args.repeats):
                for name, run in (("pytorch", pytorch), ("headroom", headroom)):
                    runs[name].append(run(data, args, work, f"{layout}-{number}"))
            mid = {name: {key: median([r[key] for r in of]) for key in ("samples_per_s", "peak_mb", "first_step_s")}
                   for name, of in runs.items()}
            figures[layout] = {"runs": runs, "median": mid}
            print(f"\n{layout}: 3 ranks, batch {args.batch} each, medians of {args.repeats}")
            rows = [[label, f"{mid['headroom'][key]:.1f}", f"{mid['pytorch'][key]:.1f}",
                     f"{mid['headroom'][key] / mid['pytorch'][key]:.2f}"]
                    for label, key in (("samples/s", "samples_per_s"), ("peak PSS of the job, MB", "peak_mb"),
                                       ("first step after, s", "first_step_s"))]
            table(["", "Headroom", "PyTorch", "ratio"], rows)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
