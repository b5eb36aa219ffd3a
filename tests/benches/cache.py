"""The shared page cache on real files: hit rates of its policies by share cached, and chunks decoded per chunk and epoch.

    scripts/bench cache [--quick] [--json FILE]

Three ranks (threads of one process, each with its own client and loader, in step) read gzip files through one page cache;
no model. Hit rates: windows of a whole chunk, so that an epoch reads each entry once; from the second epoch on, lookups
of the directory. Chunks decoded: windows of a 16th of a chunk under global shuffle, beside the clairvoyant optimum by
chunk of the same order; `next_use` with entries of whole chunks, and as it chooses itself. The mean of the epochs after the
first. A figure past its limit ends the bench with 1.
"""

import argparse
import json
import math
import sys

from common import ROOT, sample_data, say, table
from loader import built, run

# Most reads of a chunk per epoch with 16 windows in it and a quarter cached.
BY_WINDOW = 2.3
SHARES = [5, 17, 35, 50, 75]
RANKS = {"ranks": 3, "threads": 1, "chunk_cache_mb": 0}
WHOLE = {**RANKS, "window": 2000, "stride": 2000, "batch": 1, "slots": 3}
PARTS = {**RANKS, "window": 125, "stride": 125, "per_chunk": 16, "batch": 4, "slots": 1}


def hit_rate(epochs):
    """Hits over lookups of the epochs after the first."""
    counts = [epoch["cache"] for epoch in epochs[1:]]
    hits = sum(count["hits"] for count in counts)
    return hits / sum(count[name] for count in counts for name in ("hits", "misses", "bypasses"))


def theory(policy, share):
    """What a policy hits where each epoch reads every entry once, in a new random order; None: no closed form."""
    f = share / 100
    return {"pin": f, "lru": f + (1 - f) * math.log(1 - f)}.get(policy)


def hit_rates(bench, data, epochs):
    rows, failed, found = [], [], []
    for share in SHARES:
        row = [f"{share} %"]
        for policy in ("pin", "lru", "next_use"):
            lines = run(bench, data, cache_share=share / 100, policy=policy, epochs=epochs, **WHOLE)
            rate, expected = hit_rate(lines["epochs"]), theory(policy, share)
            found.append({"share": share, "policy": policy, "hit_rate": rate, "theory": expected})
            row.append(f"{100 * rate:.2f} %")
            if expected is not None:
                row.append(f"{100 * expected:.2f} %")
                if abs(rate - expected) > {"pin": 0.01, "lru": 0.02}[policy]:
                    failed.append(f"{policy} at {share} %: {rate:.4f}, expected {expected:.4f}")
        rows.append(row)
    table(["cached", "pin", "share", "lru", "f+(1-f)ln(1-f)", "next_use"], rows)
    return failed, found


def reads(bench, data, epochs):
    rows, failed, found = [], [], []
    for share in (25, 50):
        for policy, entries in (("lru", "chunk"), ("pin", "chunk"), ("next_use", "chunk"), ("next_use", "auto")):
            say(f"{share} % cached, {policy}, {entries}")
            line = run(bench, data, cache_share=share / 100, policy=policy, entries=entries, epochs=epochs, **PARTS)
            later = [epoch["decoded_chunks"] for epoch in line["epochs"][1:]]
            decoded, least = sum(later) / len(later) / line["entries"], line["optimum"]
            found.append({"share": share, "policy": policy, "entries": entries, "reads": decoded, "optimum": least})
            rows.append([f"{share} % {policy}, {entries}", f"{decoded:.2f}", f"{least:.2f}", f"{decoded / least:.3f}"])
            # By window: the limit for a quarter cached.
            limit = {("next_use", "chunk"): 1.1 * least, ("next_use", "auto"): BY_WINDOW if share == 25 else least}
            if decoded > limit.get((policy, entries), math.inf):
                failed.append(f"next_use, entries {entries}, at {share} %: {decoded:.2f} reads per chunk and epoch")
    table(["cached, policy, entries", "decoded per chunk and epoch", "optimum", "ratio"], rows)
    return failed, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two epochs, of fewer files")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    bench = built()
    name, sessions = ("gzip", 12) if args.quick else ("gzip-many", 60)
    data = sample_data(ROOT / "sample-data" / f"bench-{name}", "gzip", sessions)
    print("hit rate, an epoch reads each entry once, three ranks:")
    failed, rates = hit_rates(bench, data, 2 if args.quick else 5)
    print(f"\nchunks decoded per chunk and epoch, {PARTS['per_chunk']} windows in each chunk, global shuffle, three ranks:")
    late, decoded = reads(bench, data, 3 if args.quick else 6)
    simulated = run(bench, data, simulate=1)["simulated"]
    print("\nsimulated through the same directory, 16 samples per chunk, a quarter cached, reads per chunk and epoch:")
    table(["policy", "reads"], [[key, f"{value:.2f}"] for key, value in simulated.items()])
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"hit_rates": rates, "reads": decoded, "simulated": simulated}, file, indent=1)
    sys.exit("\n".join(failed + late) or 0)


if __name__ == "__main__":
    main()
