"""The plan's budget lines against what shipped configs really use, with 1, 2 and 3 CPU ranks.

    scripts/bench plan_truth [--configs default,baseline] [--ranks 1,2,3] [--steps 8] [--repeat 1] [--set KEY=VALUE ...]

Every run trains two short epochs on sample data, validates and writes a checkpoint, so that each line reaches its peak;
`launch analyze --json` compares. A line passes from 1.00 to 1.15 times what was measured; a line that the plan claims as a
bound alone passes above that too. Before the first run of a config one more is made that is not looked at: the first start on new
files scans them, and what the scan has freed counts as the runtime's, and not as a step's that fills it later. Ends with 1 when
a line does not pass.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RELEASE, ROOT, table

EMG = ["quick_demo", "default", "low_memory", "high_performance"]
SAMPLES = {"quick_demo": 32, "default": 64, "low_memory": 64, "high_performance": 128, "baseline": 1}
PASSES = ("true", "bound")


def sample_data(task):
    folder = ROOT / "sample-data" / f"plan-truth-{task}"
    if not folder.exists():
        subprocess.run([RELEASE / "launch", "sample-data", "--task", task, "--out", folder], check=True, capture_output=True)
    return folder


def run(work, config, ranks, steps, name, more):
    """One run; what `launch analyze --json` says of it."""
    data = sample_data("deblur" if config == "baseline" else "emg")
    sets = {
        "data.dataset_path": data, "log.runs_dir": work, "log.plots": "false", "train.num_epochs": 2,
        "train.early_stopping": "false", "train.max_steps": 2 * steps,
        "data.max_train_windows": SAMPLES[config] * ranks * steps, "data.max_val_windows": 8 if config == "baseline" else 512,
    }
    words = [RELEASE / "launch", "--ranks", str(ranks), "--device", "cpu", "--config", ROOT / f"configs/{config}.yaml", "--name", name]
    for setting in [f"{key}={value}" for key, value in sets.items()] + more:
        words += ["--set", setting]
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode != 0:
        sys.exit(f"{config} with {ranks} ranks ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
    said = subprocess.run([RELEASE / "launch", "analyze", work / name, "--json"], capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join([*EMG, "baseline"]))
    parser.add_argument("--ranks", default="1,2,3")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for config in args.configs.split(","):
            run(Path(folder), config, 1, 1, f"{config}-scan", args.set)
            for ranks in map(int, args.ranks.split(",")):
                for again in range(args.repeat):
                    found = run(Path(folder), config, ranks, args.steps, f"{config}-{ranks}-{again}", args.set)
                    for check in found["checks"]:
                        passes = check["verdict"] in PASSES
                        failed += not passes
                        mib = [f"{check[key] / 2**20:.1f}" for key in ("planned_bytes", "measured_bytes")]
                        ratio = "-" if check["ratio"] is None else f"{check['ratio']:.3f}"
                        rows.append([f"{config} × {ranks}", check["name"], *mib, ratio, check["verdict"] + ("" if passes else " !")])
                    done = rows[-len(found["checks"]):]
                    table(["run", "line", "planned MiB", "measured MiB", "ratio", "verdict"], done)
                    print(flush=True)
    print(f"{len(rows)} comparisons, {failed} do not pass")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
