"""Several processes of one node: one decode, one copy, one order."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from helpers import HERE, Numbers, headroom, listed, ranks

EPOCHS = """
import json, sys
from helpers import *
log, workers, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = headroom.cached(Numbers(90, log), name="ranks")
it = headroom.DataLoader(data, global_batch_size=18, shuffle=True, seed=5, num_workers=workers, pad=False)
together(sys.argv[4], it.world_size)
seen = [ids_of(it) for _ in range(epochs)]
it.close()
print(json.dumps(dict(seen=seen, stats=headroom.stats(), rank=it.rank)))
"""


def test_ranks_share_one_decode_and_one_order():
    for world, workers in ((1, 1), (2, 0), (3, 1)):
        with tempfile.TemporaryDirectory() as folder:
            log = os.path.join(folder, "log")
            found = ranks(world, EPOCHS, [log, workers, 3, folder])
            decoded = sorted(listed(open(log)))
            assert decoded == list(range(90)), (len(decoded), [one["stats"] for one in found])
            steps = [[sorted(sum((one["seen"][epoch][step] for one in found), [])) for step in range(5)] for epoch in range(3)]
            if world == 1:
                expected = steps
            assert steps == expected, world


TOGETHER = """
import json, os, sys, time
from helpers import *
folder, count = sys.argv[1], int(sys.argv[2])
cache = headroom.Cache("together")
def make(key):
    open(os.path.join(folder, f"made {key} {os.getpid()}"), "w").close()
    time.sleep(0.02)
    return np.full(1000, key)
import numpy as np
total = sum(int(cache.get_or(key, lambda: make(key))[0]) for key in range(count))
together(folder, 3)
print(json.dumps(dict(total=total, hosts=headroom.stats()["hosts"])))
"""


def test_what_several_ranks_want_at_once_is_made_once():
    with tempfile.TemporaryDirectory() as folder:
        found = ranks(3, TOGETHER, [folder, 30])
        assert [one["total"] for one in found] == [435] * 3 and sum(one["hosts"] for one in found) == 1
        made = [name for name in os.listdir(folder) if name.startswith("made")]
        assert len(made) == 30, made


HOST_DIES = """
import json, os, signal, sys, time
from helpers import *
data = headroom.cached(Numbers(200), name="dies")
it = headroom.DataLoader(data, batch_size=10, shuffle=True, num_workers=1)
from headroom_train import node
seen = ids_of(it)
if node.node().hosts:
    open(sys.argv[1], "w").close()
    while not os.path.exists(sys.argv[1] + ".ready"):
        time.sleep(0.01)
    print(json.dumps(dict(hosts=True, seen=len(seen))), flush=True)
    os._exit(0)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(0.3)
again = ids_of(it)
assert sorted(sum(again, [])) == sorted(set(sum(again, []))), again
it.close()
print(json.dumps(dict(hosts=False, seen=len(again))))
"""


def test_ranks_go_on_without_their_host():
    with tempfile.TemporaryDirectory() as folder:
        found = ranks(2, HOST_DIES, [os.path.join(folder, "x")])
        assert sorted(one["hosts"] for one in found) == [False, True] and all(one["seen"] == 10 for one in found), found


def test_the_memory_of_a_cache_is_counted_once():
    code = """
import json, os, sys, time
from helpers import *
import numpy as np
from headroom_train import _native
data = headroom.cached(Numbers(256, size=65536), name="memory")
before = _native.process_memory()["anonymous_bytes"]
it = headroom.DataLoader(data, batch_size=8, num_workers=1, rank=0, world_size=1)
for _ in range(2):
    for batch in it:
        pass
del batch
together(sys.argv[1], 3)
grown = _native.process_memory()["anonymous_bytes"] - before
tables = sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmPTE")) * 1024
def shared(pid):
    return sum(int(line.split()[1]) * 1024 for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss_Shmem"))
pss = shared(os.getpid()) + sum(shared(process.pid) for process in it._pool.processes)
stats = headroom.stats()
together(sys.argv[1], 3)
it.close()
print(json.dumps(dict(grown=grown, pss=pss, tables=tables, used=stats["used_bytes"], decodes=stats["node_decodes"])))
"""
    with tempfile.TemporaryDirectory() as folder:
        found = ranks(3, code, [folder])
    data = 256 * 65536 * 4
    assert all(one["decodes"] == 256 and one["used"] >= data for one in found), found
    shared = sum(one["pss"] for one in found)
    assert shared < 1.1 * data + (12 << 20), (shared / data, found)
    assert all(one["grown"] < 40 << 20 for one in found), found


def test_places_of_every_launcher():
    from headroom_train.place import Place, PlaceError, of_environment

    torchrun = dict(RANK="3", WORLD_SIZE="6", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert of_environment(torchrun) == Place(3, 6, 1, 2)
    assert of_environment(dict(RANK="1", WORLD_SIZE="2")) == Place(1, 2, 1, 2)
    mpi = dict(OMPI_COMM_WORLD_RANK="5", OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4")
    assert of_environment(mpi) == Place(5, 8, 1, 4)
    slurm = dict(SLURM_PROCID="9", SLURM_STEP_NUM_TASKS="11", SLURM_LOCALID="1", SLURM_NODEID="2", SLURM_STEP_TASKS_PER_NODE="4(x2),3")
    assert of_environment(slurm) == Place(9, 11, 1, 3)
    assert of_environment(dict(SLURM_PROCID="0")) == Place(0, 1, 0, 1), "a batch script is no rank"
    assert of_environment(dict(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")) == Place(1, 2, 1, 2)
    assert of_environment(dict(LOCAL_RANK="1", WORLD_SIZE="4", NODE_RANK="1", NNODES="2")) == Place(3, 4, 1, 2)
    for wrong in (dict(RANK="x", WORLD_SIZE="2"), dict(RANK="2", WORLD_SIZE="2"), dict(RANK="1")):
        try:
            of_environment(wrong)
        except PlaceError as error:
            assert "RANK" in str(error)
        else:
            raise AssertionError(wrong)


def test_a_fork_of_the_user_reads_the_same_cache():
    cache = headroom.Cache("fork")
    cache.put("a", np.arange(5))
    held = cache.get("a")
    child = os.fork()
    if child == 0:
        good = cache.get("a").sum() == 10 and cache.put("b", 7) and held.sum() == 10
        # The directory hears of it meanwhile: what a process says last before it is gone may be lost.
        time.sleep(0.3)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get("b") == 7


DISK = """
import json, os, sys
import headroom_train as headroom
from helpers import Numbers, ids_of
headroom.configure(cache=1 << 20)
data = headroom.cached(Numbers(240, log=sys.argv[2], size=10_000), name="disk of ranks", disk=sys.argv[1])
loader = headroom.DataLoader(data, batch_size=8, shuffle=True, num_workers=1)
found = [ids_of(loader) for _ in range(4)]
print(json.dumps([sum(batches, []) for batches in found]))
"""


def test_ranks_share_one_file_on_disk():
    with tempfile.TemporaryDirectory() as folder:
        disk, log = os.path.join(folder, "disk"), os.path.join(folder, "log")
        os.mkdir(disk)
        # Of a job whose ranks never all came.
        left = os.path.join(disk, f"headroom-{os.getuid()}-left-0.samples")
        for name in (left, f"{left}.1"):
            open(name, "w").close()
        found = ranks(3, DISK, (disk, log))
        for epoch in range(4):
            assert sorted(sum((of_rank[epoch] for of_rank in found), [])) == list(range(240))
        decodes = open(log).read().split()
        assert set(decodes) == set(map(str, range(240))) and len(decodes) < 260, len(decodes)
        assert os.listdir(disk) == []
