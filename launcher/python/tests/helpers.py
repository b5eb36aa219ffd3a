"""Data sets and ranks for the tests."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import headroom_train as headroom


def has(name):
    """Tells whether package `name` can be imported. PyTorch's wheel cannot be without the CUDA libraries that it is linked with."""
    spec = importlib.util.find_spec(name)
    if spec is None or name != "torch":
        return spec is not None
    if not Path(spec.origin).with_name("lib").joinpath("libtorch_cuda.so").exists():
        return True
    try:
        return importlib.util.find_spec("nvidia.cudnn") is not None
    except ModuleNotFoundError:
        return False


HAS_TORCH = has("torch")
HERE = os.path.dirname(os.path.abspath(__file__))


class Numbers:
    """Sample `i`: an array of `i`, its number, and a text. Each decode leaves a line in `log`."""

    def __init__(self, count, log=None, size=64):
        self.count, self.log, self.size = count, log, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{index}\n")
        return np.full(self.size, index, np.float32), index, f"sample {index}"


class Lengths:
    """Sample `i` has `i % 50 * 100` numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.full(index % 50 * 100, index, np.int32)


def listed(values):
    return [int(value) for value in values]


def ids_of(batches):
    """Sample numbers of batches of `Numbers`, whose arrays must agree with them."""
    found = []
    for array, number, text in batches:
        for row, one, word in zip(np.asarray(array), listed(number), text):
            assert (row == one).all() and word == f"sample {one}", (row, one, word)
        found.append(listed(number))
    return found


def ranks(count, script, words=(), env=(), first_port=None):
    """Runs `script` (code that prints one JSON line) as `count` ranks, as torchrun would start them."""
    port = str(first_port or 20000 + os.getpid() % 20000)
    children = []
    for rank in range(count):
        place = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count),
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        place.update(env)
        children.append(subprocess.Popen([sys.executable, "-c", script, *map(str, words)], stdout=subprocess.PIPE, text=True,
                                         env=place, cwd=HERE))
    # All pipes at once: a rank may wait for another one.
    outputs = [None] * count

    def read(number):
        outputs[number] = children[number].communicate()[0]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    codes = [child.returncode for child in children]
    assert codes == [0] * count, (codes, outputs)
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


_meetings = [0]


def together(folder, count):
    """Waits until `count` processes are here."""
    _meetings[0] += 1
    name = f"here {_meetings[0]} "
    open(os.path.join(folder, f"{name}{os.getpid()}"), "w").close()
    while sum(file.startswith(name) for file in os.listdir(folder)) < count:
        time.sleep(0.005)


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
        return error
    raise AssertionError(f"no {kind.__name__}: {text}")


__all__ = ["HAS_TORCH", "HERE", "Lengths", "Numbers", "headroom", "ids_of", "listed", "raises", "ranks", "together"]
