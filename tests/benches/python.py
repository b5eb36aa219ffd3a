"""The Python package against PyTorch's DataLoader: samples/s, decodes, memory; the cache of 4 ranks x 4 workers; Cache.get per second.

usage: scripts/bench python [--rounds N] [--samples N] [--short] [--peers PYTHON]
Each program runs in its own processes, one kind after the other in every round; medians over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PACKAGE = os.path.join(ROOT, "launcher", "python")
# `disk`: a cache of a quarter, and a file for the rest.
OURS = ("headroom", "quarter", "disk")
KINDS = (*OURS, "dataloader", "dict")
PEERS = {"streaming": "mosaicml-streaming", "litdata": "litdata"}
EPOCHS = 4
BATCH = 64


class Heavy:
    """Samples of 64 KiB that take about a millisecond to decode."""

    def __init__(self, count):
        self.count = count
        noise = np.random.default_rng(0).integers(0, 40, 256 * 256, dtype=np.uint8)
        self.packed = zlib.compress(noise.tobytes(), 1)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raw = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        image = (raw[:16384].astype(np.float32) * 0.1 + index) % 7
        return np.sqrt(image + 1).reshape(1, 128, 128), index


class Pictures:
    """JPEG pictures of 256 x 256."""

    def __init__(self, count):
        import io

        from PIL import Image

        self.count = count
        made = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(made).resize((256, 256)).save(file, "JPEG", quality=90)
        self.bytes = file.getvalue()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        import io

        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.bytes)).convert("RGB")).transpose(2, 0, 1).copy(), index


DATA = {"heavy": Heavy, "jpeg": Pictures}
WINDOW, STRIDE, ROWS, SESSIONS = 500, 250, 60_000, 4


def sessions(folder):
    """HDF5 files of rows with 16 and 20 floats, in chunks of 1,000 rows, gzip + shuffle."""
    import h5py

    random = np.random.default_rng(0)
    for number in range(SESSIONS):
        rows = np.zeros(ROWS, dtype=[("time", "f8"), ("emg", "f4", (16,)), ("joint_angles", "f4", (20,))])
        # As sensors give them: steps of a converter.
        rows["emg"] = random.integers(-2000, 2000, (ROWS, 16)) * 1e-3
        rows["joint_angles"] = np.cumsum(random.normal(size=(ROWS, 20)), 0).round(2)
        rows["time"] = np.arange(ROWS) / 2000
        with h5py.File(os.path.join(folder, f"s{number}.hdf5"), "w") as file:
            file.create_dataset("emg2pose/timeseries", data=rows, chunks=(1000,), compression="gzip", compression_opts=1, shuffle=True)


class H5Windows:
    """The same windows by h5py, files opened once per worker."""

    def __init__(self, folder):
        self.paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
        self.each = (ROWS - WINDOW) // STRIDE + 1
        self.files = None

    def __len__(self):
        return self.each * len(self.paths)

    def __getitem__(self, index):
        import h5py

        if self.files is None:
            self.files = [h5py.File(path)["emg2pose/timeseries"] for path in self.paths]
        start = index % self.each * STRIDE
        rows = self.files[index // self.each][start: start + WINDOW]
        return {"emg": np.ascontiguousarray(rows["emg"]), "joint_angles": np.ascontiguousarray(rows["joint_angles"])}


def windows(kind, folder):
    """One program over HDF5 windows; prints a line of JSON."""
    import torch

    torch.set_num_threads(1)
    if kind == "headroom":
        sys.path.insert(0, PACKAGE)
        import headroom_train as headroom

        data = headroom.hdf5(folder, columns=("emg", "joint_angles"), window=WINDOW, stride=STRIDE)
        loader = headroom.DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True)
    else:
        from torch.utils.data import DataLoader

        data = H5Windows(folder)
        loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True)
    times, first, steps = [], None, len(data) // BATCH * BATCH
    for _ in range(EPOCHS if kind == "headroom" else 2):
        began = time.perf_counter()
        for batch in loader:
            if first is None:
                first = time.perf_counter() - began
            assert batch["emg"].shape == (BATCH, WINDOW, 16)
        times.append(time.perf_counter() - began)
    del batch
    anonymous, shared = memory_of([os.getpid(), *children()])
    chunks = data.native().counts()[1] if kind == "headroom" else None
    print(json.dumps(dict(first=steps / times[0], later=[steps / t for t in times[1:]], first_batch_s=first,
                          anonymous=anonymous, shared=shared, decodes=chunks)), flush=True)


def bench_windows(rounds):
    with tempfile.TemporaryDirectory() as folder:
        sessions(folder)
        found = {kind: [] for kind in ("headroom", "dataloader")}
        for _ in range(rounds):
            for kind in found:
                command = [sys.executable, os.path.abspath(__file__), "--windows", kind, folder]
                found[kind].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]))
    print(f"\nHDF5 windows of {WINDOW} rows every {STRIDE}, {SESSIONS} files, gzip + shuffle, batch {BATCH}, 2 workers or threads, medians of {rounds}")
    base = None
    for kind in ("dataloader", "headroom"):
        first = statistics.median(run["first"] for run in found[kind])
        later = statistics.median(sum((run["later"] for run in found[kind]), []))
        base = base or (first, later)
        print(f"{kind:12}{first:>10.0f}/s first ({first / base[0]:.1f} x){later:>10.0f}/s later ({later / base[1]:.1f} x), anonymous "
              f"{found[kind][0]['anonymous']} MiB, shared {found[kind][0]['shared']} MiB, chunks decoded {found[kind][0]['decodes']}")


def memory_of(pids):
    """PSS of anonymous memory, and of shared memory, MiB."""
    anonymous = shared = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss_Anon:"):
                    anonymous += int(line.split()[1])
                elif line.startswith("Pss_Shmem:"):
                    shared += int(line.split()[1])
    return anonymous >> 10, shared >> 10


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


class Kept:
    """What a worker decoded, kept in that worker."""

    def __init__(self, data):
        self.data, self.kept = data, {}

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index not in self.kept:
            self.kept[index] = self.data[index]
        return self.kept[index]


def one(kind, data, samples):
    """One program; prints a line of JSON."""
    import torch

    torch.set_num_threads(1)
    made = DATA[data](samples)
    sample_bytes = made[0][0].nbytes + 8
    if kind in OURS:
        sys.path.insert(0, PACKAGE)
        import headroom_train as headroom

        # An entry has a head of some 200 bytes.
        headroom.configure(cache=(sample_bytes + 512) * samples * (1 if kind == "headroom" else 0.25) + (1 << 20))
        disk = tempfile.mkdtemp(prefix="headroom-bench-") if kind == "disk" else None
        loader = headroom.DataLoader(headroom.cached(made, disk=disk), batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True)
    else:
        from torch.utils.data import DataLoader

        loader = DataLoader(made if kind == "dataloader" else Kept(made), batch_size=BATCH, shuffle=True, num_workers=2,
                            persistent_workers=True, drop_last=True)
    times, first = [], None
    for _ in range(EPOCHS):
        began = time.perf_counter()
        for x, y in loader:
            if first is None:
                first = time.perf_counter() - began
            assert x.shape[0] == BATCH
        times.append(time.perf_counter() - began)
    del x, y
    anonymous, shared = memory_of([os.getpid(), *children()])
    decodes = loader.decodes if kind in OURS else None
    steps = samples // BATCH * BATCH
    print(json.dumps(dict(first=steps / times[0], later=[steps / t for t in times[1:]], first_batch_s=first,
                          anonymous=anonymous, shared=shared, decodes=decodes)), flush=True)
    if kind in OURS:
        loader.close()
    if kind == "disk":
        # Nothing is left in it.
        os.rmdir(disk)


RANK = """
import json, os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import numpy as np
import python as bench
import headroom_train as headroom
from headroom_train import _native
folder, samples = sys.argv[3], int(sys.argv[4])
class Plain:
    def __len__(self):
        return samples
    def __getitem__(self, index):
        return np.full(16384, index, np.float32), index
loader = headroom.DataLoader(headroom.cached(Plain(), name="memory"), batch_size=8, shuffle=True, num_workers=4)
for _ in range(6):
    for batch in loader:
        pass
del batch
def meet(name):
    open(os.path.join(folder, f"{name} {os.getpid()}"), "w").close()
    while sum(file.startswith(name) for file in os.listdir(folder)) < 4:
        time.sleep(0.01)
meet("read")
shared = tables = 0
for pid in [os.getpid(), *bench.children()]:
    shared += sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss_Shmem"))
    if pid != os.getpid():
        continue
    tables += sum(int(line.split()[1]) for line in open(f"/proc/{pid}/status") if line.startswith("VmPTE"))
stats = headroom.stats()
meet("looked")
loader.close()
print(json.dumps(dict(shared=shared, tables=tables, used=stats["used_bytes"], decodes=stats["node_decodes"])))
"""


def shared_memory(samples):
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(4):
            env = dict(os.environ, RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="4",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000), HEADROOM_CACHE_SIZE="1GiB")
            command = [sys.executable, "-c", RANK, PACKAGE, HERE, folder, str(samples)]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        found = [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]
    data = found[0]["used"] / 1024
    pss, tables = sum(one["shared"] for one in found), sum(one["tables"] for one in found)
    print(f"4 ranks x 4 workers, {data / 1024:.0f} MiB of samples: cache in PSS {pss / data:.3f} x the data; page tables of the ranks "
          f"(of all they map) {tables / 1024:.1f} MiB; decodes {found[0]['decodes']} of {samples}")


GETS = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import headroom_train as headroom
cache = headroom.Cache()
for key in range(2000):
    cache.put(key, np.full(1024, key, np.float32))
best = 0
for _ in range(7):
    began = time.perf_counter()
    for _ in range(10):
        for key in range(2000):
            cache.get(key)
    best = max(best, 20000 / (time.perf_counter() - began))
assert all(cache.get(key)[5] == key for key in range(2000))
print(f"Cache.get without copies: {best:,.0f} per second and process (best of 7)")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--short", action="store_true", help="two rounds, the heavy samples alone")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--windows", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peers", default=sys.executable, help="a Python that has torch, mosaicml-streaming and litdata")
    parser.add_argument("--only", choices=[*DATA, "windows", "memory", "gets"], help="this part alone")
    args = parser.parse_args()
    if args.one:
        return one(args.one[0], args.one[1], int(args.one[2]))
    if args.windows:
        return windows(*args.windows)
    rounds, data = (2, ["heavy"]) if args.short else (args.rounds, list(DATA))
    data = [name for name in data if args.only in (None, name)]
    build()
    if args.only in (None, "windows"):
        bench_windows(rounds)
    for name in data:
        kinds = [*KINDS, *peers(args.peers)]
        found = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                command = [sys.executable, os.path.abspath(__file__), "--one", kind, name, str(args.samples)]
                if kind in PEERS:
                    command = [args.peers, os.path.join(HERE, "reference", "python_peers.py"), kind, name, str(args.samples)]
                found[kind].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]))
        print(f"\n{name}: {args.samples} samples, batch {BATCH}, 2 workers, medians of {rounds} rounds of {EPOCHS} epochs")
        print(f"{'':12}{'first epoch':>12}{'later':>10}{'first batch':>13}{'anonymous':>11}{'shared':>9}{'decodes':>9}")
        base = statistics.median(sum((one["later"] for one in found["dataloader"]), []))
        for kind in kinds:
            runs = found[kind]
            median = lambda key: statistics.median(run[key] for run in runs)
            later = statistics.median(sum((run["later"] for run in runs), []))
            decodes = runs[0]["decodes"] if runs[0]["decodes"] is not None else args.samples // BATCH * BATCH * EPOCHS
            print(f"{kind:12}{median('first'):>10.0f}/s{later:>8.0f}/s{median('first_batch_s') * 1000:>10.0f} ms"
                  f"{median('anonymous'):>7.0f} MiB{median('shared'):>5.0f} MiB{decodes:>9}   later {later / base:.1f} x DataLoader"
                  + (f", after {median('converted_s'):.1f} s of conversion" if kind in PEERS else ""))
    if args.only in (None, "memory"):
        shared_memory(1024)
    if args.only in (None, "gets"):
        subprocess.run([sys.executable, "-c", GETS, PACKAGE], check=True)
    return 0


def peers(python):
    """Those that this interpreter can import."""
    for kind, package in PEERS.items():
        if subprocess.run([python, "-c", f"import torch, {kind}"], capture_output=True).returncode == 0:
            yield kind
        else:
            print(f"{kind} is left out: {python} -m pip install {package}", flush=True)


def build():
    """The extension beside the package's sources."""
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "headroom-train"], check=True, cwd=ROOT)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    built = os.path.join(PACKAGE, "headroom_train", "_native.abi3.so")
    with open(os.path.join(target, "release", "lib_native.so"), "rb") as source, open(built + ".new", "wb") as to:
        to.write(source.read())
    os.replace(built + ".new", built)


if __name__ == "__main__":
    sys.exit(main())
