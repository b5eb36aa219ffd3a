"""Forward + backward of the EMG model on one process: Headroom against the same model in PyTorch, in turn."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import PYTHON, REFERENCE, ROOT, median, say, table


def binary():
    """Builds the bench and returns its path."""
    command = ["cargo", "build", "--release", "--bench", "step", "--message-format=json"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    artifacts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    paths = [a["executable"] for a in artifacts if a.get("executable") and a["target"]["name"] == "step"]
    if not paths:
        sys.exit("cargo built no bench named step")
    return paths[-1]


def run(command, config, args):
    command = [*command, "--config", config, "--batch", str(args.batch), "--window", str(args.window),
               "--steps", str(args.steps), "--threads", str(args.threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", default="default,high_performance,quick_demo")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of one run; its figure is their median")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, in turn")
    parser.add_argument("--binary", help="the built bench; else it is built")
    parser.add_argument("--json")
    args = parser.parse_args()
    sides = {"pytorch": [PYTHON, REFERENCE / "emg_torch.py"], "headroom": [args.binary or binary()]}
    figures, rows = {}, []
    for config in args.configs.split(","):
        runs = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, command in sides.items():
                say(f"{config}: {name}, run {len(runs[name]) + 1} of {args.repeats}")
                runs[name].append(run(command, config, args))
        parameters = {of[0]["parameters"] for of in runs.values()}
        if len(parameters) != 1:
            sys.exit(f"{config}: the sides count {sorted(parameters)} parameters: they are not the same model")
        ms = {name: median([r["ms"] for r in of]) for name, of in runs.items()}
        best = {name: min(r["ms"] for r in of) for name, of in runs.items()}
        figures[config] = {"runs": runs, "median_ms": ms, "least_ms": best, "speedup": ms["pytorch"] / ms["headroom"]}
        rows.append([config, f"{ms['headroom']:.1f}", f"{ms['pytorch']:.1f}", f"{ms['pytorch'] / ms['headroom']:.2f}",
                     f"{best['pytorch'] / best['headroom']:.2f}"])
    print(f"forward + backward, batch {args.batch}, {args.window} samples, {args.threads} thread(s) of "
          f"{os.cpu_count()} cores; medians of {args.repeats} runs in turn, ms")
    table(["config", "Headroom", "PyTorch", "times as fast", "by least"], rows)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
