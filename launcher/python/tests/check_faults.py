"""Errors, deaths, hangs: each is named, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np

from helpers import HERE, Numbers, headroom, ids_of, raises


class Odd(Exception):
    def __init__(self, path):
        super().__init__(f"cannot read {path}")
        self.path = path


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two()}")
        self.two = two


class Faulty(Numbers):
    def __init__(self, count, fault):
        super().__init__(count)
        self.fault = fault

    def __getitem__(self, index):
        if index == 7:
            self.fault()
        return super().__getitem__(index)


def odd():
    raise Odd("x.png")


def unpicklable():
    raise Unpicklable("this", lambda: "that")


def stop_iteration():
    raise StopIteration("here")


def test_an_exception_is_the_programs_own_with_its_traceback():
    for workers in (0, 2):
        it = headroom.DataLoader(headroom.cached(Faulty(20, odd), name=f"odd {workers}"), batch_size=4, num_workers=workers)
        try:
            list(it)
            raise AssertionError("no error")
        except Odd as error:
            assert error.path == "x.png" and str(error) == "cannot read x.png"
            text = traceback.format_exc()
            assert "in odd" in text and "check_faults.py" in text and "raise Odd" in text, text
        # The loader can be used again, up to the sample.
        running = iter(it)
        assert len(next(running)[1]) == 4
        it.close()
    it = headroom.DataLoader(headroom.cached(Faulty(20, unpicklable), name="un"), batch_size=4, num_workers=1)
    raises(headroom.WorkerError, "check_faults.Unpicklable: this and that", lambda: list(it))
    it.close()
    it = headroom.DataLoader(headroom.cached(Faulty(20, stop_iteration), name="stop"), batch_size=4, num_workers=1)
    raises(headroom.WorkerError, "StopIteration: here", lambda: list(it))
    it.close()


def bad_transform(sample):
    if sample[1] == 5:
        raise ValueError("no such crop")
    return sample


def test_a_failing_transform_and_collate_are_the_users():
    for workers in (0, 1):
        data = headroom.cached(Numbers(9), transform=bad_transform, name=f"bad {workers}")
        it = headroom.DataLoader(data, batch_size=3, num_workers=workers)
        raises(ValueError, "no such crop", lambda: list(it))
        it.close()
        it = headroom.DataLoader(headroom.cached(Numbers(9)), batch_size=3, collate_fn=lambda s: 1 / 0, num_workers=workers)
        raises(ZeroDivisionError, "division", lambda: list(it))
        it.close()


class Deadly(Numbers):
    """Sample 7 kills its process as often as the file says."""

    def __getitem__(self, index):
        if index == 7:
            with open(self.log) as file:
                left = int(file.read())
            if left > 0:
                with open(self.log, "w") as file:
                    file.write(str(left - 1))
                os.kill(os.getpid(), signal.SIGKILL)
        return np.full(self.size, index, np.float32), index, f"sample {index}"


def captured(call):
    """What `call` writes to standard error."""
    with tempfile.TemporaryFile("w+") as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            call()
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
        file.seek(0)
        return file.read()


def test_a_dead_worker_is_replaced_and_named_and_a_deadly_sample_is_an_error():
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "left")
        for deaths in (1, 5):
            with open(log, "w") as file:
                file.write(str(deaths))
            it = headroom.DataLoader(headroom.cached(Deadly(30, log), name=f"deadly {deaths}"), batch_size=5, num_workers=2)
            if deaths == 1:
                found = []
                text = captured(lambda: found.extend(ids_of(it)))
                assert sorted(sum(found, [])) == list(range(30))
                assert "decode worker" in text and "SIGKILL" in text and "at sample 7" in text, text
            else:
                captured(lambda: raises(RuntimeError, "sample 7 ended two decode workers", lambda: list(it)))
            it.close()


def test_workers_that_are_killed_between_samples_are_replaced():
    it = headroom.DataLoader(headroom.cached(Numbers(60), name="killed"), batch_size=4, num_workers=2)
    running = iter(it)
    next(running)
    pids = [process.pid for process in it._pool.processes]
    [os.kill(pid, signal.SIGKILL) for pid in pids]
    text = captured(lambda: list(running))
    assert "SIGKILL" in text, text
    assert [process.pid for process in it._pool.processes] != pids
    it.close()


class Slow(Numbers):
    def __getitem__(self, index):
        if index == 7:
            time.sleep(60)
        return super().__getitem__(index)


def test_a_sample_beyond_the_timeout_is_an_error():
    it = headroom.DataLoader(headroom.cached(Slow(20), name="slow"), batch_size=4, num_workers=1, timeout=0.5)
    began = time.time()
    captured(lambda: raises(RuntimeError, "longer than timeout=0.5 s for sample 7", lambda: list(it)))
    assert time.time() - began < 20
    it.close()
    it = headroom.DataLoader(headroom.cached(Slow(20), name="close"), batch_size=4, num_workers=2)
    # Asked for by hand: a thread that waits for one sample decodes others meanwhile, and may be at this one before the first batch.
    it.threads().push(0, [7], [(1 << 64) - 1])
    time.sleep(0.3)
    began = time.time()
    it.close()
    assert time.time() - began < 20, "closing does not wait for a sample"


def test_two_data_sets_that_look_alike_are_told_apart():
    class Letters:
        __slots__ = ("letters",)

        def __init__(self, letters):
            self.letters = letters

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return self.letters[index]

    one, two = headroom.cached(Letters("abc")), headroom.cached(Letters("xyz"))
    assert [one[0], two[0], one[1], two[1]] == ["a", "x", "b", "y"]
    named = headroom.cached(Letters("abc"), name="same"), headroom.cached(Letters("xyz"), name="same")
    assert [named[0][2], named[1][2]] == ["c", "c"], "the name says that they are one"


def test_an_interrupt_ends_the_loop_and_all_workers():
    code = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from helpers import *
class Slow(Numbers):
    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)
it = headroom.DataLoader(headroom.cached(Slow(1000)), batch_size=50, num_workers=2)
running = iter(it)
it.threads()
print(*[process.pid for process in it._pool.processes], flush=True)
try:
    list(running)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code, HERE], stdout=subprocess.PIPE, text=True, cwd=HERE)
    pids = [int(pid) for pid in child.stdout.readline().split()]
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=30)
    assert output.strip() == "interrupted" and child.returncode == 0, (output, child.returncode)
    assert not any(lives(pid) for pid in pids)


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_is_left_after_kill_9_of_rank_or_worker():
    code = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
from helpers import *
it = headroom.DataLoader(headroom.cached(Numbers(100)), batch_size=10, shuffle=True, num_workers=2)
print(json.dumps(dict(pids=[p.pid for p in (it.threads(), it._pool.processes)[1]])), flush=True)
while True:
    list(it)
"""
    # Other programs use the folder as well.
    named = lambda: {name for name in os.listdir("/dev/shm") if "headroom" in name}
    before = named()
    for round in range(4):
        child = subprocess.Popen([sys.executable, "-c", code, HERE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
        pids = json.loads(child.stdout.readline())["pids"]
        time.sleep(0.05 * round)
        child.kill()
        child.wait()
        until = time.time() + 20
        while any(lives(pid) for pid in pids) and time.time() < until:
            time.sleep(0.01)
        assert not any(lives(pid) for pid in pids), pids
    assert named() <= before
