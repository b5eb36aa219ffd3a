"""Memory watch on and off in turns: memory flat over 2,000 steps, the same losses to the bit, and what watching costs.

    scripts/bench watch [--pairs 5] [--steps 2000] [--ranks 2] [--config quick_demo]

Each pair is one run with `watch.enabled` and one without, alternately first. Flat: the slope of a rank's USS after step
200, least squares, the steepest of all ranks and runs. Cost, two ways: medians of samples/s and of the whole job's CPU
time, which other programs on the machine disturb; and CPU time of the threads that watch (`memory`, in the launcher and in
each rank; the ranks' threads also write memory.rank<R>.jsonl and run without the watch too) as a share of the job's, which they do not.
Ends with 1 when a slope reaches 10 KiB per step, a loss or checkpoint differs, or the threads take 0.5 % or more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RELEASE, ROOT, median, sample_data, table, tree

MOST_SLOPE = 10 * 1024
MOST_SHARE = 0.005
WARM_STEPS = 200
TICK = os.sysconf("SC_CLK_TCK")


def watching_s(pid):
    """CPU seconds so far of the threads named `memory` in `pid` and its children."""
    total = 0
    for process in tree(pid):
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{thread}/stat") as file:
                    name, rest = file.read().rsplit(")", 1)
                if name.endswith("(memory"):
                    fields = rest.split()
                    total += int(fields[11]) + int(fields[12])
        except OSError:
            pass
    return total / TICK


def command(args, data, work, name, on):
    sets = {
        "data.dataset_path": data, "data.stride": 25, "data.max_val_windows": 32, "train.max_steps": args.steps,
        "train.num_epochs": 1000000, "train.early_stopping": "false", "log.log_every": 1, "log.runs_dir": work,
        "log.plots": "false", "watch.enabled": "true" if on else "false",
    }
    words = [RELEASE / "launch", "--ranks", str(args.ranks), "--device", "cpu", "--config", ROOT / f"configs/{args.config}.yaml", "--name", name]
    for key, value in sets.items():
        words += ["--set", f"{key}={value}"]
    return words


def one(args, data, work, name, on):
    """Runs once; samples/s, CPU seconds of all and of the watching threads."""
    with open(work / f"{name}.log", "w") as log:
        run = subprocess.Popen(command(args, data, work, name, on), stdout=log, stderr=log)
        watching = 0.0
        while True:
            # wait4 of a child counts the grandchildren that it has waited for.
            pid, status, usage = os.wait4(run.pid, os.WNOHANG)
            if pid:
                break
            watching = max(watching, watching_s(run.pid))
            time.sleep(0.5)
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode != 0:
        sys.exit(f"{name} ended with {run.returncode}\n{(work / f'{name}.log').read_text()[-3000:]}")
    summary = json.loads((work / name / "summary.json").read_text())
    return {"speed": summary["samples_per_s"], "cpu_s": usage.ru_utime + usage.ru_stime, "watching_s": watching}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def slope(points):
    n = len(points)
    x, y = sum(p[0] for p in points) / n, sum(p[1] for p in points) / n
    return sum((p[0] - x) * (p[1] - y) for p in points) / sum((p[0] - x) ** 2 for p in points)


def slopes(run, ranks):
    """Bytes per step of each rank's USS after the warm-up."""
    found = []
    for rank in range(ranks):
        records = lines(run / f"memory.rank{rank}.jsonl")
        points = [(r["step"], r["uss_bytes"]) for r in records if r["step"] > WARM_STEPS and r["phase"] == "train"]
        found.append(slope(points))
    return found


def results(run, step):
    """What must not differ: every loss, and the bytes of the last checkpoint's tensors."""
    losses = [(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl")]
    tensors = [(run / f"checkpoints/step-{step}" / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    return losses, tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--config", default="quick_demo")
    args = parser.parse_args()
    data = sample_data(ROOT / "sample-data" / "bench-contiguous-60", "contiguous", 60)
    found, steep, differ = {True: [], False: []}, [], 0
    with tempfile.TemporaryDirectory() as folder:
        work, reference = Path(folder), None
        for pair in range(args.pairs):
            for on in (True, False) if pair % 2 == 0 else (False, True):
                name = f"{'on' if on else 'off'}{pair}"
                found[on].append(one(args, data, work, name, on))
                steep += slopes(work / name, args.ranks)
                result = results(work / name, args.steps)
                reference = reference or result
                differ += result != reference
                print(f"  {name}: {found[on][-1]['speed']:.0f} samples/s, steepest so far {max(steep):.0f} bytes per step", flush=True)
    of = lambda on, key: median([run[key] for run in found[on]])
    change = lambda key: f"{100 * (of(True, key) / of(False, key) - 1):+.2f} %"
    share = median([run["watching_s"] / run["cpu_s"] for run in found[True]])
    extra = share - median([run["watching_s"] / run["cpu_s"] for run in found[False]])
    rows = [
        [f"USS after step {WARM_STEPS}, steepest of {len(steep)} (bytes per step)", f"{max(steep):.0f}", "", f"< {MOST_SLOPE}"],
        ["runs whose losses or checkpoint differ", differ, "", 0],
        ["samples/s, on and off", f"{of(True, 'speed'):.0f}", f"{of(False, 'speed'):.0f}", change("speed")],
        ["CPU seconds of the job, on and off", f"{of(True, 'cpu_s'):.1f}", f"{of(False, 'cpu_s'):.1f}", change("cpu_s")],
        ["CPU of all memory threads, share of the job's", f"{share:.3%}", f"{share - extra:.3%}", f"< {MOST_SHARE:.1%}"],
    ]
    table([f"{args.config}, {args.ranks} ranks, {args.steps} steps, {args.pairs} pairs", "on", "off", "wanted, or change"], rows)
    sys.exit(1 if max(steep) >= MOST_SLOPE or differ or share >= MOST_SHARE else 0)


if __name__ == "__main__":
    main()
