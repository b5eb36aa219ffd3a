"""Memory of a real run whose data is five times its page cache: cache bytes, the job's PSS, and the mapping's over ranks.

    scripts/bench cache_memory [--ranks 3] [--threads 4] [--seconds 20] [--json FILE]

Every 20 ms, until the job ends: bytes that the memfd has, at most the plan's; two samples are never more than 100 ms apart.
At its own pace, since the kernel walks every page for it: PSS of every process (in sum at most `memory.budget`) and of the
mapping, summed over ranks. The same with one rank: what is cached counts once, whatever the
number of ranks. A figure past its limit ends the bench with 1.
"""

import argparse
import glob
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
import subprocess

from common import RELEASE, ROOT, pss_bytes, sample_data, table, tree

NAME = "memfd:headroom-cache"


PERIOD_S = 0.02
LONGEST_GAP_S = 0.1


def find_memfd(pids):
    """The page cache's memory as any of the processes has it open, opened here too; None: nobody has."""
    for pid in pids:
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            try:
                if NAME in os.readlink(link):
                    return os.open(link, os.O_RDONLY)
            except OSError:
                pass
    return None


def mapping_pss(pid):
    """PSS of the page cache's mapping in one process."""
    total, ours = 0, False
    try:
        with open(f"/proc/{pid}/smaps") as file:
            for line in file:
                if "-" in line.split(" ", 1)[0]:
                    ours = NAME in line
                elif ours and line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    except OSError:
        pass
    return total


def watch_pss(process, samples):
    """Appends a sample as often as the kernel gives one, until the job ends."""
    while process.poll() is None:
        started, pids = time.time(), tree(process.pid)
        mapped = [mapping_pss(pid) for pid in pids]
        samples.append({"t": started, "job": sum(map(pss_bytes, pids)), "mapping": sum(mapped),
                        "mappers": sum(1 for bytes in mapped if bytes)})
        time.sleep(0.2)


def be_punctual():
    """The calling thread goes before others, where that is allowed: a busy machine must not make gaps."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        pass


def watch(process, seconds):
    """Samples of cache bytes and of PSS until the job ends; it is told to stop after so many seconds of training."""
    cache, pss, memory = [], [], None
    while memory is None and process.poll() is None:
        memory = find_memfd(tree(process.pid))
        time.sleep(0.002)
    if memory is None:
        return cache, pss
    slow = threading.Thread(target=watch_pss, args=(process, pss))
    slow.start()
    be_punctual()
    end = time.time() + seconds
    while process.poll() is None:
        started = time.time()
        # One system call: the number of pages that the memory has.
        facts = os.fstat(memory)
        cache.append({"t": started, "size": facts.st_size, "present": facts.st_blocks * 512})
        if started > end:
            process.send_signal(signal.SIGTERM)
            end = started + 1e9
        time.sleep(max(0.0, PERIOD_S - (time.time() - started)))
    os.close(memory)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    slow.join()
    return cache, pss


def job(data, ranks, args, work):
    sets = {
        "data.dataset_path": data, "data.stride": 50, "data.cache_size_gb": args.cache_gb, "train.batch_size": 16,
        "train.num_workers": args.threads, "train.num_epochs": 1000, "memory.budget": args.budget, "log.runs_dir": work,
        "log.plots": "false", "data.max_val_windows": 48, "data.split_ratio": "[0.9,0.05,0.05]",
    }
    command = [RELEASE / "launch", "--ranks", str(ranks), "--device", "cpu", "--config", ROOT / "configs/quick_demo.yaml",
               "--name", f"ranks{ranks}"]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    with open(Path(work) / f"ranks{ranks}.log", "w") as log:
        process = subprocess.Popen(command, cwd=work, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        cache, pss = watch(process, args.seconds)
    if not any(sample["mappers"] == ranks for sample in pss):
        sys.exit(f"no page cache, or never {ranks} ranks with it:\n{(Path(work) / f'ranks{ranks}.log').read_text()[-3000:]}")
    return {"cache": cache, "pss": pss}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cache-gb", type=float, default=0.1)
    parser.add_argument("--budget", default="1.25GiB")
    parser.add_argument("--json", help="write every sample to this file")
    args = parser.parse_args()
    data = sample_data(ROOT / "sample-data" / "bench-contiguous-60", "contiguous", 60)
    with tempfile.TemporaryDirectory() as work:
        runs = {ranks: job(data, ranks, args, work) for ranks in (1, args.ranks)}
    cache, pss = runs[args.ranks]["cache"], runs[args.ranks]["pss"]
    peak = {ranks: max(s["mapping"] for s in run["pss"]) for ranks, run in runs.items()}
    budget = int(float(args.budget.removesuffix("GiB")) * 2**30)
    plan = round(args.cache_gb * 2**30)
    gaps = [later["t"] - one["t"] for one, later in zip(cache, cache[1:])]
    present, whole = max(s["present"] for s in cache), max(s["job"] for s in pss)
    rows = [
        ["samples of cache bytes, of PSS", f"{len(cache)}, {len(pss)}", ""],
        ["longest gap between samples of cache bytes, ms", f"{1e3 * max(gaps):.0f}", f"{1e3 * LONGEST_GAP_S:.0f}"],
        ["most cache bytes, MB", f"{present / 1e6:.1f}", f"{plan / 1e6:.1f}"],
        ["most PSS of the job, MB", f"{whole / 1e6:.0f}", f"{budget / 1e6:.0f}"],
        [f"most PSS of the mapping, {args.ranks} ranks, MB", f"{peak[args.ranks] / 1e6:.1f}", f"{1.02 * peak[1] / 1e6:.1f}"],
    ]
    table(["", "found", "at most"], rows)
    if args.json:
        Path(args.json).write_text(json.dumps({str(ranks): run for ranks, run in runs.items()}))
    if max(gaps) > LONGEST_GAP_S:
        sys.exit("the machine is too busy to look at the cache ten times a second")
    if present > plan or whole > budget or peak[args.ranks] > 1.02 * peak[1]:
        sys.exit("memory beyond its limit")


if __name__ == "__main__":
    main()
