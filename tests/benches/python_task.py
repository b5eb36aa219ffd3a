"""A user's PyTorch model by task python against torchrun + DDP + DataLoader: samples/s, first step, memory, overhead of a step"""

import json
import os
import shutil
import statistics
import sys
import tempfile

from common import PYTHON, REFERENCE, RELEASE, TORCHRUN, Job

RANKS, BATCH, SAMPLES, EPOCHS = 2, 32, 2048, 4


def torchrun(kind, ranks, samples, epochs):
    words = [*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", REFERENCE / "python_torch.py", kind, samples, epochs, BATCH, 1]
    job = Job([str(word) for word in words], env=dict(os.environ, OMP_NUM_THREADS="1"))
    told = json.loads(job.wait().strip().splitlines()[-1])
    first, step_ms = told["first"] - job.started, told["step_ms"]
    return {"rate": told["rate"], "first": first, "wall": job.wall_s, "pss": job.peak_bytes / 2**20, "step_ms": step_ms}


def headroom(kind, ranks, samples, epochs):
    runs = tempfile.mkdtemp()
    sets = {
        "python.build": "python_torch:build", "python.path": f"[{REFERENCE}]", "python.interpreter": PYTHON,
        "python.args": f"{{kind: {kind}, samples: {samples}}}", "train.batch_size": BATCH, "train.num_epochs": epochs,
        "train.warmup_epochs": 0, "train.early_stopping": "false", "train.gradient_clip_norm": 0, "log.runs_dir": runs,
        "log.plots": "false", "train.restore_best_weights": "false", "train.num_workers": 1,
    }
    command = [str(RELEASE / "launch"), "--ranks", str(ranks), "--name", "a", "--python", "python_torch:build"]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    job = Job(command)
    job.wait()
    records = [json.loads(line) for line in open(f"{runs}/a/metrics.jsonl")]
    memory = [json.loads(line) for line in open(f"{runs}/a/memory.rank0.jsonl")]
    per_epoch = samples // (BATCH * ranks)
    later = [record for record in records if record["step"] > per_epoch and record.get("step_s")]
    step_s = statistics.median(record["step_s"] for record in later)
    trained = [record["t"] for record in memory if record["step"] >= 1]
    shutil.rmtree(runs)
    first, rate = min(trained) - job.started, BATCH * ranks / step_s
    return {"rate": rate, "first": first, "wall": job.wall_s, "pss": job.peak_bytes / 2**20, "step_ms": 1e3 * step_s}


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    cases = [("small", RANKS, SAMPLES, EPOCHS), ("tiny", 1, 32 * 400, 4)]
    for case in cases:
        seen = {"headroom": [], "torchrun": []}
        headroom(*case)  # measured and kept: what a second start finds
        for _ in range(rounds):
            seen["headroom"].append(headroom(*case))
            seen["torchrun"].append(torchrun(*case))
        for name, results in seen.items():
            middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
            print(
                f"{case[0]:6} {case[1]} ranks {name:9} {middle['rate']:9.0f} samples/s in later epochs, step {middle['step_ms']:.3f} ms, "
                f"first step {middle['first']:.1f} s, wall {middle['wall']:.1f} s, peak PSS {middle['pss']:.0f} MiB", flush=True,
            )


if __name__ == "__main__":
    main()
