"""All-reduce over CPU ranks: Headroom's shared memory against gloo, call by call in turn.

    python tests/benches/allreduce.py [--ranks 3] [--mib 25] [--rounds 15] [--binary PATH]

Needs PyTorch with gloo. Both sides keep their processes over the whole run and sleep while the other works. A call counts
with its slowest rank. `copy` is the yardstick: every rank copies a buffer of the same size once, all at the same time.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time


def build():
    """Builds the bench and returns its path."""
    command = ["cargo", "build", "--release", "--bench", "allreduce", "--message-format=json"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    artifacts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    paths = [a["executable"] for a in artifacts if a.get("executable") and a["target"]["name"] == "allreduce"]
    if not paths:
        sys.exit("cargo built no bench named allreduce")
    return paths[-1]


def gloo_rank(rank, ranks, port, mib, pipe):
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    flat = torch.zeros(mib << 18)
    pipe.send("ready")
    while pipe.recv():
        flat.fill_(rank + 1)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        seconds = time.perf_counter() - start
        assert flat[-1].item() == ranks * (ranks + 1) / 2
        pipe.send(seconds)
    dist.destroy_process_group()


class Gloo:
    def __init__(self, ranks, mib):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=gloo_rank, args=(rank, ranks, port, mib, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def measure(self):
        for pipe in self.pipes:
            pipe.send(True)
        return max(pipe.recv() for pipe in self.pipes)

    def close(self):
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join()


class Headroom:
    def __init__(self, binary, ranks, mib):
        command = [binary, str(ranks), str(mib)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--mib", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--binary")
    args = parser.parse_args()
    ours = Headroom(args.binary or build(), args.ranks, args.mib)
    gloo = Gloo(args.ranks, args.mib)
    sides = {
        "copy": lambda: ours.measure("copy"),
        "gloo": gloo.measure,
        "headroom": lambda: ours.measure("reduce"),
        "headroom, other tensors": lambda: ours.measure("staged"),
    }
    times = {name: [] for name in sides}
    for round_number in range(args.rounds + 2):
        print(f"round {round_number + 1} of {args.rounds + 2}", file=sys.stderr, flush=True)
        for name, measure in sides.items():
            seconds = measure()
            if round_number >= 2:
                times[name].append(seconds * 1e3)
    ours.close()
    gloo.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"all-reduce of {args.mib} MiB over {args.ranks} ranks, {os.cpu_count()} cores, {args.rounds} rounds in turn")
    print(f"{'':24} {'median ms':>10} {'min':>8} {'max':>8} {'copies':>8} {'x gloo':>8}")
    for name, values in times.items():
        copies, speed = medians[name] / medians["copy"], medians["gloo"] / medians[name]
        print(f"{name:24} {medians[name]:10.2f} {min(values):8.2f} {max(values):8.2f} {copies:8.2f} {speed:8.2f}")


if __name__ == "__main__":
    main()
