"""Quality of the detection sample run: mAP50 on several seeds, and with shuffled labels as the control.

    scripts/bench detect_quality [--seeds 1,2,3] [--runs DIR] [--json FILE]

Each seed makes sample shapes and trains configs/yolov8n.yaml with its profile `cpu` on them. The control trains with the label files of
the training images dealt out anew, and is judged by true labels. Criteria: mAP50 of the kept weights above .5 in each run, the median above .6;
the control's best epoch below .1; six minutes a run. `seconds` is the run's time, `cpu` that of all its threads.

Where the package (`ultralytics`) is installed in .bench-venv, it measures the weights of the first seed, and weights that it trained are
measured here: both precisions within .002 of each other.
"""

import argparse
import csv
import importlib.util
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import PYTHON, REFERENCE, RELEASE, ROOT, median, table

LAUNCH = RELEASE / "launch"
# Seconds that a run may take on two cores.
LONGEST_S = 360
# Most difference between two programs that measure the same weights.
APART = 0.002
PRECISIONS = ("map50", "map50_95")
# The sample run's model and side, and validation batch.
MODEL = {"width": 0.125, "imgsz": 160, "batch": 16}


def run(words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def train(runs, name, seed, data):
    """A run's mAP50: of the weights that are kept, and of its best epoch; its seconds."""
    used, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    run([LAUNCH, "--config", ROOT / "configs/yolov8n.yaml", "--device", "cpu", "--name", name, "--set", f"seed={seed}",
         "--set", f"log.runs_dir={runs}", "--set", f"data.dataset_path={data}"])
    seconds, now = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(runs / name / "results.csv") as file:
        epochs = [float(row["metrics/mAP50(B)"]) for row in csv.DictReader(file)]
    with open(runs / name / "classes.csv") as file:
        kept = float(next(csv.DictReader(file))["map50"])
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"name": name, "kept": kept, "best": max(epochs), "last": epochs[-1], "epochs": len(epochs), "seconds": seconds, "cpu": cpu}


def shuffled(data, folder, seed):
    """The data with the label files of the training images dealt out anew."""
    run(["cp", "-r", data, folder])
    files = sorted((folder / "labels/train").glob("*.txt"))
    texts = [file.read_text() for file in files]
    random.Random(seed).shuffle(texts)
    for file, text in zip(files, texts):
        file.write_text(text)
    return folder


def evaluated(run, weights):
    """What we measure of a run's kept weights, or of a file's."""
    words = [LAUNCH, "evaluate", run, "--weights", weights, "--json", "--device", "cpu"]
    done = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
    return {name: json.loads(done.stdout)["metrics"][f"val.{name}"] for name in PRECISIONS}


def package(work, weights, data, **options):
    words = [PYTHON, REFERENCE / "yolo_validate.py", work, weights.resolve(), data.resolve() / "data.yaml", json.dumps({**MODEL, **options})]
    # The package takes a relative `path` of data.yaml from the working directory.
    done = subprocess.run([str(word) for word in words], cwd=data, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def both_ways(run, data, epochs):
    """Ours measured by the package, and the package's measured here: rows, and the largest difference."""
    step = json.loads((run / "summary.json").read_text())["best"]["step"]
    theirs = run.parent / "package.safetensors"
    package("train", theirs, data, batch=8, epochs=epochs)
    rows, most = [], 0.0
    for name, here, file in (
        ("ours", evaluated(run, "best"), run / f"checkpoints/step-{step}/ema.safetensors"), ("the package's", evaluated(run, theirs), theirs)
    ):
        there = package("val", file, data)
        for precision in PRECISIONS:
            most = max(most, abs(here[precision] - there[precision]))
            rows.append([f"{name}: {precision}", f"{here[precision]:.5f}", f"{there[precision]:.5f}"])
    return rows, most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--epochs", type=int, default=30, help="of the package's training")
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = args.runs or Path(tempfile.mkdtemp(prefix="detect-quality-"))
    seeds = [int(seed) for seed in args.seeds.split(",")]
    found = []
    for seed in seeds:
        data = folder / f"shapes{seed}"
        if not data.exists():
            run([LAUNCH, "sample-data", "--task", "yolo", "--seed", seed, "--out", data])
        found.append(train(folder / "runs", f"seed{seed}", seed, data))
        print(json.dumps(found[-1]), flush=True)
    mixed = shuffled(folder / f"shapes{seeds[0]}", folder / "shuffled", 1)
    control = train(folder / "runs", "shuffled", seeds[0], mixed)
    rows = [[row["name"], *(f"{row[key]:.3f}" for key in ("kept", "best", "last")), f"{row['seconds']:.0f}", f"{row['cpu']:.0f}"]
            for row in [*found, control]]
    table(["run", "mAP50, kept", "best epoch", "last epoch", "seconds", "cpu"], rows)
    if args.json:
        Path(args.json).write_text(json.dumps({"runs": found, "control": control}, indent=1))
    if importlib.util.find_spec("ultralytics"):
        rows, most = both_ways(folder / "runs" / found[0]["name"], folder / f"shapes{seeds[0]}", args.epochs)
        table(["weights", "here", "by the package"], rows)
        if most > APART:
            sys.exit(f"the two programs are {most:.4f} apart")
    kept = [row["kept"] for row in found]
    if min(kept) <= 0.5 or median(kept) <= 0.6 or control["best"] >= 0.1:
        sys.exit("mAP50 beyond its bound: more than .5 in each run and .6 in the median, less than .1 with shuffled labels")
    if max(row["seconds"] for row in found) > LONGEST_S:
        sys.exit(f"a run took more than {LONGEST_S} s")


if __name__ == "__main__":
    main()
