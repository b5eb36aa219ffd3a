"""A decode worker: calls the user's `dataset[i]` and transform, and writes the bytes into its scratch memory.

Requests are five little-endian u64: kind, split, index, epoch, bytes in the scratch memory. The answer is two: outcome, bytes;
after outcome 1 the text of the error follows on the socket.
"""

import base64
import json
import os
import random
import signal
import socket
import struct
import sys
import time

from . import failure, sample

DESCRIBE, DECODE, USE, READ = 0, 1, 2, 3
_REQUEST, _ANSWER = struct.Struct("<5Q"), struct.Struct("<2Q")
_MASK = (1 << 64) - 1
# Longest error that is told, bytes: LONGEST_TEXT of the trainer's lanes.
_MOST_TEXT = 1 << 20
# Seconds after which samples of a split are taken to be the same at every reading.
_MOST_LOOK_S = 1.0


def mixed(*numbers):
    """A seed of these numbers (SplitMix64)."""
    x = 0x9E3779B97F4A7C15
    for number in numbers:
        x = (x ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
        x ^= x >> 31
    return x


def seed_all(seed):
    """Seeds Python, PyTorch, and numpy where it is loaded."""
    random.seed(seed)
    sample.loaded("torch").default_generator.manual_seed(seed >> 1)
    numpy = sample.loaded("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


class Worker:
    def __init__(self, session, scratch):
        self.session, self.scratch, self.layouts = session, scratch, {}

    def raw(self, split, index, seed):
        """`dataset[index]`, its random parts seeded."""
        seed_all(mixed(self.session.seed, seed, index))
        return self.session.datasets[split][index]

    def used(self, value, index, epoch):
        """The sample as the model gets it."""
        if self.session.transform is None:
            return value
        seed_all(mixed(self.session.seed + 1, epoch, index))
        return self.session.transform(value)

    def differs(self, split, as_bytes):
        """Whether some sample differs from reading to reading: kept ones would be the same in every epoch, which the user did
        not write. A flip by chance may come out alike twice, so that several samples are read, several times."""
        count, began = len(self.session.datasets[split]), time.monotonic()
        for seed in (1, 2, 3):
            for index in sorted({count * part // 8 for part in range(8)}):
                if as_bytes(self.raw(split, index, 0)) != as_bytes(self.raw(split, index, seed)):
                    return True
                if time.monotonic() - began > _MOST_LOOK_S:
                    return False
        return False

    def ragged(self, split):
        """The layout of a split whose samples differ in size: the most bytes that they have, as far as a look tells."""
        count = len(self.session.datasets[split])
        looked = sorted({count * part // 32 for part in range(32)} | {count - 1})
        most = [0, 0]
        for index in looked:
            value = self.raw(split, index, 0)
            for at, found in enumerate((value, self.used(value, index, 0))):
                most[at] = max(most[at], sum(map(len, sample.pack(found))))
        given = self.session.section.get("sample_bytes")
        most = [given or 2 * size for size in most]
        random_ones = self.differs(split, sample.pack)
        first = b"".join(sample.pack(self.used(self.raw(split, 0, 0), 0, 0)))
        part = {"structure": ["b", base64.b64encode(first).decode()], "fields": []}
        return {"stored": part, "given": part, "random": random_ones, "most": most}

    def fixed(self, split):
        """How samples of a split are laid out: as `dataset[i]` gives them, and as the model gets them."""
        if split not in self.layouts:
            value = self.raw(split, 0, 0)
            stored = given = sample.encode(value)[0]
            if self.session.transform is not None:
                given = sample.encode(self.used(value, 0, 0))[0]
            self.layouts[split] = {"stored": stored, "given": given}
        return self.layouts[split]

    def described(self, split):
        """The layout of a split, for the loader."""
        if self.session.collate is not None:
            return self.ragged(split)
        return dict(self.fixed(split), random=self.differs(split, sample.encode))

    def write(self, parts):
        at = 0
        for part in parts:
            view = memoryview(part)
            while len(view):
                done = os.pwrite(self.scratch, view, at)
                view, at = view[done:], at + done
        return at

    def encoded(self, value, split, which, index):
        if self.session.collate is not None:
            return self.write(sample.pack(value))
        found, parts = sample.encode(value)
        sample.compare(self.fixed(split)[which], found, f"dataset[{index}]")
        return self.write(parts)

    def request(self, kind, split, index, epoch, size):
        if kind == DESCRIBE:
            return self.write([json.dumps(self.described(split)).encode()])
        if kind == DECODE:
            return self.encoded(self.raw(split, index, 0), split, "stored", index)
        if kind == READ:
            return self.encoded(self.used(self.raw(split, index, epoch + 1), index, epoch), split, "given", index)
        data = bytearray(size)
        if os.preadv(self.scratch, [data], 0) != size:
            raise OSError("the scratch memory is shorter than the sample in it")
        if self.session.collate is not None:
            value = sample.unpack(data)
        else:
            value = sample.decode(self.fixed(split)["stored"], data)
        return self.encoded(self.used(value, index, epoch), split, "given", index)


def _receive(connection, count):
    data = bytearray()
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            return None
        data += more
    return data


def work(session, number, scratch):
    """The life of a worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection = socket.socket(fileno=number)
    worker = Worker(session, scratch)
    try:
        while True:
            data = _receive(connection, _REQUEST.size)
            if data is None:
                break
            kind, split, index, epoch, size = _REQUEST.unpack(data)
            try:
                answer = _ANSWER.pack(0, worker.request(kind, split, index, epoch, size))
            except Exception as error:
                name = session.names[split] if split < len(session.names) else split
                step = "transform" if kind == USE else "dataset"
                if isinstance(error, sample.Unusable):
                    text = f"{step} of {name}: {error}"
                else:
                    text = str(failure.failed(f"{step} {name}[{index}]", error))
                # The trainer reads no more of it, and what is left would be taken for the next answer.
                data = text.encode()[:_MOST_TEXT]
                answer = _ANSWER.pack(1, len(data)) + data
            connection.sendall(answer)
    except (BrokenPipeError, ConnectionError):
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
