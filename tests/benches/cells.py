"""Cells per CPU second of the loader (no model), shuffled batches of 128 densified and log1p'd, against loaders of others.

    scripts/bench cells [--cells 100000] [--genes 5000] [--repeats 5] [--quick] [--only TEXT,...] [--peers PYTHON] [--json FILE]

The same sample cells as a plain and as a gzip .h5ad; all runs interleaved, medians, each with its peak PSS. Cases: everything cached,
nothing cached (plain, a copy of it, and gzip by its decoded copy), in blocks. Peers: the seed's dense loader, scipy's CSR in memory, sorted rows by h5py; AnnLoader, annbatch
and scDataset where .bench-venv or `--peers` has them (annbatch needs Python 3.12). Bits of entropy of a batch's labels and entries stand beside those of random batches.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import h5py
import numpy as np

from common import PYTHON, REFERENCE, RELEASE, ROOT, Job, Rows, has, median, say
from loader import built

BATCH = 128
# Share of molecules kept: about 1,000 values a cell, as the atlas has that the goals were measured on.
KEPT = 0.53
# Values of a chunk, as anndata writes a matrix of this size.
CHUNK = 24_521
# Name, layout of the data, options of the bench, and the least cells per CPU second that is accepted.
CASES = [
    ("cached, full shuffle", "csr", dict(cache_share=1.05, epochs=3), 200_000),
    ("plain file, no cache, full shuffle", "csr", dict(cache_share=0, epochs=2), 80_000),
    ("plain file, cache 20 %, full shuffle", "csr", dict(cache_share=0.2, epochs=3), 80_000),
    ("plain file, cache 20 %, blocks", "csr", dict(cache_share=0.2, epochs=2, shuffle="block", policy="lru"), None),
    ("copy of the plain file, cache 20 %, blocks", "csr", dict(cache_share=0.2, epochs=2, shuffle="block", policy="lru", copy="always"), None),
    ("copy of the plain file, cache 20 %, full shuffle", "csr", dict(cache_share=0.2, epochs=3, copy="always"), 80_000),
    ("gzip, cached, full shuffle", "gzip", dict(cache_share=1.05, epochs=3), None),
    ("gzip, cache 20 %, blocks", "gzip", dict(cache_share=0.2, epochs=2, shuffle="block", policy="lru"), 20_000),
    ("gzip, no cache, full shuffle", "gzip", dict(cache_share=0, epochs=2), 20_000),
    ("gzip, cache 20 %, full shuffle", "gzip", dict(cache_share=0.2, epochs=3), 20_000),
]
# Name, layout, cells of an epoch (0: all), module that it needs.
PEERS = [
    ("dense", "csr", 0, "torch"),
    ("csr", "csr", 0, "scipy"),
    ("sorted", "csr", 20_000, "h5py"),
    ("sorted", "gzip", 2_000, "h5py"),
    ("anncollection", "csr", 5_000, "anndata"),
    ("annbatch", "csr", 0, "annbatch"),
    ("annbatch_dense", "csr", 0, "annbatch"),
    ("scdataset", "csr", 20_000, "scdataset"),
]


def data(layout, cells, genes):
    """Sample cells, thinned to the density of the published atlases that the goals were measured on."""
    folder = ROOT / "sample-data" / f"bench-cells-{layout}-{cells}x{genes}"
    path = folder / "cells.h5ad"
    if not path.exists():
        say(f"making sample cells in {folder}")
        with tempfile.TemporaryDirectory(dir=ROOT / "sample-data") as full:
            words = ["--cells", str(cells), "--genes", str(genes)]
            subprocess.run([RELEASE / "launch", "sample-data", "--task", "cell", "--out", Path(full) / "cells", *words], check=True)
            folder.mkdir(exist_ok=True)
            thin(Path(full) / "cells/cells.h5ad", path.with_suffix(".partial"), "gzip" if layout == "gzip" else None)
            path.with_suffix(".partial").rename(path)
    return path


def thin(source, target, compression):
    """Keeps each molecule with probability `KEPT`; writes as anndata does."""
    draws = np.random.default_rng(7)
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)
        for name in ("obs", "var"):
            old.copy(name, new)
        x, pointers = new.create_group("X"), old["X/indptr"][:]
        x.attrs.update(old["X"].attrs)
        parts = [x.create_dataset(name, (0,), old[f"X/{name}"].dtype, maxshape=(None,), chunks=(CHUNK,), compression=compression)
                 for name in ("data", "indices")]
        lengths = []
        for first in range(0, len(pointers) - 1, 4096):
            ends = pointers[first:first + 4097]
            span = slice(ends[0], ends[-1])
            counts = draws.binomial(old["X/data"][span].astype("i8"), KEPT)
            kept = counts > 0
            lengths.append(np.add.reduceat(kept, ends[:-1] - ends[0]))
            for part, values in zip(parts, (counts[kept], old["X/indices"][span][kept])):
                at = len(part)
                part.resize((at + len(values),))
                part[at:] = values
        x["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(old["X/indptr"].dtype)


def once(command):
    """The line of JSON of a run, and its peak PSS."""
    job = Job(command)
    return json.loads(job.wait().splitlines()[-1]), job.peak_bytes


def ours(bench, path, options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return once([bench, "--data", str(path), "--batch", str(BATCH), *words])


def theirs(python, name, path, samples):
    job = {"peer": name, "data": str(path), "batch": BATCH, "epochs": 2, "samples": samples}
    return once([python, str(REFERENCE / "cells_peers.py"), json.dumps(job)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--only", default="", help="cases and peers whose names contain one of these texts")
    parser.add_argument("--peers", default=PYTHON, help="an interpreter with PyTorch and peers that .bench-venv lacks")
    parser.add_argument("--json", help="write every figure to this file")
    args = parser.parse_args()
    bench = built("cells")
    wanted = lambda name: any(text in name for text in args.only.split(","))
    paths = {layout: data(layout, args.cells, args.genes) for layout in ("csr", "gzip")}
    homes = {module: next((python for python in (PYTHON, args.peers) if has(python, module)), None) for *_, module in PEERS}
    found = {}
    for repeat in range(1 if args.quick else args.repeats):
        for name, layout, options, _goal in CASES:
            if not wanted(name):
                continue
            say(f"{name}, repeat {repeat + 1}")
            found.setdefault(("Headroom", name), []).append(ours(bench, paths[layout], options))
        for name, layout, samples, module in PEERS:
            if homes[module] is None or not wanted(name):
                continue
            say(f"{name} on {layout}, repeat {repeat + 1}")
            found.setdefault((name, layout), []).append(theirs(homes[module], name, paths[layout], samples))
    table = Rows(["cells per CPU second", "last epoch", "first", "per s", "goal", "peak MiB", "labels", "entries"], first=58)
    goals = {name: goal for name, _layout, _options, goal in CASES}
    for (who, name), runs in found.items():
        of = lambda n, key: median(run["epochs"][n][key] for run, _ in runs)
        bits = runs[-1][0].get("entropy", {})
        mixed = lambda key: f"{bits[key]:.2f}/{bits[key + '_random']:.2f}" if bits else ""
        goal = goals.get(name) if who == "Headroom" else None
        table.add([f"{who}: {name}", f"{of(-1, 'samples_per_cpu_s'):,.0f}", f"{of(0, 'samples_per_cpu_s'):,.0f}", f"{of(-1, 'samples_per_s'):,.0f}",
                   f"{goal:,}" if goal else "", f"{median(peak for _, peak in runs) / 2**20:,.0f}", mixed("labels"), mixed("entries")])
    if of_us := [runs for (who, _), runs in found.items() if who == "Headroom"]:
        line = of_us[0][0][0]
        print(f"\n{line['bytes_per_cell']:,.0f} bytes per cached cell, {line['bytes_per_value']:.2f} per value that is not 0")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({f"{who}: {name}": runs for (who, name), runs in found.items()}, file, indent=1)


if __name__ == "__main__":
    main()
