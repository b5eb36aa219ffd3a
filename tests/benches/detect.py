"""Detection against the YOLO package, same JPEG files, same two cores, interleaved: speed, memory, a hard limit, growth.

    scripts/bench detect [--only train,val,memory,limit,growth] [--repeats 5] [--quick] [--json FILE]

train    images/s of training at equal settings, and the time to the first step: the sample run's model and YOLOv8n
val      images/s of validation with the same weights
memory   peak PSS of the job with 3 ranks and decoded images in memory (`yolo.cache: ram`, the package's `cache=ram`)
limit    that job in a memory cgroup which kills the package: ours ends, with the mAP that it has without a limit
growth   own memory of a rank over 50 small epochs with validation, KiB per step, and the plan's lines against what was used

The package (`ultralytics`) is compared with where it is installed in .bench-venv. It trains on one CPU process only; for `memory` and
`limit` its code for several devices is given CPU ranks. Ends with 1 where a figure is beyond its bound.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import PYTHON, REFERENCE, RELEASE, ROOT, TORCHRUN, Job, median, say, table
from images import data as pictures
from pressure import Group

LAUNCH = RELEASE / "launch"
PEER = REFERENCE / "detect_package.py"
RANKS = 3
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# Name, width, side, batch, steps of which the first fifth warms up, least ratio.
TRAIN = [
    ("sample run's model, 160 px, batch 8", 0.125, 160, 8, 100, 1.3),
    ("YOLOv8n, 320 px, batch 16", 0.25, 320, 16, 15, 1.3),
]
# Validation: width, side, batch.
VAL = (0.25, 320, 16)
# Memory: width, side, batch of a rank, steps of the package, which decodes all images before the first.
MEMORY = (0.125, 640, 1, 8)
MEMORY_IMAGES = 1500
MOST_MEMORY = 1 / 3
# Limit: width, side, batch of a rank, images, steps, bytes.
LIMIT = (0.125, 160, 8, 3200, 120, 2_300_000_000)
# KiB of own memory that a rank may gain per step.
MOST_GROWTH = 10


def words(work, name, sets, ranks=1):
    command = [LAUNCH, "--ranks", str(ranks), "--device", "cpu", "--config", ROOT / "configs/yolov8n.yaml", "--name", name]
    sets = {"log.runs_dir": work, "log.plots": "false", "log.images": 0, **sets}
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    return [str(word) for word in command]


def settings(data, width, side, batch, steps, **more):
    return {
        "data.dataset_path": data, "yolo.width": width, "yolo.imgsz": side, "yolo.nbs": 0, "yolo.augment.mosaic": 1.0, "yolo.close_mosaic": 0,
        "train.batch_size": batch, "train.max_steps": steps, "train.num_epochs": 1000, "log.log_every": 1, "log.save_every": 0,
        "train.restore_best_weights": "false", "data.max_val_windows": 8, **more,
    }


def records(work, name):
    return [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]


def package(job, ranks=1, **options):
    """A run of the package; its line of JSON with the job."""
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), PEER] if ranks > 1 else [PYTHON, PEER]
    # The package takes a relative `path` of data.yaml from the working directory.
    run = Job([*command, json.dumps({**job, "ranks": ranks})], cwd=Path(job["data"]).parent, **options)
    return json.loads(run.wait().strip().splitlines()[-1]), run


def rate(ends, batch):
    """Images per second behind the warm-up."""
    first = len(ends) // 5
    return batch * (len(ends) - 1 - first) / (ends[-1] - ends[first])


def train(args, work, found):
    data, rows = pictures(300), []
    for number, (name, width, side, batch, steps, goal) in enumerate(TRAIN):
        sides = {"ours": [], "package": []}
        for at in range(args.repeats):
            run = Job(words(work, f"train{number}-{at}", settings(data, width, side, batch, steps)))
            run.wait()
            ends = [record["t"] for record in records(work, f"train{number}-{at}")]
            sides["ours"].append((rate(ends, batch), ends[0] - run.started))
            if args.package:
                job = {"work": "train", "data": str(data), "width": width, "imgsz": side, "batch": batch, "steps": steps}
                line, run = package(job)
                sides["package"].append((rate(line["ends"], batch), line["ends"][0] - run.started))
            say(f"{name}: " + ", ".join(f"{who} {of[-1][0]:.1f}/s, first step {of[-1][1]:.1f} s" for who, of in sides.items() if of))
        speed, first = ([median([one[at] for one in of]) if of else None for of in sides.values()] for at in (0, 1))
        rows += [row(f"{name}: images/s", speed, goal), row(f"{name}: first step, s", first)]
        found["train " + name] = sides
        if speed[1] and speed[0] < goal * speed[1]:
            found["missed"].append(f"training, {name}: {speed[0] / speed[1]:.2f} of {goal}")
    return rows


def val(args, work, found):
    """Ours is one epoch's validation of a run with one step; the package's is its own validator."""
    width, side, batch = VAL
    data, sides = pictures(300, val=300), {"ours": [], "package": []}
    for at in range(args.repeats):
        sets = settings(data, width, side, batch, 1, **{"data.max_val_windows": 0, "train.val_batch_size": 2 * batch})
        Job(words(work, f"val-{at}", sets)).wait()
        run = Job([str(LAUNCH), "evaluate", str(work / f"val-{at}"), "--weights", "last", "--json", "--device", "cpu"])
        run.wait()
        summary = json.loads((work / f"val-{at}" / "evaluate/val-last/summary.json").read_text())
        sides["ours"].append(summary["samples_per_s"])
        if args.package:
            job = {"work": "val", "data": str(data), "width": width, "imgsz": side, "batch": 2 * batch}
            sides["package"].append(300 / package(job)[0]["seconds"][0])
        say("validation: " + ", ".join(f"{who} {of[-1]:.1f}/s" for who, of in sides.items() if of))
    found["val"] = sides
    return [row(f"validation, YOLOv8n, {side} px: images/s", [median(of) if of else None for of in sides.values()])]


def memory_sets(data, cache):
    """One epoch, so that every image was read."""
    width, side, batch, _ = MEMORY
    more = {"yolo.cache": cache, "train.num_workers": 1, "train.warmup_epochs": 0}
    return settings(data, width, side, batch, MEMORY_IMAGES // (RANKS * batch), **more)


def memory(args, work, found):
    width, side, batch, steps = MEMORY
    data, rows = pictures(MEMORY_IMAGES), []
    job = {"work": "train", "data": str(data), "width": width, "imgsz": side, "batch": batch, "steps": steps, "cache": "ram"}
    sides = {"ram": [], "auto": [], "package": []}
    for at in range(min(args.repeats, 2)):
        for cache in ("ram", "auto"):
            run = Job(words(work, f"memory-{cache}-{at}", memory_sets(data, cache), RANKS), env=ONE_THREAD)
            run.wait()
            sides[cache].append(run.peak_bytes / 1e6)
        if args.package:
            sides["package"].append(package(job, RANKS, env=ONE_THREAD)[1].peak_bytes / 1e6)
        say("memory of the job: " + ", ".join(f"{who} {of[-1]:.0f} MB" for who, of in sides.items() if of))
    theirs = median(sides["package"]) if sides["package"] else None
    for cache in ("ram", "auto"):
        label = f"{RANKS} ranks, {MEMORY_IMAGES} images of {side} px, yolo.cache {cache}: peak PSS, MB"
        rows.append(row(label, [median(sides[cache]), theirs], MOST_MEMORY))
    found["memory"] = sides
    if theirs and median(sides["ram"]) > MOST_MEMORY * theirs:
        found["missed"].append(f"memory: {median(sides['ram']) / theirs:.2f} of at most {MOST_MEMORY:.2f}")
    return rows


def shapes(count):
    """Sample shapes, a hundred of each seed."""
    folder = ROOT / "sample-data" / f"bench-shapes-{count}"
    if folder.exists():
        return folder
    say(f"making {count} shapes in {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        whole = Path(made) / "whole"
        for seed in range(count // 80):
            part = Path(made) / str(seed)
            subprocess.run([LAUNCH, "sample-data", "--task", "yolo", "--seed", str(seed), "--out", part], check=True, capture_output=True)
            for file in [path for path in part.rglob("*") if path.parent.name in ("train", "val")]:
                to = whole / file.parent.relative_to(part) / f"{seed:03}-{file.name}"
                to.parent.mkdir(parents=True, exist_ok=True)
                file.rename(to)
        (part / "data.yaml").rename(whole / "data.yaml")
        whole.rename(folder)
    return folder


def limit(args, work, found):
    """The same run without a limit and with one, and the package with it."""
    width, side, batch, count, steps, most = LIMIT
    data = shapes(count) / "data.yaml"
    sets = {
        **settings(data, width, side, batch, steps), "train.num_epochs": 1, "yolo.cache": "ram", "train.num_workers": 1,
        "train.warmup_epochs": 0, "data.max_val_windows": 200, "yolo.augment.mosaic": 0.5, "log.log_every": 20,
        "data.chunk_cache_size": 16 << 20,
    }
    group, rows, scores = Group(), [], []
    try:
        for name, bytes in (("free", 1 << 62), ("limited", most)):
            group.limit(bytes)
            kills, log = group.oom_kills(), work / f"{name}.log"
            with open(log, "w") as out:
                ended = group.popen(words(work, name, sets, RANKS), stdout=out, stderr=out, env=ONE_THREAD).wait()
            if ended or group.oom_kills() > kills:
                found["missed"].append(f"limit: {name} ended with {ended}: {log.read_text()[-2000:]}")
                return rows
            last = [record for record in records(work, name) if "val.map50" in record][-1]
            scores.append(last["val.map50"])
            rows.append([f"limit: {name}, mAP50", f"{scores[-1]:.5f}", "-", "-", ""])
            say(f"{name}: mAP50 {scores[-1]:.5f}")
        if args.package:
            job = {"work": "train", "data": str(data), "width": width, "imgsz": side, "batch": batch, "steps": 10, "cache": "ram", "ranks": RANKS}
            kills = group.oom_kills()
            command = [*TORCHRUN, "--standalone", "--nproc-per-node", str(RANKS), PEER, json.dumps(job)]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            ended = group.popen([str(word) for word in command], cwd=data.parent, env=ONE_THREAD, **quiet).wait()
            rows.append([f"limit of {most / 1e9:.1f} GB: exit code, processes killed", "0, 0", f"{ended}, {group.oom_kills() - kills}", "-", ""])
            if not ended:
                found["missed"].append("limit: it does not kill the package, so it shows nothing")
    finally:
        group.remove()
    found["limit"] = scores
    if scores[0] != scores[1]:
        found["missed"].append(f"limit: mAP50 {scores[1]} under it, {scores[0]} without")
    return rows


def growth(args, work, found):
    epochs = 10 if args.quick else 50
    sets = {
        **settings(shapes(80), 0.125, 96, 8, "null"), "train.num_epochs": epochs, "data.max_val_windows": 0, "yolo.nbs": 8, "log.memory_every": 1,
        "train.early_stopping": "false", "log.log_every": 10,
    }
    Job(words(work, "growth", sets, 2), env=ONE_THREAD).wait()
    rows = []
    for rank in range(2):
        lines = [json.loads(line) for line in (work / f"growth/memory.rank{rank}.jsonl").read_text().splitlines()]
        points = [(line["step"], line["uss_bytes"] / 1024) for line in lines if line["phase"] == "train"]
        points = points[len(points) // 5:]
        middle = sum(step for step, _ in points) / len(points)
        slope = sum((step - middle) * uss for step, uss in points) / sum((step - middle) ** 2 for step, _ in points)
        found[f"growth {rank}"] = points
        rows.append([f"{epochs} epochs, {points[-1][0]} steps, rank {rank}: KiB per step", f"{slope:.2f}", "-", "-", str(MOST_GROWTH)])
        if slope > MOST_GROWTH:
            found["missed"].append(f"growth: {slope:.1f} KiB per step")
    said = json.loads(subprocess.run([LAUNCH, "analyze", work / "growth", "--json"], check=True, capture_output=True, text=True).stdout)
    for check in said["checks"]:
        planned, measured = (f"{check[key] / 2**20:.1f}" for key in ("planned_bytes", "measured_bytes"))
        rows.append([f"plan: {check['name']}, MiB: {check['verdict']}", measured, "-", "-", planned])
        if check["verdict"] not in ("true", "bound"):
            found["missed"].append(f"plan: {check['name']}: {check['verdict']}")
    return rows


def row(label, values, goal=None):
    ours, theirs = values
    ratio = f"{ours / theirs:.2f}" if theirs else "-"
    return [label, f"{ours:.1f}", f"{theirs:.1f}" if theirs else "-", ratio, f"{goal:.2g}" if goal else ""]


CASES = {"train": train, "val": val, "memory": memory, "limit": limit, "growth": growth}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.repeats = 1 if args.quick else args.repeats
    args.package = importlib.util.find_spec("ultralytics") is not None
    found, rows = {"missed": []}, []
    with tempfile.TemporaryDirectory() as work:
        for name in args.only.split(","):
            rows += CASES[name](args, Path(work), found)
    table(["", "Headroom", "package", "ratio", "goal"], rows)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))
    if found["missed"]:
        sys.exit("beyond a bound:\n" + "\n".join(found["missed"]))


if __name__ == "__main__":
    main()
