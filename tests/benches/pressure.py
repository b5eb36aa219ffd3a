"""Short runs under a hard memory limit with a hog growing beside them: every one ends well, none is killed.

    scripts/bench pressure [--runs 50] [--steps 400] [--factor 1.2] [--hog 0.9] [--skip-torch]

The limit is `factor` times the plan, set on a cgroup (v1 or v2) that this script makes; where it may not, it says so and
ends with 3. The hog takes memory until the cgroup is filled to the share `--hog` of the limit, and takes again whatever
the run gives back. Filled means: all that the kernel charges to the group (its own memory for it too) less file pages
that it can drop. A run counts when the hog got there, and the run finishes, or stops with a checkpoint (exit code 75).
Then PyTorch's DataLoader with a cache per worker runs under the same limit. Ends with 1 when a run did not end well or
the kernel killed a process of the group for memory.
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

from common import PYTHON, REFERENCE, RELEASE, ROOT, median, sample_data, table

# A run that takes longer hangs.
HANG_S = 600

HOG = """
import sys, time
usage, stat, limit, prefix, reached = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
def used():
    facts = dict(line.split() for line in open(stat))
    return int(open(usage).read()) - int(facts[prefix + "active_file"]) - int(facts[prefix + "inactive_file"])
kept, told = [], False
while True:
    while used() < limit:
        kept.append(bytearray(b"x") * (8 << 20))
    if not told:
        open(reached, "w").close()
        told = True
    time.sleep(0.02)
"""


def number(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def key(path, name):
    """The value of `name` in a file of `name value` lines; 0 where there is none."""
    try:
        return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name + " ")), 0)
    except OSError:
        return 0


class Group:
    """A memory cgroup of our own below the one this process is in."""

    def __init__(self):
        lines = [line.strip().split(":", 2) for line in open("/proc/self/cgroup")]
        v1 = [path for _, names, path in lines if "memory" in names.split(",")]
        v2 = [path for _, names, path in lines if names == ""]
        self.v1 = bool(v1)
        base = Path("/sys/fs/cgroup/memory" if self.v1 else "/sys/fs/cgroup")
        self.dir = base / (v1 or v2)[0].lstrip("/") / f"pressure-{os.getpid()}"
        # v1 counts a kill in the victim's group alone, and the ranks' group goes with its run: most seen of each.
        self.kills = {}
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

    def hog(self, target, reached):
        words = [self.usage(), self.dir / "memory.stat", target, "total_" if self.v1 else "", reached]
        return self.popen([PYTHON, "-c", HOG, *map(str, words)], stderr=subprocess.DEVNULL)

    def usage(self):
        return self.dir / ("memory.usage_in_bytes" if self.v1 else "memory.current")

    def look(self):
        """Bytes in use as the hog counts them, and of these the kernel's own; counts kills on the way."""
        name = "memory.oom_control" if self.v1 else "memory.events"
        for folder in [self.dir, *(path for path in self.dir.glob("*") if path.is_dir())]:
            self.kills[folder] = max(self.kills.get(folder, 0), key(folder / name, "oom_kill"))
        stat, prefix = self.dir / "memory.stat", "total_" if self.v1 else ""
        kernel = number(self.dir / "memory.kmem.usage_in_bytes") if self.v1 else key(stat, "kernel")
        files = key(stat, prefix + "active_file") + key(stat, prefix + "inactive_file")
        return number(self.usage()) - files, kernel

    def oom_kills(self):
        """Processes of the group and of those below that the kernel killed for memory."""
        self.look()
        # v2 counts those below in the group itself.
        return sum(self.kills.values()) if self.v1 else self.kills[self.dir]

    def remove(self):
        for _ in range(100):
            try:
                for below in [path for path in self.dir.glob("*") if path.is_dir()]:
                    below.rmdir()
                return self.dir.rmdir()
            except OSError:
                time.sleep(0.05)


def node_kills():
    """Kills for memory on this node since boot, in any group."""
    return key(Path("/proc/vmstat"), "oom_kill")


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


def one(group, data, work, name, args, limit):
    """Runs once with the hog beside: exit code, steps, the fullest moment, what the watch said."""
    log, reached = work / f"{name}.log", work / f"{name}.reached"
    began, kills = time.time(), group.oom_kills()
    with open(log, "w") as out:
        run = group.popen(command(data, work, name, args), stdout=out, stderr=out)
        metrics, hog, most = work / name / "metrics.jsonl", None, (0, 0)
        try:
            while run.poll() is None:
                if hog is None and metrics.exists() and metrics.stat().st_size > 0:
                    hog = group.hog(int(limit * args.hog), reached)
                most = max(most, group.look())
                if time.time() - began > HANG_S:
                    run.kill()
                time.sleep(0.02)
        finally:
            # Where it is gone already, the kernel chose it.
            hog_lived = hog is not None and hog.poll() is None
            for process in filter(None, [hog, run]):
                process.kill()
                process.wait()
    text = log.read_text()
    said = [line.removeprefix("[launch] memory: ") for line in text.splitlines() if line.startswith("[launch] memory: ")]
    path = work / name / "summary.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else 0
    kept = any((work / name / "checkpoints").glob("step-*"))
    well = run.returncode == 0 or (run.returncode == 75 and kept)
    well = well and hog_lived and reached.exists() and group.oom_kills() == kills
    if not well or args.verbose:
        state = "lived" if hog_lived else "was ended" if hog else "never started"
        full = "reached" if reached.exists() else "not reached"
        print(f"{name} ended with {run.returncode}, the hog {state}, its share {full}:\n{text[-3000:]}", file=sys.stderr)
    share, kernel = most[0] / limit, most[1]
    return {"code": run.returncode, "well": well, "steps": steps, "said": said, "share": share, "kernel": kernel,
            "reached": reached.exists(), "wall_s": time.time() - began}


def torch_is_killed(group, data):
    """Exit status of the DataLoader with a cache per worker, kills in the group, and its last words."""
    files = sorted(str(path) for path in Path(data).rglob("*.hdf5"))
    job = json.dumps({"files": files, "batch": 32, "workers": 4, "epochs": 3})
    before = group.oom_kills()
    process = group.popen([PYTHON, REFERENCE / "cache_torch.py", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    lines = (err or out).strip().splitlines() or [""]
    return process.returncode, group.oom_kills() - before, lines[-1][:160]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--factor", type=float, default=1.2)
    parser.add_argument("--hog", type=float, default=0.9)
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print what every run said")
    return parser.parse_args()


def measure(group, data, work, args):
    """The rows of the table; whether all went well."""
    subprocess.run([*command(data, work, "plan", args), "--set", "train.max_steps=1"], check=True, capture_output=True)
    plan = planned(work, "plan")
    limit = int(plan * args.factor)
    group.limit(limit)
    print(f"plan {plan / 2**20:.0f} MiB, hard limit {limit / 2**20:.0f} MiB, filled to {args.hog:.0%} by a hog", flush=True)
    before, ends = node_kills(), []
    for at in range(args.runs):
        end = one(group, data, work, f"run{at}", args, limit)
        ends.append(end)
        facts = f"code {end['code']}, {end['steps']} steps, {end['wall_s']:.1f} s, {end['share']:.1%} full at most"
        print(f"  run {at}: {facts}; " + "; ".join(end["said"]), flush=True)
    kills, well = group.oom_kills(), sum(end["well"] for end in ends)
    shares = sorted(end["share"] for end in ends)
    rows = [
        ["runs that ended well", f"{well} of {args.runs}"],
        ["of these finished", sum(end["code"] == 0 for end in ends)],
        ["stopped with a checkpoint", sum(end["code"] == 75 for end in ends)],
        ["hog reached its share", f"{sum(end['reached'] for end in ends)} of {args.runs}"],
        ["fullest moment of a run, least to most", f"{shares[0]:.1%} to {shares[-1]:.1%}"],
        ["of it the kernel's own, at most", f"{max(end['kernel'] for end in ends) / 2**20:.1f} MiB"],
        ["oom_kill of the group", kills],
        ["oom_kill of the node meanwhile", node_kills() - before],
        ["seconds per run, median", f"{median([end['wall_s'] for end in ends]):.1f}"],
    ]
    if not args.skip_torch:
        code, killed, words = torch_is_killed(group, data)
        rows.append(["PyTorch DataLoader, a cache per worker", f"code {code}, {killed} killed: {words}"])
    return rows, well == args.runs and not kills


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    data = sample_data(ROOT / "sample-data" / "bench-contiguous-60", "contiguous", 60)
    group = Group()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows, well = measure(group, data, Path(folder), args)
            table(["", "found"], rows)
    finally:
        group.remove()
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
