"""The node's cache by key, for a program that keeps its own data set and loader."""

import hashlib
import os
import threading

from . import _native, codec, node
from .dataset import tag_of

_NO_USE = (1 << 64) - 1


def _bytes_of(key):
    if isinstance(key, str):
        return b"s" + key.encode("utf-8", "surrogatepass")
    if isinstance(key, bytes):
        return b"b" + key
    if not isinstance(key, (int, os.PathLike, tuple)):
        raise TypeError(f"a key is a text, bytes, a whole number, a path or a tuple of these, found {type(key).__name__}")
    if isinstance(key, int):
        return b"i%d" % key
    if isinstance(key, os.PathLike):
        return b"s" + os.fsencode(key)
    return b"t" + b"\0".join(b"%d:" % len(part) + part for part in map(_bytes_of, key))


class _Writer:
    """A value on its way into the cache, for `_native.Node.open`."""

    def __init__(self, make, tag, memory):
        self._make, self._tag, self._memory = make, tag, memory
        self.value, self.parts, self.made = None, None, False

    def make(self):
        if not self.made:
            self.value = self._make()
            self.made = True
        self.parts, total = codec.encode(self.value, self._tag)
        return total

    def write(self, offset):
        codec.write(self._memory, self.parts, offset)


class Cache:
    """Values by key, one copy for all processes of the node: arrays, tensors, numbers, texts, and nests of them.

    `get` gives arrays and tensors that lie in the cache: they cost no copy and must not be written to (arrays refuse); with
    `copy=True` they are the caller's own. An entry stays in its place while any of them lives. A value that is stored stays as it
    is: `put` of a known key stores nothing. Where there is no room, `put` returns False and `get_or` the value itself.

    Processes that use the same `name` share values; nobody but this user's processes of this job can reach them.
    """

    def __init__(self, name="cache"):
        self.name = str(name)
        self._space = tag_of(f"space {self.name}").to_bytes(8, "little")
        self._guess = 4096
        self._known = {}
        self._lock = threading.Lock()

    def _key(self, key):
        try:
            return self._known[key]
        except (KeyError, TypeError):
            pass
        digest = hashlib.blake2b(_bytes_of(key), digest_size=16, key=self._space).digest()
        found = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        if len(self._known) >= 1 << 20:
            self._known.clear()
        try:
            self._known[key] = found
        except TypeError:
            pass
        return found

    def get(self, key, default=None, copy=False):
        """The value of a key, or `default`."""
        found = node.found_node()
        try:
            # The way of a key that was asked for before: it is what a program does most.
            entry = found.find(*self._known[key])
        except (KeyError, TypeError, AttributeError, _native.CacheLost):
            entry = self._find(key)
        if entry is None:
            return default
        return codec.copied(codec.decode(entry)) if copy else codec.decode(entry)

    def _find(self, key):
        found = node.node()
        if found is None:
            return None
        try:
            return found.find(*self._key(key))
        except _native.CacheLost as error:
            node.lose(error)
            return None

    def __contains__(self, key):
        return self._find(key) is not None

    def put(self, key, value):
        """Stores a value. False: there is no room for it. What is stored under the key already stays. Other processes find it a
        moment later, and not at all if this one is killed, or leaves by `os._exit`, at once."""
        return self._store(key, lambda: value)[0] is not None

    def get_or(self, key, make, copy=False):
        """The value of a key; one that is not stored is made by `make()`, once for all processes, and stored."""
        entry, writer = self._find(key), None
        if entry is None:
            entry, writer = self._store(key, make)
        if entry is None:
            return writer.value if writer.made else make()
        value = codec.decode(entry)
        return codec.copied(value) if copy else value

    def _store(self, key, make):
        found = node.node()
        number, tag = self._key(key)
        writer = _Writer(make, tag, found.memory if found is not None else -1)
        if found is None:
            return None, writer
        try:
            return found.open((number, tag), _NO_USE, self._guess, writer), writer
        except _native.CacheLost as error:
            node.lose(error)
            return None, writer

    def __getstate__(self):
        return {"name": self.name, "cache": node.name_of_cache()}

    def __setstate__(self, state):
        self.__init__(state["name"])
        node.use_cache(state["cache"])


__all__ = ["Cache"]
