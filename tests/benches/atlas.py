"""An atlas of cells trains in all stages under a hard memory limit: peak of the group, kills, seconds of each stage.

    scripts/bench atlas [--cells 1000000] [--genes 5000] [--limit-gib 2] [--steps 200] [--keep]

Sample data are made outside the limit. Networks are those of the demonstration, `--steps` steps of each stage that trains; the passes
read every cell. Needs leave to make a memory cgroup; ends with 1 where a process was killed or a stage did not finish.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RELEASE, ROOT, say, table
from pressure import Group

STAGES = ["autoencoder", "latents", "diffusion", "classifier", "sample"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--limit-gib", type=float, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keep", action="store_true", help="leave the data and the run")
    args = parser.parse_args()
    (ROOT / "sample-data").mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="atlas-", dir=ROOT / "sample-data"))
    group = Group()
    try:
        say(f"making {args.cells:,} cells of {args.genes:,} genes")
        words = ["--cells", str(args.cells), "--genes", str(args.genes), "--out", work / "cells"]
        subprocess.run([RELEASE / "launch", "sample-data", "--task", "cell", *words], check=True, capture_output=True)
        size = (work / "cells/cells.h5ad").stat().st_size
        group.limit(int(args.limit_gib * 2**30))
        sets = {
            "data.dataset_path": work / "cells", "log.runs_dir": work / "runs", "data.max_val_windows": 2000, "cell.sample.per_class": 20,
            **{f"stages.{stage}.train.max_steps": args.steps for stage in ("autoencoder", "diffusion", "classifier")},
        }
        words = [RELEASE / "launch", "--config", ROOT / "configs/cell.yaml", "--device", "cpu", "--ranks", "1", "--name", "atlas"]
        words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        say(f"training on {size / 2**30:.1f} GiB under {args.limit_gib} GiB")
        out, peak, started = work / "out.txt", 0, time.time()
        with open(out, "w") as file:
            job = group.popen([str(word) for word in words], stdout=file, stderr=subprocess.STDOUT)
            while job.poll() is None:
                peak = max(peak, group.look()[0])
                time.sleep(0.1)
        kills = group.oom_kills()
        rows = []
        for stage in STAGES:
            path = work / "runs/atlas" / stage / "summary.json"
            summary = json.loads(path.read_text()) if path.exists() else {"status": "missing"}
            rows.append([stage, summary["status"], f"{summary.get('wall_s', summary.get('seconds', 0)) or 0:.1f}"])
        print("\n".join(line for line in out.read_text().splitlines() if any(word in line for word in ("cells:", "page cache", "warning", "mmd"))))
        table(["stage", "status", "seconds"], rows)
        print(f"{args.cells:,} cells, file {size / 2**30:.2f} GiB, limit {args.limit_gib} GiB, peak without file pages {peak / 2**30:.2f} GiB, "
              f"kills {kills}, exit {job.returncode}, {time.time() - started:.0f} s")
        if kills or job.returncode or any(row[1] != "finished" for row in rows):
            print(out.read_text()[-4000:])
            sys.exit(1)
    finally:
        group.remove()
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
