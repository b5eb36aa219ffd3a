"""Short runs under a hard memory limit with a hog growing beside them: every one ends well, none is killed.

    scripts/bench pressure [--runs 50] [--steps 60] [--factor 1.2] [--hog 0.9] [--skip-torch]

The limit is `factor` times the plan, set on a cgroup (v1 or v2) that this script makes; where it may not, it says so and
ends with 3. The hog takes memory until the cgroup is filled to the share `--hog` of the limit, and takes again whatever
the run gives back. A run counts when it finishes, or stops with a checkpoint (exit code 75). Then PyTorch's DataLoader
with a cache per worker runs under the same limit. Ends with 1 when a run did not end well or the kernel killed anything
for memory meanwhile.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import PYTHON, REFERENCE, RELEASE, ROOT, sample_data, table

HOG = """
import sys, time
usage, stat, limit, prefix = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
def used():
    facts = dict(line.split() for line in open(stat))
    return int(open(usage).read()) - int(facts[prefix + "active_file"]) - int(facts[prefix + "inactive_file"])
kept = []
while True:
    while used() < limit:
        kept.append(bytearray(b"x") * (8 << 20))
    time.sleep(0.02)
"""


class Group:
    """A memory cgroup of our own below the one this process is in."""

    def __init__(self):
        lines = [line.strip().split(":", 2) for line in open("/proc/self/cgroup")]
        v1 = [path for _, names, path in lines if "memory" in names.split(",")]
        v2 = [path for _, names, path in lines if names == ""]
        self.v1 = bool(v1)
        base = Path("/sys/fs/cgroup/memory" if self.v1 else "/sys/fs/cgroup")
        self.dir = base / (v1 or v2)[0].lstrip("/") / f"pressure-{os.getpid()}"
        try:
            self.dir.mkdir()
            (self.dir / "cgroup.procs").open("w").close()
            self.limit(1 << 62)
        except OSError as error:
            print(f"no memory cgroup may be made here: {error}", file=sys.stderr)
            sys.exit(3)

    def limit(self, size):
        name = "memory.limit_in_bytes" if self.v1 else "memory.max"
        (self.dir / name).write_text(str(size) if size < 1 << 62 else ("-1" if self.v1 else "max"))

    def popen(self, command, **options):
        def join():
            (self.dir / "cgroup.procs").write_text("0")

        return subprocess.Popen(command, preexec_fn=join, **options)

    def hog(self, target):
        usage = "memory.usage_in_bytes" if self.v1 else "memory.current"
        words = [self.dir / usage, self.dir / "memory.stat", target, "total_" if self.v1 else ""]
        return self.popen([PYTHON, "-c", HOG, *map(str, words)], stderr=subprocess.DEVNULL)

    def remove(self):
        for _ in range(100):
            try:
                return self.dir.rmdir()
            except OSError:
                time.sleep(0.05)


def oom_kills():
    """Kills for memory on this node since boot."""
    return next(int(line.split()[1]) for line in open("/proc/vmstat") if line.startswith("oom_kill "))


def command(data, work, name, args):
    sets = {
        "data.dataset_path": data, "data.stride": 25, "train.max_steps": args.steps, "train.num_workers": 2,
        "memory.budget": args.budget, "log.runs_dir": work, "log.plots": "false", "data.max_val_windows": 32,
        "watch.period": 0.1,
    }
    words = [RELEASE / "launch", "--ranks", "2", "--device", "cpu", "--config", ROOT / "configs/quick_demo.yaml", "--name", name]
    for key, value in sets.items():
        words += ["--set", f"{key}={value}"]
    return words


def planned(work, name):
    """Bytes of all lines of a run's plan."""
    return sum(line["bytes"] for line in json.loads((work / name / "plan.json").read_text())["budget"]["lines"])


def one(group, data, work, name, args, target):
    """Runs once with the hog beside; exit code, steps, and what the watch said."""
    log = work / f"{name}.log"
    with open(log, "w") as out:
        run = group.popen(command(data, work, name, args), stdout=out, stderr=out)
        metrics, hog, most = work / name / "metrics.jsonl", None, 0
        while run.poll() is None:
            if hog is None and metrics.exists() and metrics.stat().st_size > 0:
                hog = group.hog(target)
            time.sleep(0.05)
        if hog:
            hog.send_signal(signal.SIGKILL)
            hog.wait()
    text = log.read_text()
    said = [line.removeprefix("[launch] memory: ") for line in text.splitlines() if line.startswith("[launch] memory: ")]
    path = work / name / "summary.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else 0
    kept = any((work / name / "checkpoints").glob("step-*"))
    well = run.returncode == 0 or (run.returncode == 75 and kept)
    if not well or hog is None or args.verbose:
        print(f"{name} ended with {run.returncode}, hog {'ran' if hog else 'never started'}:\n{text[-3000:]}", file=sys.stderr)
    return {"code": run.returncode, "well": well and hog is not None, "steps": steps, "said": said}


def torch_is_killed(group, data, args):
    """Exit status of the DataLoader with a cache per worker, and its last words."""
    files = sorted(str(path) for path in Path(data).rglob("*.hdf5"))
    job = json.dumps({"files": files, "batch": 32, "workers": 4, "epochs": 3})
    before = oom_kills()
    process = group.popen([PYTHON, REFERENCE / "cache_torch.py", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    lines = (err or out).strip().splitlines() or [""]
    return process.returncode, oom_kills() - before, lines[-1][:160]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--factor", type=float, default=1.2)
    parser.add_argument("--hog", type=float, default=0.9)
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print what every run said")
    args = parser.parse_args()
    data = sample_data(ROOT / "sample-data" / "bench-contiguous-60", "contiguous", 60)
    group = Group()
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            subprocess.run([*command(data, work, "plan", args), "--set", "train.max_steps=1"], check=True, capture_output=True)
            plan = planned(work, "plan")
            limit = int(plan * args.factor)
            group.limit(limit)
            print(f"plan {plan / 2**20:.0f} MiB, hard limit {limit / 2**20:.0f} MiB, filled to {args.hog:.0%} by a hog")
            before = oom_kills()
            ends = []
            for number in range(args.runs):
                end = one(group, data, work, f"run{number}", args, int(limit * args.hog))
                ends.append(end)
                print(f"  run {number}: code {end['code']}, {end['steps']} steps; " + "; ".join(end["said"]), flush=True)
            kills = oom_kills() - before
            well = sum(end["well"] for end in ends)
            rows = [
                ["runs that ended well", f"{well} of {args.runs}"],
                ["of these finished", sum(end["code"] == 0 for end in ends)],
                ["stopped with a checkpoint", sum(end["code"] == 75 for end in ends)],
                ["processes killed for memory", kills],
            ]
            if not args.skip_torch:
                code, killed, words = torch_is_killed(group, data, args)
                rows.append(["PyTorch DataLoader, a cache per worker", f"code {code}, {killed} killed: {words}"])
            table(["", "found"], rows)
    finally:
        group.remove()
    if well < args.runs or kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
