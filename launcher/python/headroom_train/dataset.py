"""Data sets whose samples are decoded once per node."""

import hashlib
import os
import threading

import numpy as np

from . import _native, codec, node
from .codec import loaded_torch
from .place import job_name, place
from .worker import Recipe, seed_of, seeded

_INDEX_BITS = _native.INDEX_BITS
_NO_USE = (1 << 64) - 1
_counts = {}
_lock = threading.Lock()


def _peek(value, depth=0):
    """What tells values apart, cheaply: small ones whole, large ones by size and ends."""
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return repr(value)[:1000]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    torch = loaded_torch()
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu().reshape(-1)[:256].float().numpy() if value.numel() else np.empty(0)
    if isinstance(value, np.ndarray):
        flat = value.reshape(-1) if value.flags.c_contiguous else value.flat
        ends = [np.asarray(part).tolist() for part in (flat[:32], flat[-32:])] if value.size else []
        return f"{value.dtype} {value.shape} {ends}"
    if isinstance(value, (list, tuple)) and depth < 2:
        some = list(value[:8]) + list(value[-8:]) if len(value) > 16 else value
        return f"{len(value)} {[_peek(part, depth + 1) for part in some]}"
    if isinstance(value, dict) and depth < 2:
        some = sorted(value, key=repr)[:16]
        return f"{len(value)} {[(repr(key), _peek(value[key], depth + 1)) for key in some]}"
    kind = type(value)
    if depth < 2 and hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return f"{kind.__module__}.{kind.__qualname__} {_peek(vars(value), depth + 1)}"
    return f"{kind.__module__}.{kind.__qualname__}"


def fingerprint(dataset, length):
    """A text that equal data sets of a program's ranks share, and others hardly do."""
    kind = type(dataset)
    if hasattr(kind, "headroom_text"):
        return dataset.headroom_text()
    inner = _peek(vars(dataset)) if hasattr(dataset, "__dict__") else _peek(list(dataset[:8])) if isinstance(
        dataset, (list, tuple)) else ""
    return f"{kind.__module__}.{kind.__qualname__} {length} {inner}"


def tag_of(text):
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _tag(dataset, length, name):
    text = f"name {name}" if name is not None else fingerprint(dataset, length)
    with _lock:
        # The second data set that looks the same is another one, unless it has a name.
        number = 0 if name is not None else _counts.get(text, 0)
        _counts[text] = number + 1
    return tag_of(f"{text} #{number}")


def check_length(dataset):
    """Samples in a data set that can be asked by index."""
    if not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{type(dataset).__name__} has no [i]: give a data set with len() and [i]; an iterable one has no samples to "
            "find again"
        )
    try:
        return len(dataset)
    except TypeError:
        raise TypeError(f"{type(dataset).__name__} has no len(): give a data set with len() and [i]") from None


class _Maker:
    """Decodes one sample of a cached data set in this process, for `_native.Node.open`."""

    def __init__(self, cached, index, memory):
        self._cached, self._index, self._memory = cached, index, memory
        self.parts = None

    def make(self):
        cached = self._cached
        stored = cached.disk.get(self._index) if cached.disk is not None else None
        if stored is not None:
            self.parts, self.total = [stored], len(stored)
        else:
            with seeded(seed_of(cached.seed, 0, self._index)):
                sample = cached.dataset[self._index]
            self.parts, self.total = codec.encode(sample, cached.tag)
            cached.decodes += 1
        cached.guess = max(cached.guess, self.total)
        if stored is None and cached.disk is not None:
            self._keep()
        return self.total

    def _keep(self):
        """Writes the sample to disk, where that is worth it."""
        if self._cached.disk.wants(self.total, node.found_node()):
            note = self._cached.disk.put(self._index, codec.joined(self.parts, self.total))
            if note:
                node.say_once(note)

    def write(self, offset):
        codec.write(self._memory, self.parts, offset)


class Cached:
    """A data set whose samples are decoded once per node: see :func:`cached`."""

    def __init__(self, dataset, transform=None, *, name=None, seed=0, disk=None):
        self.length = check_length(dataset)
        if self.length >= 1 << _INDEX_BITS:
            raise ValueError(f"{self.length} samples: at most {1 << _INDEX_BITS} can be cached")
        self.dataset, self.transform, self.name, self.seed = dataset, transform, name, int(seed)
        self.tag = _tag(dataset, self.length, name)
        self.base = self.tag >> _INDEX_BITS << _INDEX_BITS
        self.epoch, self.decodes, self.guess = 0, 0, 4096
        # Here, so that processes that a program starts later find this one's cache.
        node.node()
        self.disk = None if disk is None else _disk(disk, self.tag, self.length)

    def __len__(self):
        return self.length

    def __getattr__(self, name):
        # `classes`, `targets` and whatever else a program asks of its data set.
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getstate__(self):
        # A process that is started afresh finds the same cache, and the same file on disk.
        return {**vars(self), "disk": self.disk and self.disk.handle, "_cache": node.name_of_cache()}

    def __setstate__(self, state):
        vars(self).update(state)
        if self.disk is not None:
            self.disk = _native.Disk.of(self.disk)
        if state.get("_cache"):
            node.use_cache(state["_cache"])

    def set_epoch(self, epoch):
        """The epoch that seeds the transform where samples are asked for by index."""
        self.epoch = int(epoch)

    def index(self, index):
        index = int(index)
        index = index + self.length if index < 0 else index
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return index

    def entry(self, index, next_use=_NO_USE):
        """The entry of a sample, decoded here if it is not stored; else its parts, where there is no room for it."""
        found = node.node()
        maker = _Maker(self, index, found.memory if found is not None else -1)
        if found is not None:
            try:
                stored = found.open((self.base | index, self.tag), next_use, self.guess, maker)
                if stored is not None:
                    return stored
            except _native.CacheLost as error:
                node.lose(error)
        if maker.parts is None:
            maker.make()
        return codec.Bytes(codec.joined(maker.parts, maker.total))

    def __getitem__(self, index):
        index = self.index(index)
        # What a program gets is its own to write to.
        sample = codec.copied(codec.decode(self.entry(index)))
        if self.transform is None:
            return sample
        with seeded(seed_of(self.seed + 1, self.epoch, index)):
            return self.transform(sample)

    def recipe(self, collate_fn):
        return Recipe(self.dataset, self.transform, collate_fn, self.seed, self.tag, True)


def _disk(folder, tag, length):
    here = place()
    return _native.Disk(os.fspath(folder), node.name_of_cache() or job_name(), (here.local_rank, here.local_world_size), tag, length)


def cached(dataset, transform=None, *, name=None, seed=0, disk=None):
    """Decodes each sample of `dataset` once per node, and keeps it for all processes and epochs while there is room.

    `dataset` has `len()` and `[i]`. `transform(sample)` runs at every use; Python's, numpy's and torch's generators are seeded by
    (seed, epoch, i) before it, so that what it draws depends on neither workers nor ranks. What `dataset[i]` itself draws is
    drawn once.

    Processes know a data set again by its class, length and attributes; where two differ in nothing of these, `name` tells them
    apart. The result has `len()` and `[i]` like any data set, and every other attribute of `dataset`; with
    :class:`headroom_train.DataLoader` it is read without Python.

    `disk` names a folder on a local disk for a data set that is larger than the cache: decoded samples without room in memory are
    read from a file there in later epochs, and not decoded again. One file serves the node's ranks, and is gone when they are. It
    grows to the size of the decoded data set, and leaves a twentieth of the file system free, or, where less is free, as much as it
    takes itself. Raises OSError where nothing can be written.
    """
    if isinstance(dataset, Cached):
        if transform is None and disk is None:
            return dataset
        raise TypeError("the data set is cached already: give transform= and disk= where cached() is called first")
    return Cached(dataset, transform, name=name, seed=seed, disk=disk)


class Plain:
    """A data set that is decoded for every use, in the same workers and order."""

    def __init__(self, dataset, seed):
        self.length = check_length(dataset)
        self.dataset, self.transform, self.seed = dataset, None, int(seed)
        self.tag, self.base, self.decodes = tag_of("plain"), 0, 0

    def recipe(self, collate_fn):
        return Recipe(self.dataset, None, collate_fn, self.seed, self.tag, False)


