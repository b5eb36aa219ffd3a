"""A user's PyTorch model by task python against torchrun + DDP + DataLoader: samples/s, first step, memory, overhead of a step

usage: scripts/bench python_task [--rounds N] [--only small,tiny,three,memory,loop,cgroup] [--peers PYTHON]
`--peers`: a Python with lightning and accelerate beside PyTorch 2.11, which are measured as well.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from common import PYTHON, REFERENCE, RELEASE, ROOT, Job, Rows, has, sample_data
from pressure import Group

BATCH = 32
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1")
# Model, ranks, samples, epochs: decoding in Python; the step alone; the start of three ranks; under a limit.
CASES = {"small": ("small", 2, 2048, 4), "tiny": ("tiny", 1, 32 * 400, 4), "three": ("small", 3, 384, 1), "cgroup": ("small", 4, 2048, 4)}


def by_torchrun(how, python, kind, ranks, samples, epochs):
    words = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", REFERENCE / "python_torch.py", how]
    job = Job([str(word) for word in [*words, kind, samples, epochs, BATCH, 1]], env=ONE_THREAD)
    told = next(json.loads(line) for line in reversed(job.wait().splitlines()) if line.startswith("{"))
    return {**told, "first": told["first"] - job.started, "wall": job.wall_s, "pss": job.peak_bytes / 2**20}


def command_of(ranks, runs, words, sets):
    sets = {
        "train.warmup_epochs": 0, "train.early_stopping": "false", "train.gradient_clip_norm": 0, "log.runs_dir": runs,
        "log.plots": "false", "train.restore_best_weights": "false", "train.num_workers": 1, **sets,
    }
    command = [str(RELEASE / "launch"), "--ranks", str(ranks), "--device", "cpu", "--name", "a", *words]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    return command


def launch(ranks, runs, words, sets):
    """A run of `launch`; its job, and a reader of its records."""
    job = Job(command_of(ranks, runs, words, sets), cwd=ROOT)
    job.wait()
    return job, lambda name: [json.loads(line) for line in open(f"{runs}/a/{name}")]


def of_python(kind, samples, more):
    sets = {
        "python.path": f"[{REFERENCE}]", "python.interpreter": PYTHON, "python.args": f"{{kind: {kind}, samples: {samples}}}",
        "train.batch_size": BATCH, **more,
    }
    return ["--python", "python_torch:build"], sets


def headroom(kind, ranks, samples, epochs, optimizer=None):
    runs = tempfile.mkdtemp()
    more = {"train.num_epochs": epochs, **({"python.optimizer": optimizer} if optimizer else {})}
    job, read = launch(ranks, runs, *of_python(kind, samples, more))
    records, memory = read("metrics.jsonl"), read("memory.rank0.jsonl")
    shutil.rmtree(runs)
    later = [record["step_s"] for record in records if record["step"] > samples // (BATCH * ranks) and record.get("step_s")]
    step_s = statistics.median(later) if later else 0
    first = min(record["t"] for record in memory if record["step"] >= 1) - job.started
    rate = BATCH * ranks / step_s if step_s else 0
    return {"rate": rate, "first": first, "wall": job.wall_s, "pss": job.peak_bytes / 2**20, "step_ms": 1e3 * step_s}


def compare(name, rounds, peers):
    case = CASES[name]
    kinds = {"headroom": lambda: headroom(*case), "torchrun": lambda: by_torchrun("torchrun", PYTHON, *case)}
    if name == "tiny":
        kinds["headroom, torch.optim"] = lambda: headroom(*case, optimizer="torch.optim:AdamW")
    for how in ("lightning", "accelerate"):
        if has(peers, how):
            kinds[how] = lambda how=how: by_torchrun(how, peers, *case)
        else:
            print(f"{how} is left out: {peers} -m pip install {how}")
    kinds["headroom"]()  # measured and kept: what a second start finds
    seen = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, run in kinds.items():
            seen[kind].append(run())
    print(f"\n{name}: {case[1]} ranks, {case[2]} samples, {case[3]} epochs, batch {BATCH}, medians of {rounds}")
    rows = Rows(["", "samples/s later", "step, ms", "first step, s", "wall, s", "peak PSS, MiB"], 22)
    for kind, found in seen.items():
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.add([kind, f"{middle['rate']:.0f}", f"{middle['step_ms']:.3f}", f"{middle['first']:.2f}", f"{middle['wall']:.1f}", f"{middle['pss']:.0f}"])


def memory(rounds):
    """The network of the task emg in Rust, and the same in Python: own memory of a rank at its peak."""
    data = sample_data(ROOT / "sample-data" / "bench-contiguous", "contiguous")
    short = {"train.max_steps": 12, "train.batch_size": 8, "log.memory_every": 1, "log.save_every": 0, "data.max_val_windows": 16}
    rust = ["--config", str(ROOT / "configs/default.yaml")], {"data.dataset_path": data, "data.stride": 100, "data.cache_size_gb": 0.0625, **short}
    python = of_python("emg", 384, {"data.cache_size_gb": 0.0625, **short})
    seen = {"rust": [], "python": []}
    for _ in range(rounds):
        for kind, (words, sets) in {"rust": rust, "python": python}.items():
            runs = tempfile.mkdtemp()
            _, read = launch(3, runs, words, sets)
            records = [read(f"memory.rank{rank}.jsonl") for rank in range(3)]
            shutil.rmtree(runs)
            peaks = [[max(record[key] for record in of_rank) / 2**20 for of_rank in records] for key in ("uss_bytes", "pss_bytes")]
            seen[kind].append([statistics.mean(peak) for peak in peaks])
    own, pss = ({kind: statistics.median(one[at] for one in found) for kind, found in seen.items()} for at in (0, 1))
    print(f"\nthe network of task emg, 3 ranks, batch 8, peak per rank, medians of {rounds}: USS {own['rust']:.0f} MiB in Rust, "
          f"{own['python']:.0f} MiB in Python ({own['python'] / own['rust']:.2f} x); PSS {pss['rust']:.0f} and {pss['python']:.0f} MiB "
          f"({pss['python'] / pss['rust']:.2f} x)")


def cgroup():
    """Both in a memory cgroup of four fifths of what torchrun's job takes there, file pages that can be dropped aside."""
    kind, ranks, samples, epochs = CASES["cgroup"]
    group, runs = Group(), tempfile.mkdtemp()
    words = [*map(str, [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", REFERENCE / "python_torch.py"])]
    commands = {
        "torchrun": [*words, "torchrun", kind, str(samples), str(epochs), str(BATCH), "1"],
        "headroom": command_of(ranks, runs, *of_python(kind, samples, {"train.num_epochs": epochs})),
    }

    def run(name):
        """Exit code, processes killed, most bytes, last line."""
        before, most = group.oom_kills(), 0
        with tempfile.TemporaryFile("w+") as out:
            process = group.popen(commands[name], cwd=ROOT, env=ONE_THREAD, stdout=out, stderr=subprocess.STDOUT)
            while process.poll() is None:
                most = max(most, group.look()[0])
                time.sleep(0.05)
            out.seek(0)
            last = (out.read().strip().splitlines() or [""])[-1]
        return process.returncode, group.oom_kills() - before, most, last[:140]

    try:
        code, _, taken, last = run("torchrun")
        if code:
            sys.exit(f"torchrun without a limit: {code}: {last}")
        limit = int(0.8 * taken)
        group.limit(limit)
        print(f"\ncgroup: {ranks} ranks; torchrun takes {taken / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB:")
        for name in commands:
            code, killed, most, last = run(name)
            print(f"  {name}: exit code {code}, {killed} processes killed for memory, at most {most / 2**20:.0f} MiB: {last}", flush=True)
    finally:
        group.remove()
        shutil.rmtree(runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="small,tiny,three,memory,loop,cgroup")
    parser.add_argument("--peers", default=PYTHON)
    args = parser.parse_args()
    for part in args.only.split(","):
        if part == "memory":
            memory(args.rounds)
        elif part == "cgroup":
            cgroup()
        elif part == "loop":
            command = [PYTHON, str(REFERENCE / "python_torch.py"), "loop"]
            steps = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["step_ms"] for _ in range(args.rounds)]
            print(f"\na step of the tiny model by torch.optim in a plain loop, without a loader: {statistics.median(steps):.3f} ms")
        else:
            compare(part, args.rounds, args.peers)


if __name__ == "__main__":
    sys.exit(main())
