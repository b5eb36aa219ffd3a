"""Samples per second of the loader (no model) against PyTorch's DataLoader over h5py, same files, same cores, interleaved.

    scripts/bench loader [--repeats 5] [--quick] [--json FILE]

Cases: uncompressed files; gzip files, first and later epochs; gzip files with a cache far smaller than the data (a tenth),
40 windows per chunk, by shuffle mode and policy. Two workers against two loader threads, batches of 64 windows of 500
rows at stride 50, files warm in the kernel's cache. Medians. `goal` is the least ratio that is accepted.
"""

import argparse
import json
import subprocess
import sys

from common import PYTHON, REFERENCE, ROOT, Rows, median, sample_data, say

# Name, layout and sessions of the sample data.
DATA = [("contiguous", "contiguous", 12), ("gzip", "gzip", 12), ("gzip-many", "gzip", 60)]
WORKERS = 2
BATCH = 64


def built(bench="loader"):
    """Path of the bench binary."""
    command = ["cargo", "build", "--release", "--bench", bench, "--message-format=json"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    artifacts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    paths = [a["executable"] for a in artifacts if a.get("executable") and a["target"]["name"] == bench]
    if not paths:
        sys.exit(f"cargo built no bench named {bench}")
    return paths[-1]


def run(bench, data, **options):
    """One run of the bench binary: its line of JSON. Options as on its command line, `cache_share=0.1` for `--cache-share 0.1`."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([bench, "--data", str(data), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{bench} {words}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def torch_epochs(files, epochs, rdcc_nbytes, samples=0):
    """Samples/s of each epoch of PyTorch's DataLoader."""
    job = {"files": files, "batch": BATCH, "samples": samples, "epochs": epochs, "workers": WORKERS, "rdcc_nbytes": rdcc_nbytes}
    script = REFERENCE / "loader_torch.py"
    out = subprocess.run([PYTHON, script, json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])["samples_per_s"]


def first(rates):
    return rates[0]


def later(rates):
    return median(rates[1:])


# Name, goal (times PyTorch), layout, options of the bench, PyTorch's options, and which epochs count.
FULL = {"cache_share": 1.05, "epochs": 6}
TORCH = {"epochs": 3, "rdcc_nbytes": 64 << 20}
SMALL = {"cache_share": 0.1, "epochs": 2, "chunk_cache_mb": 1}
# PyTorch with h5py's own chunk cache of 1 MiB per file, on as many samples as take a few seconds.
SLOW = {"epochs": 1, "rdcc_nbytes": 1 << 20, "samples": 1500}
HITS = {"cache_share": 1.05, "epochs": 2, "window": 4, "stride": 10, "threads": 1}
CASES = [
    ("uncompressed, first epoch", None, "contiguous", FULL, TORCH, first),
    ("uncompressed, later epochs", 8, "contiguous", FULL, TORCH, later),
    ("uncompressed, no page cache", None, "contiguous", {**FULL, "cache_share": 0}, TORCH, later),
    ("gzip, first epoch", 4, "gzip", FULL, TORCH, first),
    ("gzip, later epochs", 8, "gzip", FULL, TORCH, later),
    ("gzip, cache 10 %, block shuffle", 15, "gzip-many", {**SMALL, "shuffle": "block", "shuffle_window": 16}, SLOW, median),
    # Whole epochs: a policy that looks ahead counts on what comes.
    ("gzip, cache 10 %, global, next_use", None, "gzip-many", SMALL, SLOW, median),
    ("gzip, cache 10 %, global, by chunk", None, "gzip-many", {**SMALL, "entries": "chunk"}, SLOW, median),
    ("gzip, cache 10 %, global, pin", None, "gzip-many", {**SMALL, "samples": 3000, "policy": "pin"}, SLOW, median),
    ("gzip, cache 10 %, global, lru", None, "gzip-many", {**SMALL, "samples": 3000, "policy": "lru"}, SLOW, median),
]


def settings(options):
    return json.dumps(options, sort_keys=True)


class Runs:
    """Runs of both sides in turn. Cases of the same runs share them."""

    def __init__(self, bench, folders):
        self.bench, self.folders, self.done = bench, folders, {}
        self.files = {layout: run(bench, folder, epochs=0)["files"] for layout, folder in folders.items()}

    def once(self, name, work):
        if name not in self.done:
            say(" ".join(map(str, name)))
            self.done[name] = work()
        return self.done[name]

    def case(self, repeat, layout, options, reference):
        """Epochs of one repeat: PyTorch's rates, and the line of the bench."""
        theirs = self.once(("PyTorch", repeat, layout, settings(reference)), lambda: torch_epochs(self.files[layout], **reference))
        ours = self.once(("Headroom", repeat, layout, settings(options)), lambda: run(
            self.bench, self.folders[layout], threads=WORKERS, batch=BATCH, memcpy=1, **options))
        return theirs, ours


def measure(runs, case, repeats):
    """Rates and shares of memcpy of one case."""
    _name, _goal, layout, options, reference, of = case
    found = {"torch": [], "headroom": [], "memcpy": []}
    for repeat in range(1, repeats + 1):
        theirs, ours = runs.case(repeat, layout, options, reference)
        found["torch"].append(of(theirs))
        found["headroom"].append(of([epoch["samples_per_s"] for epoch in ours["epochs"]]))
        delivered = of([epoch["bytes_per_s"] for epoch in ours["epochs"]])
        found["memcpy"].append(delivered / ours["memcpy_bytes_per_s"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    bench = built()
    folders = {name: sample_data(ROOT / "sample-data" / f"bench-{name}", layout, sessions) for name, layout, sessions in DATA}
    repeats = 1 if args.quick else args.repeats
    runs, found = Runs(bench, folders), {}
    table = Rows(["samples/s", "PyTorch", "Headroom", "ratio", "goal", "of memcpy"], first=36)
    for case in CASES:
        name, goal = case[:2]
        found[name] = measure(runs, case, repeats)
        theirs, ours = median(found[name]["torch"]), median(found[name]["headroom"])
        # Of each pair, so that a busy machine slows both sides.
        ratio = median(h / t for h, t in zip(found[name]["headroom"], found[name]["torch"]))
        share = 100 * median(found[name]["memcpy"])
        table.add([name, f"{theirs:,.0f}", f"{ours:,.0f}", f"{ratio:.1f}×", f"{goal}×" if goal else "", f"{share:.0f} %"])
    hits = [run(bench, folders["contiguous"], hits=1, **HITS)["hit_us"] for _ in range(repeats)]
    print(f"\na read whose entry is cached, 4 rows, directory's round trips included: {median(hits):.2f} us per sample (goal: 2)")
    if args.json:
        found["hit_us"] = hits
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
