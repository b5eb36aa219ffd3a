"""The page cache's directory: lookups per second over sockets, per policy, and seconds to make a GiB of its memory.

    python tests/benches/directory.py [ARGS of the bench: --ranks 3 --keys 64 --ahead 4 --seconds 2 --gib 1]

No reference to compare with; medians of five runs.
"""

import json
import statistics
import subprocess
import sys

ROUNDS = 5


def build():
    """Builds the bench and returns its path."""
    command = ["cargo", "build", "--release", "-p", "launcher", "--bench", "directory", "--message-format=json"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    artifacts = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    paths = [a["executable"] for a in artifacts if a.get("executable") and a["target"]["name"] == "directory"]
    if not paths:
        sys.exit("cargo built no bench named directory")
    return paths[-1]


def main():
    bench = build()
    runs = {}
    for round_number in range(ROUNDS):
        print(f"round {round_number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        out = subprocess.run([bench, *sys.argv[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout
        for record in map(json.loads, out.splitlines()):
            runs.setdefault(record.get("policy", "memory"), []).append(record)
    for name, records in runs.items():
        keys = [key for key in records[0] if key not in ("policy", "ranks", "keys", "memory_gib")]
        medians = {key: statistics.median(record[key] for record in records) for key in keys}
        print(name.ljust(10), "  ".join(f"{key} {value:,.3f}" for key, value in medians.items()))


if __name__ == "__main__":
    main()
