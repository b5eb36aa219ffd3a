"""Supervision: starts, failures and orphans of `launch --ranks 3 --exec`, against torchrun.

Prints one line per figure; the exit code is 0 whatever the figures are.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RELEASE, TORCHRUN

RANKS = 3
# Every rank writes what it has to say to a file of its own: output pipes are part of what is measured elsewhere.
HEAD = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def say(what):
    path = os.path.join(os.environ["BENCH_DIR"], f"{what}.{rank}")
    now = time.time()
    with open(f"{path}~", "w") as f: f.write(f"{now} {os.getpid()}")
    os.rename(f"{path}~", path)
say("up")
def wait_for(what):
    while not all(os.path.exists(os.path.join(os.environ["BENCH_DIR"], f"{what}.{r}")) for r in range(3)): time.sleep(0.005)
"""
# The trivial program: nothing of Python's own start is measured.
TRIVIAL = "#!/bin/sh\necho $(date +%s.%N) $$ > $BENCH_DIR/up.$RANK\nsleep 60\n"
REACH = HEAD + """
def on_term(*_): say("told"); os._exit(0)
signal.signal(signal.SIGTERM, on_term)
say("ready")
wait_for("ready")
time.sleep(0.2)
if rank == 0: say("failed"); os._exit(7)
time.sleep(60)
"""
ORDER = HEAD + """
wait_for("up")
start = max(float(open(os.path.join(os.environ["BENCH_DIR"], f"up.{r}")).read().split()[0]) for r in range(3)) + 0.2
time.sleep(max(0, start + {2: 0.0, 0: 0.03, 1: 60}[rank] - time.time()))
sys.exit(10 + rank)
"""
CODE = HEAD + "sys.exit(42) if rank == 1 else time.sleep(60)"
SEGV = HEAD + "os.kill(os.getpid(), signal.SIGSEGV) if rank == 1 else time.sleep(60)"
FORKS = HEAD + """
if os.fork() == 0:
    os.setsid()
    rank += 100
    say("up")
time.sleep(60)
"""


class Launcher:
    def __init__(self, name, command):
        self.name, self.command = name, command

    def start(self, script, folder):
        env = dict(os.environ, BENCH_DIR=str(folder), TMPDIR=str(folder / "tmp"), OMP_NUM_THREADS="1")
        (folder / "tmp").mkdir()
        trivial = script.startswith("#!")
        path = folder / "rank"
        path.write_text(script)
        path.chmod(0o755)
        with open(folder / "output", "w") as out:
            return subprocess.Popen(self.command(path, trivial), env=env, stdout=out, stderr=subprocess.STDOUT)


def launchers(args):
    launch = [args.launch, "--ranks", str(RANKS), "--exec"]
    python = [sys.executable, "-S", "-E"]
    yield Launcher("launch", lambda path, trivial: launch + ([] if trivial else python) + [str(path)])
    if not args.alone:
        torchrun = [*TORCHRUN, "--nnodes=1", f"--nproc-per-node={RANKS}", "--master-port=0"]
        yield Launcher("torchrun", lambda path, trivial: torchrun + (["--no-python"] if trivial else []) + [str(path)])


def wait_for(folder, pattern, count, seconds=30):
    end = time.time() + seconds
    while time.time() < end:
        found = [f for f in folder.glob(pattern) if not f.name.endswith("~") and f.stat().st_size]
        if len(found) >= count:
            return found
        time.sleep(0.002)
    raise SystemExit(f"{pattern}: {count} ranks did not show up\n{(folder / 'output').read_text()[-3000:]}")


def said(path):
    moment, pid = path.read_text().split()
    return float(moment), int(pid)


def memory(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def in_folder(run):
    with tempfile.TemporaryDirectory(prefix="bench-supervise-") as name:
        return run(Path(name))


def starts(launcher, folder):
    began = time.time()
    process = launcher.start(TRIVIAL, folder)
    up = [said(path)[0] - began for path in wait_for(folder, "up.*", RANKS)]
    time.sleep(1.2)
    rss = memory(process.pid)
    process.terminate()
    process.wait()
    return max(up) * 1e3, rss


def reaches(launcher, folder):
    process = launcher.start(REACH, folder)
    process.wait()
    failed = said(folder / "failed.0")[0]
    return [(said(path)[0] - failed) * 1e3 for path in folder.glob("told.*")]


def names(launcher, folder):
    process = launcher.start(ORDER, folder)
    code = process.wait()
    text = (folder / "output").read_text()
    found = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", text, re.S) or re.search(r"rank (\d+) failed", text)
    return int(found[1]) if found else None, code


def exits(launcher, folder, script):
    return launcher.start(script, folder).wait()


def orphans(launcher, folder):
    process = launcher.start(FORKS, folder)
    pids = [said(path)[1] for path in wait_for(folder, "up.*", 2 * RANKS)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left), len(list((folder / "tmp").iterdir()))


def cgroups():
    return {str(p) for p in Path("/sys/fs/cgroup").glob("**/headroom-*") if p.is_dir()}


def spread(values, unit):
    return f"median {statistics.median(values):.1f} {unit}, most {max(values):.1f} {unit} of {len(values)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launch", default=str(RELEASE / "launch"))
    parser.add_argument("--alone", action="store_true", help="without torchrun, which takes minutes")
    parser.add_argument("--tries", type=int, default=20)
    args = parser.parse_args()
    shm, groups = set(os.listdir("/dev/shm")), cgroups()
    for launcher in launchers(args):
        # torchrun takes seconds to start: a few tries tell enough.
        tries = args.tries if launcher.name == "launch" else max(1, args.tries // 4)
        say = lambda run: print(f"{launcher.name}: {run.__name__}, {tries} times", file=sys.stderr, flush=True)
        repeat = lambda run, *more: say(run) or [in_folder(lambda folder: run(launcher, folder, *more)) for _ in range(tries)]
        runs = repeat(starts)
        print(f"{launcher.name}: three ranks running after {spread([up for up, _ in runs], 'ms')}")
        print(f"{launcher.name}: resident {spread([rss for _, rss in runs], 'MiB')}")
        print(f"{launcher.name}: a failure reaches peers after {spread(sum(repeat(reaches), []), 'ms')}")
        codes = [in_folder(lambda folder, s=s: exits(launcher, folder, s)) for s in (CODE, SEGV)]
        print(f"{launcher.name}: rank exits 42 -> {codes[0]}, rank dies of SIGSEGV -> {codes[1]}")
        named = repeat(names)
        right = sum(rank == 2 for rank, _ in named)
        print(f"{launcher.name}: rank 2 fails 30 ms before rank 0: named in {right} of {tries}, codes {sorted({c for _, c in named})}")
        left = repeat(orphans)
        clean = sum(pids == 0 for pids, _ in left)
        print(f"{launcher.name}: kill -9: no process left after 1 s in {clean} of {tries}; files left in TMPDIR: {sum(f for _, f in left)}")
    print(f"left in /dev/shm: {sorted(set(os.listdir('/dev/shm')) - shm)}, cgroups: {sorted(cgroups() - groups)}")


if __name__ == "__main__":
    main()
