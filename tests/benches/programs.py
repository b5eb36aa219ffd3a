"""Programs of PyTorch users in a memory cgroup with a hog: as they are, and under `launch --exec` with the cache.

    scripts/bench programs [--only ddp,lightning,bert,ultralytics] [--peers PYTHON]

Each program runs two processes (tests/benches/reference/programs.py). First as it is, without a limit: what it takes at most becomes
the limit, and a tenth more. Then once more as it is, beside a hog that begins after the first epoch and fills the group, in pieces
smaller than the program's processes; and with Headroom beside a hog that takes as many bytes. Ends with 1 where a run with Headroom does not end well, or one
without is not killed. lightning, bert and ultralytics want their packages: `--peers` names a Python that has them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import PYTHON, REFERENCE, RELEASE, Rows, has
from pressure import Group, key, number

PROGRAM = REFERENCE / "programs.py"
NEEDS = {"ddp": "torch", "lightning": "lightning", "bert": "transformers", "ultralytics": "ultralytics"}
PROCESSES = 2
# A piece of the hog; the kernel takes the largest process first.
PIECE = 48 << 20
SHARE = 0.97
HANG_S = 400

HOG = """
import sys, time
kept = bytearray(b"x") * int(sys.argv[1])
open(sys.argv[2], "w").close()
time.sleep(1000)
"""


def command_of(kind, how, folder, python):
    words = [str(python), str(PROGRAM), kind, how, str(folder)]
    if kind in ("ddp", "bert"):
        words = [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", *words[1:]]
    if how == "headroom":
        words = [str(RELEASE / "launch"), "--cache", "300MiB", "--name", kind, "--log-dir", str(folder / "logs"), "--exec", *words]
    return words


def run(group, kind, how, python, hog_bytes=None):
    """One run. `hog_bytes`: of the hog; 0: as many as fill the group; `None`: none."""
    folder = Path(tempfile.mkdtemp(prefix=f"programs-{kind}-"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(folder),
           "TOKENIZERS_PARALLELISM": "false"}
    # Two programs of one job are told apart by the launcher; here the folder does.
    env["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    before, most, hogs, taken = group.oom_kills(), 0, [], 0
    began = time.monotonic()
    try:
        with open(folder / "out", "w+") as out:
            program = group.popen(command_of(kind, how, folder, python), cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
            gone = False
            while program.poll() is None:
                most = max(most, group.look()[0])
                if not gone and len(list(folder.glob("warm-*"))) >= PROCESSES:
                    if hog_bytes is not None:
                        hogs, taken = fill(group, hog_bytes)
                    (folder / "go").touch()
                    gone = True
                if time.monotonic() - began > HANG_S:
                    program.kill()
                time.sleep(0.05)
            out.seek(0)
            text = out.read()
        return dict(code=program.returncode, ended=f"ended {kind}" in text, most=most, killed=group.oom_kills() - before,
                    seconds=time.monotonic() - began, taken=taken, text=text)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        # Processes of a program whose launcher died.
        for _ in range(100):
            left = [int(pid) for path in [group.dir, *group.dir.glob("*/")] for pid in (path / "cgroup.procs").read_text().split()]
            if not left:
                break
            for pid in left:
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def fill(group, wanted):
    """Pieces of `wanted` bytes together; 0: until the group is nearly full. The pieces, and their bytes."""
    hogs, taken, until = [], 0, time.monotonic() + 60
    while time.monotonic() < until:
        piece = min(PIECE, wanted - taken if wanted else int(SHARE * group.limited) - group.look()[0])
        if piece < 2 << 20:
            break
        reached = Path(tempfile.mktemp())
        hogs.append(group.popen([PYTHON, "-S", "-c", HOG, str(piece), str(reached)], stderr=subprocess.DEVNULL))
        taken += piece
        while not reached.exists() and hogs[-1].poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        reached.unlink(missing_ok=True)
    return hogs, taken


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NEEDS))
    parser.add_argument("--peers", default=PYTHON, help="a Python that has the packages")
    args = parser.parse_args()
    group = Group()
    table = Rows(["program", "alone MiB", "alone s", "limit MiB", "hog MiB", "as it is", "killed", "Headroom", "killed ", "s"], first=12)
    good = True
    try:
        for kind in args.only.split(","):
            python = next((python for python in (PYTHON, args.peers) if has(python, NEEDS[kind])), None)
            if python is None:
                print(f"{kind} is left out: {NEEDS[kind]} is not installed", flush=True)
                continue
            group.limit(1 << 62)
            alone = run(group, kind, "plain", python)
            if not alone["ended"]:
                sys.exit(f"{kind} as it is, without a limit: {alone['code']}: {alone['text'][-2000:]}")
            group.limited = int(1.1 * alone["most"])
            group.limit(group.limited)
            plain = run(group, kind, "plain", python, 0)
            ours = run(group, kind, "headroom", python, plain["taken"])
            say = lambda one: "ends" if one["ended"] and one["code"] == 0 else f"exit code {one['code']}"
            table.add([kind, f"{alone['most'] / 2**20:.0f}", f"{alone['seconds']:.1f}", f"{group.limited / 2**20:.0f}", f"{plain['taken'] / 2**20:.0f}", say(plain),
                       plain["killed"], say(ours), ours["killed"], f"{ours['seconds']:.1f}"])
            if say(ours) != "ends":
                good = False
                print(ours["text"][-3000:], flush=True)
            good &= say(plain) != "ends"
    finally:
        group.remove()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
