"""Decode workers: processes of the user's own Python that run `dataset[i]` and write the result into the node's cache.

A worker holds no mapping of the cache. It writes by offset, where the loader's thread was granted room, and answers over a socket
pair; see src/lane.rs for the messages.
"""

import gc
import os
import pickle
import random
import signal
import socket
import struct
import sys
import threading
import traceback
import warnings

import numpy as np

from . import _native, codec, node
from .collate import default_collate

_SCRATCH = (1 << 64) - 1
_NO_EPOCH = _SCRATCH
_DECODE, _PLACE, _BUILD = 1, 2, 3
_DONE, _LONG, _FAILED = 0, 1, 2
_ANSWER = struct.Struct("<BQ")
# Kind; epoch, sample or count, offset, room.
_REQUEST = struct.Struct("<BQQQQ")
# A worker that is forked while another one starts would have its end of the socket, which then does not close with it.
_starts = threading.Lock()
# Seconds between two looks at whether the parent lives.
_LOOK_S = 5.0


class WorkerError(RuntimeError):
    """An error of the user's code that could not be brought over as it was; and the traceback of one that could."""

    def __str__(self):
        return str(self.args[0]) if self.args else ""


def seed_all(seed):
    """Seeds Python, numpy and, where it is loaded, torch."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch = codec.loaded_torch()
    if torch is not None and hasattr(torch, "default_generator"):
        torch.default_generator.manual_seed(seed)


class seeded:
    """Seeds for a while; the generators of the program go on afterwards as if nothing had been."""

    def __init__(self, seed):
        self._seed = seed

    def __enter__(self):
        torch = codec.loaded_torch()
        self._torch = torch.get_rng_state() if torch is not None and hasattr(torch, "get_rng_state") else None
        self._python, self._numpy = random.getstate(), np.random.get_state()
        seed_all(self._seed)

    def __exit__(self, *_):
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        if self._torch is not None:
            codec.loaded_torch().set_rng_state(self._torch)


def seed_of(seed, epoch, index):
    """The seed of everything random at one use of a sample."""
    return _native.mixed(_native.mixed(seed & _SCRATCH, epoch), index) >> 1


class Recipe:
    """What is done to samples, the same in a worker and in the program itself."""

    def __init__(self, dataset, transform, collate_fn, seed, tag, cached):
        self.dataset, self.transform, self.collate_fn = dataset, transform, collate_fn
        self.seed, self.tag, self.cached = seed, tag, cached

    def sample(self, index, epoch):
        """`dataset[index]`, random parts seeded: of a sample that is kept without the epoch."""
        seed_all(seed_of(self.seed, 0 if self.cached else epoch + 1, index))
        return self.dataset[index]

    def use(self, sample, index, epoch):
        if self.transform is None:
            return sample
        seed_all(seed_of(self.seed + 1, epoch, index))
        return self.transform(sample)

    def batch(self, samples):
        return (self.collate_fn or default_collate)(samples)


class _Gone(Exception):
    """The loader's end of the socket is closed."""


class _Worker:
    def __init__(self, recipe, connection, scratch, memory, parent):
        self.recipe, self.socket, self.scratch, self.memory = recipe, connection, scratch, memory
        self.parent, self.waiting = parent, None

    def receive(self, count):
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            try:
                more = self.socket.recv_into(view[got:])
            except socket.timeout:
                if self.parent and os.getppid() != self.parent:
                    raise _Gone from None
                continue
            if more == 0:
                raise _Gone
            got += more
        return data

    def numbers(self, count):
        return struct.unpack(f"<{count}Q", self.receive(8 * count))

    def answer(self, outcome, number, data=b""):
        self.socket.sendall(_ANSWER.pack(outcome, number) + data)

    def serve(self):
        while True:
            request = self.request(*_REQUEST.unpack(self.receive(_REQUEST.size)))
            try:
                answer = request()
            except Exception as error:  # The user's own: it becomes the program's.
                data = packed(error, f"{traceback.format_exc()}")
                self.answer(_FAILED, len(data), data)
            else:
                self.answer(*answer)

    def request(self, kind, epoch, number, offset, room):
        """The work of one request, all of whose bytes are read."""
        if kind == _DECODE:
            return lambda: self.decode(epoch, number, offset, room)
        if kind == _PLACE:
            return lambda: self.place(offset)
        count = number
        flat = self.numbers(4 * count)
        places = [flat[at: at + 4] for at in range(0, 4 * count, 4)]
        inline = [self.receive(place[3]) if place[1] == 1 else None for place in places]
        return lambda: self.build(epoch, places, inline)

    def decode(self, epoch, index, offset, room):
        epoch = 0 if epoch == _NO_EPOCH else epoch
        parts, total = codec.encode(self.recipe.sample(index, epoch), self.recipe.tag)
        if offset == _SCRATCH:
            codec.write(self.scratch, parts, 0)
        elif total > room:
            self.waiting = (parts, total)
            return _LONG, total
        else:
            codec.write(self.memory, parts, offset)
        return _DONE, total

    def place(self, offset):
        (parts, total), self.waiting = self.waiting, None
        descriptor, offset = (self.scratch, 0) if offset == _SCRATCH else (self.memory, offset)
        codec.write(descriptor, parts, offset)
        return _DONE, total

    def build(self, epoch, places, inline):
        samples = []
        for (index, kind, offset, size), data in zip(places, inline):
            if kind == 0:
                data = bytearray(size)
                if os.preadv(self.memory, [data], offset) != size:
                    raise OSError(f"the cache's memory ends before sample {index}")
            elif kind == 2:
                data = codec.joined(*codec.encode(self.recipe.sample(index, epoch), self.recipe.tag))
            samples.append(self.recipe.use(codec.decode(codec.Bytes(data)), index, epoch))
        parts, total = codec.encode(self.recipe.batch(samples), self.recipe.tag)
        codec.write(self.scratch, parts, 0)
        return _DONE, total


def _remade(kind, arguments, state):
    """An exception as it was: without its __init__, which may want other arguments than those that it passed on."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state or {})
    return error


def packed(error, text):
    """An exception as bytes, with its traceback."""
    kind = type(error)
    try:
        reduced = error.__reduce__()
        if reduced[0] is kind and not isinstance(kind.__init__, type(object.__init__)):
            made = (_remade, (kind, reduced[1], reduced[2] if len(reduced) > 2 else None), text)
        else:
            made = (None, error, text)
        data = pickle.dumps(made)
        unpacked(data)
        return data
    except Exception:
        return pickle.dumps((None, WorkerError(f"{kind.__module__}.{kind.__qualname__}: {error}"), text))


def unpacked(data):
    """The exception of a worker, whose traceback is its cause's text."""
    remake, error, text = pickle.loads(data)
    error = remake(*error) if remake else error
    if isinstance(error, StopIteration):
        # It would end the loop in silence.
        error = WorkerError(f"StopIteration: {error}")
    error.__cause__ = WorkerError(f"in a decode worker\n\n{text}")
    return error


class Descriptor:
    """A descriptor that goes to a child, whatever the way to start it."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        from multiprocessing import reduction

        return _rebuilt, (reduction.DupFd(self.number),)


def _rebuilt(duplicate):
    return Descriptor(duplicate.detach())


def main(recipe, ends, info, init_fn, cache):
    """The life of a worker. `ends`: its socket, its scratch memory, the cache's memory."""
    connection, scratch, memory = ends
    number, count, parent, in_main = info
    if in_main and not _native.end_with_parent():
        in_main = False
    # Under forkserver another process is the parent; there the socket's end tells.
    if parent and os.getppid() != parent:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    node.use_cache(cache)
    ours = socket.socket(fileno=connection.number)
    ours.settimeout(_LOOK_S)
    torch = codec.loaded_torch()
    if torch is not None:
        torch.set_num_threads(1)
        _tell_torch(number, count, recipe)
    seed_all(seed_of(recipe.seed + 2, 0, number))
    code = 0
    try:
        if init_fn is not None:
            init_fn(number)
        _Worker(recipe, ours, scratch.number, memory.number if memory else -1, parent).serve()
    except (_Gone, BrokenPipeError, ConnectionError):
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Objects of the parent are not ended here.
    os._exit(code)


def _tell_torch(number, count, recipe):
    """So that torch.utils.data.get_worker_info() answers in dataset[i]."""
    try:
        from torch.utils.data._utils import worker as of_torch

        of_torch._worker_info = of_torch.WorkerInfo(id=number, num_workers=count, seed=recipe.seed, dataset=recipe.dataset)
    except (ImportError, AttributeError, TypeError):
        pass


class Pool:
    """The workers of one loader."""

    def __init__(self, recipe, count, context, init_fn, memory):
        self.recipe, self.count, self.context, self.init_fn = recipe, count, context, init_fn
        self.memory = memory
        self.processes = [None] * count
        self.closed = False

    def start(self, number):
        """Starts worker `number`; returns the loader's end."""
        with _starts:
            return self._start(number)

    def _start(self, number):
        lane = _native.Lane()
        connection = lane.socket()
        ends = (Descriptor(connection), Descriptor(lane.scratch()), self.memory and Descriptor(self.memory))
        # A worker ends with the thread that started it: the main one, or the loader's own, which starts the later ones.
        in_main = threading.current_thread() is threading.main_thread() or self.processes[number] is not None
        under_server = self.context.get_start_method() == "forkserver"
        info = (number, self.count, 0 if under_server else os.getpid(), in_main and not under_server)
        process = self.context.Process(
            target=main, args=(self.recipe, ends, info, self.init_fn, node.name_of_cache()),
            name=f"headroom-decode-{number}", daemon=True,
        )
        # The child's collector leaves the parent's objects alone: their pages stay shared.
        had = gc.get_freeze_count()
        gc.freeze()
        try:
            with warnings.catch_warnings():
                # The child runs Python alone; none of the loader's threads is needed there.
                warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
                process.start()
        finally:
            if not had:
                gc.unfreeze()
            os.close(connection)
        self.processes[number] = process
        if not under_server:
            lane.set_process(process.pid)
        return lane

    def respawn(self, number, late):
        """A worker in the place of one that ended, or is too late; says how it ended."""
        old = self.processes[number]
        if late:
            old.kill()
        old.join(timeout=5)
        if old.exitcode is None:
            old.kill()
            old.join()
        end = f"decode worker {number} (pid {old.pid}) {_end_of(old.exitcode)}"
        if self.closed:
            raise RuntimeError(f"{end} while the loader was closed")
        return self.start(number), end

    def note(self, text):
        node.say(text)

    def close(self):
        self.closed = True
        for process in self.processes:
            if process is not None:
                process.join(timeout=0.2)
                if process.exitcode is None:
                    process.terminate()
                    process.join(timeout=2)
                if process.exitcode is None:
                    process.kill()
                    process.join()


def _end_of(code):
    if code is None:
        return "does not end"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ": the kernel kills so when memory runs out" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _after_fork():
    global _starts
    _starts = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
